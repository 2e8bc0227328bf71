"""Text and face embedders: the frozen encoders that a run is conditioned on.

They run on one device of each process, since each process scores only its own rows
(`scorers.local_mesh`).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, PyTree

from data_pipelines.tokenizer import Tokenizer
from univg_jax import sharding
from univg_jax.conditioning import Conditioner
from univg_jax.evaluation.metrics import unit_vectors
from univg_jax.evaluation.scorers import FaceEmbedder, Scorers, TextEmbedder
from univg_jax.pipeline import Pipeline

BATCH_SIZE = 64  # sentences that are embedded at once


def embedders(pipeline: Pipeline, *, needs: Sequence[str]) -> Scorers:
    """Those of `text_embed` and `face_embed` that are needed and that the run has.

    All processes call it, since parameters that are split between processes are gathered.
    """
    conditioner, found = pipeline.generator.conditioner, Scorers()
    if "text_embed" in needs:
        frozen, num_tokens = _local(pipeline.frozen, "text"), pipeline.config.data.num_tokens
        found["text_embed"] = _text_embedder(
            conditioner, frozen, pipeline.tokenizer, num_tokens=num_tokens
        )
    if "face_embed" in needs and conditioner.face_dim is not None:
        found["face_embed"] = _face_embedder(conditioner, _local(pipeline.frozen, "identity"))
    return found


def _local(frozen: PyTree, kind: str) -> PyTree:
    """The parameters of one encoder where this process alone can compute with them."""
    chosen = {kind: frozen[kind]}
    if jax.process_count() == 1:
        return chosen
    device = jax.local_devices()[0]
    return jax.tree.map(lambda x: jax.device_put(sharding.all_gather_to_host(x), device), chosen)


def _text_embedder(
    conditioner: Conditioner, frozen: PyTree, tokenizer: Tokenizer, *, num_tokens: int
) -> TextEmbedder:
    """Unit vectors of sentences, by the pooled embedding of the run's text encoder."""
    embed = jax.jit(lambda *args: conditioner.embed_text(*args).pooled)

    def embed_text(texts: list[str]) -> Float[np.ndarray, "b d"]:
        rows = []
        for start in range(0, len(texts), BATCH_SIZE):
            chunk = [tokenizer(text, num_tokens) for text in texts[start : start + BATCH_SIZE]]
            # Padded to one shape, so that the encoder is compiled once.
            chunk += [chunk[-1]] * (BATCH_SIZE - len(chunk))
            tokens = np.stack([row.tokens for row in chunk])
            mask = np.stack([row.text_mask for row in chunk])
            rows.append(unit_vectors(np.asarray(embed(frozen, tokens, mask))))
        return np.concatenate(rows)[: len(texts)]

    return embed_text


def _face_embedder(conditioner: Conditioner, frozen: PyTree) -> FaceEmbedder:
    """Unit vectors of faces, by the run's identity encoder."""
    identify = jax.jit(conditioner.identify)
    return lambda images: np.asarray(identify(frozen, images))
