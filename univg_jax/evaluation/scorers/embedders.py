"""Text and face embedders: the frozen encoders that a run is conditioned on.

They run on one device of each process, since each process scores only its own rows
(`scorers.local_mesh`).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8

from data_pipelines.tokenizer import Tokenizer
from univg_jax import sharding
from univg_jax.conditioning import Conditioner
from univg_jax.evaluation.metrics import unit_vectors
from univg_jax.evaluation.scorers import FaceEmbedder, Scorers, TextEmbedder
from univg_jax.pipeline import Pipeline


def embedders(pipeline: Pipeline, *, needs: Sequence[str]) -> Scorers:
    """Those of `text_embed` and `face_embed` that are needed and that the run has.

    All processes call it, since parameters that are split between processes are gathered.
    """
    conditioner, found = pipeline.generator.conditioner, Scorers()
    if "text_embed" in needs:
        found["text_embed"] = text_embedder(
            conditioner,
            _on_this_process(pipeline.frozen, "text"),
            pipeline.tokenizer,
            num_tokens=pipeline.config.data.num_tokens,
        )
    if "face_embed" in needs and conditioner.face_dim is not None:
        found["face_embed"] = face_embedder(
            conditioner, _on_this_process(pipeline.frozen, "identity")
        )
    return found


def _on_this_process(frozen: PyTree, kind: str) -> PyTree:
    """The parameters of one encoder where this process alone can compute with them."""
    if jax.process_count() == 1:
        return {kind: frozen[kind]}
    device = jax.local_devices()[0]
    return jax.tree.map(
        lambda x: jax.device_put(sharding.all_gather_to_host(x), device), {kind: frozen[kind]}
    )


def text_embedder(
    conditioner: Conditioner,
    frozen: PyTree,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    batch_size: int = 64,
) -> TextEmbedder:
    """Unit vectors of sentences, by the pooled embedding of the run's text encoder."""
    embed = jax.jit(lambda *args: conditioner.embed_text(*args).pooled)

    def embed_text(texts: list[str]) -> Float[np.ndarray, "b d"]:
        rows = []
        for start in range(0, len(texts), batch_size):
            chunk = [tokenizer(text, num_tokens) for text in texts[start : start + batch_size]]
            # Padded to one shape, so that the encoder is compiled once.
            chunk += [chunk[-1]] * (batch_size - len(chunk))
            tokens = np.stack([row.tokens for row in chunk])
            mask = np.stack([row.text_mask for row in chunk])
            rows.append(unit_vectors(np.asarray(embed(frozen, tokens, mask))))
        return np.concatenate(rows)[: len(texts)]

    return embed_text


def face_embedder(conditioner: Conditioner, frozen: PyTree) -> FaceEmbedder:
    """Unit vectors of faces, by the run's identity encoder."""
    identify = jax.jit(conditioner.identify)

    def embed_face(images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b e"]:
        return np.asarray(identify(frozen, images))

    return embed_face
