"""Frozen encoders: a `Batch` -> the target latents x0 and the model's `Conditions`.

    x0                   = codec(target)
    cond_latents         = codec(source), zero without a source
    mask                 = maximum of the pixels' mask over each latent cell
    text_emb, pooled_emb = text(tokens)
    face_emb             = identity(face), zero without a face

`Conditioner` holds modules only. Their parameters travel beside it as one pytree `frozen`,
`{'text': ..., 'codec': ..., 'identity': ...}` (the last only if there is such an encoder), so that
its methods are pure functions for use inside jit. `univg_jax.encoders` makes both. When batches
carry text embeddings from a cache, the text encoder's parameters may be missing.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, PyTree, UInt8

from univg_jax.batch import Array, Batch, Conditions, Text
from univg_jax.errors import UserError
from univg_jax.images import to_float
from univg_jax.models.codec import KLCodec, PatchCodec
from univg_jax.models.identity import ClipIdentity, IdentityEncoder
from univg_jax.models.text import ClipText, SD3Text, SentenceText

Frozen = Mapping[str, PyTree]  # 'text', 'codec', 'identity' -> the parameters of that encoder
TextEncoder = SentenceText | ClipText | SD3Text
Images = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]  # in [0, 255], or in [-1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioner:
    """The modules of the frozen encoders.

    Every method is a pure function of their parameters `frozen`.
    """

    text: TextEncoder
    codec: PatchCodec | KLCodec
    identity: IdentityEncoder | ClipIdentity | None = None

    @property
    def latent_channels(self) -> int:
        return self.codec.latent_channels

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, a side."""
        return self.codec.downsampling

    @property
    def text_dim(self) -> int:
        return self.text.text_dim

    @property
    def pooled_dim(self) -> int:
        return self.text.pooled_dim

    @property
    def face_dim(self) -> int | None:
        """Width of face embeddings; None without an identity encoder: `face_emb` is then empty."""
        return None if self.identity is None else self.identity.dim

    def encode(self, frozen: Frozen, images: Images) -> Float[Array, "b h2 w2 c"]:
        """Images -> latents of about unit variance.

        Raises UserError if a side is not a multiple of `downsampling`.
        """
        images = to_float(jnp.asarray(images))
        latents = self.codec.apply({"params": frozen["codec"]}, images, method="encode")
        return jax.lax.stop_gradient(latents)

    def decode(self, frozen: Frozen, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Latents -> images, clipped to [-1, 1]; what is not finite stays so, as NaN."""
        images = self.codec.apply({"params": frozen["codec"]}, latents, method="decode")
        # `clip` alone would make white of an infinity.
        return jnp.where(jnp.isfinite(images), jnp.clip(images, -1, 1), jnp.nan)

    def identify(self, frozen: Frozen, faces: Images) -> Float[Array, "b e"]:
        """Portraits of any size -> unit vectors; their dot product measures the likeness.

        Raises UserError without an identity encoder.
        """
        if self.identity is None:
            raise UserError(
                "this run has no identity encoder: set conditioning.identity, e.g. dict(kind='lda')"
            )
        faces = to_float(jnp.asarray(faces))
        return jax.lax.stop_gradient(self.identity.apply({"params": frozen["identity"]}, faces))

    def embed_text(
        self, frozen: Frozen, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]
    ) -> Text:
        """Embeddings of each token and of the whole prompt, float32."""
        tokens, text_mask = jnp.asarray(tokens), jnp.asarray(text_mask)
        return _float32(self.text.apply({"params": frozen["text"]}, tokens, text_mask))

    def target_latents(self, frozen: Frozen, batch: Batch) -> Float[Array, "b h w c"]:
        """x0: what the model learns to generate."""
        return self.encode(frozen, batch.target)

    def conditions(self, frozen: Frozen, batch: Batch) -> Conditions:
        """All that the model is conditioned on."""
        b, h, w, _ = batch.mask.shape
        f = self.downsampling
        if batch.text is None:
            text = self.embed_text(frozen, batch.tokens, batch.text_mask)
        else:
            text = _float32(batch.text)
        if self.identity is None:
            face_emb = jnp.zeros((b, 0))
        else:
            face_emb = jnp.where(batch.has_face[:, None], self.identify(frozen, batch.face), 0)
        # "No source" is a zero latent, which differs from the latent of a black image.
        has_source = batch.has_source[:, None, None, None]
        cond_latents = jnp.where(has_source, self.encode(frozen, batch.source), 0)
        # The maximum: a cell with a single pixel to generate is generated whole.
        cells = jnp.asarray(batch.mask).reshape(b, h // f, f, w // f, f, 1)
        return Conditions(
            cond_latents=cond_latents,
            mask=cells.max((2, 4)).astype(jnp.float32),
            text_emb=text.emb,
            text_mask=text.mask,
            pooled_emb=text.pooled,
            face_emb=face_emb,
            identity_slot=jnp.asarray(batch.identity_slot),
        )

    def encoded_spec(self, frozen: Frozen, batch: Batch) -> tuple[jax.ShapeDtypeStruct, Conditions]:
        """Shapes and dtypes of (`target_latents`, `conditions`); nothing is computed.

        The leaves of `frozen` and `batch` may be arrays or `jax.ShapeDtypeStruct`s, such as those
        of `encoders.abstract` and `BatchShape.spec`.
        """

        def encode(frozen: Frozen, batch: Batch) -> tuple[Array, Conditions]:
            return self.target_latents(frozen, batch), self.conditions(frozen, batch)

        return jax.eval_shape(encode, frozen, batch)


def _float32(text: Text) -> Text:
    emb, pooled = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (text.emb, text.pooled)
    )
    return Text(emb=emb, mask=jnp.asarray(text.mask), pooled=pooled)
