"""Frozen encoders: a `Batch` -> the model's `Conditions` and the target latents x0.

    x0 = codec(target);  cond_latents = codec(source), 0 without a source;  mask = max over each
    latent cell text_emb, pooled_emb = text(tokens);  face_emb = identity(face), 0 without a face

`Conditioner` holds modules only; their parameters travel beside it as one pytree, `{'text': ...,
'codec': ..., 'identity': ...}` (the last only if there is such an encoder), so that its methods are
pure functions for use inside jit. `univg_jax.encoders` obtains them. Where batches bring their
text's embeddings, the text encoder's parameters may be left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, UInt8

from univg_jax.batch import Array, Batch, Conditions, Text
from univg_jax.models.codec import KLCodec, PatchCodec
from univg_jax.models.identity import ClipIdentity, IdentityEncoder
from univg_jax.models.text import ClipText, SD3Text, SentenceText

Frozen = Mapping[str, Any]  # part -> the parameters of its encoder
Images = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]  # in [0, 255], or in [-1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioner:
    """The modules of the frozen encoders; every method is a pure function of their parameters
    `frozen`.
    """

    text: SentenceText | ClipText | SD3Text
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
        """Width of `face_emb`; None (and then a `face_emb` of width 0) without an identity encoder."""
        return None if self.identity is None else self.identity.dim

    def encode(self, frozen: Frozen, images: Images) -> Float[Array, "b h2 w2 c"]:
        """Images -> latents of about unit variance. Raises ValueError if a side is no multiple of
        `downsampling`.
        """
        return jax.lax.stop_gradient(
            self.codec.apply({"params": frozen["codec"]}, _to_float(images), method="encode")
        )

    def decode(self, frozen: Frozen, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Latents -> images, clipped to [-1, 1]."""
        return jnp.clip(
            self.codec.apply({"params": frozen["codec"]}, latents, method="decode"), -1, 1
        )

    def identify(self, frozen: Frozen, faces: Images) -> Float[Array, "b e"]:
        """Portraits of any size -> unit vectors of who they show; their dot product is the
        similarity.
        """
        if self.identity is None:
            raise ValueError(
                "this run has no identity encoder: set conditioning.identity, e.g. dict(kind='lda')"
            )
        return jax.lax.stop_gradient(
            self.identity.apply({"params": frozen["identity"]}, _to_float(faces))
        )

    def embed_text(
        self, frozen: Frozen, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]
    ) -> Text:
        """Embeddings of each token and of the whole prompt, float32."""
        return _float32(
            self.text.apply({"params": frozen["text"]}, jnp.asarray(tokens), jnp.asarray(text_mask))
        )

    def target_latents(self, frozen: Frozen, batch: Batch) -> Float[Array, "b h w c"]:
        """x0: what the model learns to generate."""
        return self.encode(frozen, batch.target)

    def conditions(self, frozen: Frozen, batch: Batch) -> Conditions:
        """All that the model is conditioned on."""
        b, h, w, _ = batch.mask.shape
        f = self.downsampling
        if self.identity is None:
            face_emb = jnp.zeros((b, 0))
        else:
            face_emb = jnp.where(batch.has_face[:, None], self.identify(frozen, batch.face), 0)
        text = (
            _float32(batch.text)
            if batch.text
            else self.embed_text(frozen, batch.tokens, batch.text_mask)
        )
        return Conditions(
            # No source is a zero latent, which is not the latent of a black image.
            cond_latents=jnp.where(
                batch.has_source[:, None, None, None], self.encode(frozen, batch.source), 0
            ),
            # A cell that the hole touches is generated whole.
            mask=jnp.asarray(batch.mask)
            .reshape(b, h // f, f, w // f, f, 1)
            .max((2, 4))
            .astype(jnp.float32),
            text_emb=text.emb,
            text_mask=text.mask,
            pooled_emb=text.pooled,
            face_emb=face_emb,
            identity_slot=jnp.asarray(batch.identity_slot),
        )


def _float32(text: Text) -> Text:
    emb, pooled = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (text.emb, text.pooled)
    )
    return Text(emb=emb, mask=jnp.asarray(text.mask), pooled=pooled)


def _to_float(images: Images) -> Float[Array, "b h w 3"]:
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images
