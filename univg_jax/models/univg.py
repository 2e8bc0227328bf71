"""UniVG: an MM-DiT with conditions as channels and an identity at the `<p>` token."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, PRNGKeyArray, PyTree

from univg_jax import sharding
from univg_jax.batch import Array, Conditions
from univg_jax.models.layers import MLP, gelu_tanh
from univg_jax.models.mmdit import MMDiT
from univg_jax.trees import map_named


class UniVG(nn.Module):
    """v = MMDiT([x_t, image latent, mask], text, pooled, t), with text[`<p>`] = projector(face).

    The channel concatenation and the replacement are UniVG's (arXiv 2503.12652): the sequence
    never grows, unless the backbone reads the source as tokens (`MMDiT.source`). A row without a
    face keeps its text. Replacing after the text encoder, by a 2-layer MLP, is our choice. The
    projector exists only where `face_dim` is set, so the stages before identity have no such
    parameters.
    """

    backbone: MMDiT
    face_dim: int | None = None

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], conditions: Conditions
    ) -> Float[Array, "b h w c"]:
        """The velocity at noisy latents `x_t` and times `t` in [0, 1].

        Raises ValueError for face embeddings that are not `face_dim` wide.
        """
        text_emb = conditions.text_emb
        if self.face_dim is not None:
            if conditions.face_emb.shape[-1] != self.face_dim:
                raise ValueError(
                    f"face embeddings are {conditions.face_emb.shape[-1]} wide, "
                    f"face_dim={self.face_dim}"
                )
            dim = self.backbone.text_dim
            dtypes = dict(dtype=self.backbone.dtype, sum_dtype=self.backbone.sum_dtype)
            projector = MLP(dim, dim, gelu_tanh, **dtypes, name="identity_projector")
            face = projector(conditions.face_emb)
            # Without a face its embedding is zero, and the text stays what it says.
            has_face = (conditions.face_emb != 0).any(axis=-1)
            slot = conditions.identity_slot & has_face[:, None]
            text_emb = jnp.where(slot[..., None], face[:, None].astype(text_emb.dtype), text_emb)
        latents = jnp.concatenate([x_t, conditions.cond_latents, conditions.mask], axis=-1)
        return self.backbone(latents, text_emb, conditions.pooled_emb, t, conditions.text_mask)

    def cast_kernels(self, params: PyTree) -> PyTree:
        """Inside jit: parameters with kernels in the dtype of their products.

        The model computes the same of them. A step of several passes casts once for all.
        """
        dtype = sharding.weight_dtype(self.backbone.dtype, self.backbone.sum_dtype)
        return map_named(
            lambda name, x: x.astype(dtype) if name.split("/")[-1] == "kernel" else x, params
        )

    def init_params(
        self, key: PRNGKeyArray, latents: jax.ShapeDtypeStruct, conditions: Conditions
    ) -> PyTree:
        """Fresh parameters for latents and conditions of these shapes and any number of rows."""
        # One row is enough: parameters do not depend on how many there are.
        latents, conditions = jax.tree.map(
            lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), (latents, conditions)
        )
        return self.init(key, latents, jnp.zeros(1), conditions)["params"]
