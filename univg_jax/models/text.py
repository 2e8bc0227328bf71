"""Text encoders: tokens -> states for the model to attend to, and one vector of the prompt."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Int32

from univg_jax.batch import Array, Text
from univg_jax.errors import UserError
from univg_jax.models.clip import CLIPText
from univg_jax.models.minilm import MiniLM, pool
from univg_jax.models.t5 import T5Encoder


class SentenceText(nn.Module):
    """One encoder of token states.

    emb = the states, 0 at the padding; pooled = their normalized mean (`minilm.pool`).
    """

    encoder: MiniLM | T5Encoder

    @property
    def text_dim(self) -> int:
        return self.encoder.hidden_dim

    @property
    def pooled_dim(self) -> int:
        return self.encoder.hidden_dim

    def __call__(self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]) -> Text:
        states = self.encoder(tokens, text_mask)
        emb = jnp.where(text_mask[..., None], states, 0)
        return Text(emb=emb, mask=jnp.asarray(text_mask), pooled=pool(emb, text_mask))


class ClipText(nn.Module):
    """One CLIP text tower.

    emb = the states before its last block, 0 at the padding; pooled = its projected embedding.
    """

    encoder: CLIPText

    @property
    def text_dim(self) -> int:
        return self.encoder.hidden_dim

    @property
    def pooled_dim(self) -> int:
        return self.encoder.projection_dim or self.encoder.hidden_dim

    def __call__(self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]) -> Text:
        out = self.encoder(tokens, text_mask)
        emb = jnp.where(text_mask[..., None], out.penultimate, 0)
        pooled = out.pooled if out.projected is None else out.projected
        return Text(emb=emb, mask=jnp.asarray(text_mask), pooled=pooled)


class SD3Text(nn.Module):
    """Stable Diffusion 3's three encoders, numerically diffusers' pipeline.

        emb    = [penultimate(CLIP-L), penultimate(bigG), 0...]    at the first 77 tokens
                 T5                                                at the others
        pooled = [projected(CLIP-L), projected(bigG)]

    arXiv 2403.03206, figure 2 and section 4. A row of tokens is made by
    `data_pipelines.tokenizer.SD3Tokenizer`. SD3 was trained without masks: every encoder and the
    model attend to the padding too. Raises UserError if the widths do not fit together.
    """

    clip_l: CLIPText
    clip_g: CLIPText
    t5: T5Encoder | None
    text_dim: int  # T5's width, to which the CLIPs' are padded

    @property
    def pooled_dim(self) -> int:
        return self.clip_l.projection_dim + self.clip_g.projection_dim

    def __call__(self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]) -> Text:
        n = self.clip_l.max_tokens
        ids, real = tokens[:, :n], text_mask[:, :n]
        # Rows are padded as CLIP-L wants it, with the end token; bigG was trained with id 0.
        low, big = self.clip_l(ids), self.clip_g(jnp.where(real, ids, 0))
        emb = jnp.concatenate([low.penultimate, big.penultimate], axis=-1)
        missing = self.text_dim - emb.shape[-1]
        if missing < 0 or (self.t5 is not None and self.t5.hidden_dim != self.text_dim):
            raise UserError(
                f"text_dim={self.text_dim} must be T5's width and hold both CLIPs' "
                f"({emb.shape[-1]} together)"
            )
        emb = jnp.pad(emb, ((0, 0), (0, 0), (0, missing)))
        if self.t5 is not None:
            emb = jnp.concatenate([emb, self.t5(tokens[:, n:])], axis=1)
        return Text(
            emb=emb,
            mask=jnp.ones(emb.shape[:2], bool),
            pooled=jnp.concatenate([low.projected, big.projected], axis=-1),
        )
