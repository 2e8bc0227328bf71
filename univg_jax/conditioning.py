"""Frozen encoders: a `Batch` -> the target latents x0 and the model's `Conditions`.

    x0                   = codec(target)
    cond_latents         = codec(source), zero without a source; both may come from a cache
    mask                 = maximum of the pixels' mask over each latent cell
    text_emb, pooled_emb = text(tokens)
    face_emb             = identity(face), zero without a face

`Conditioner` holds modules only. Their parameters travel beside it as one pytree `frozen`,
`{'text': ..., 'codec': ..., 'identity': ...}`, so that its methods are pure functions for use
inside jit. `univg_jax.encoders` makes both. The last may be missing where no batch has a face. When
batches carry text embeddings from a cache, the text encoder's parameters may be missing. Where they
carry latents, only the pictures that are marked missing are encoded.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32, PyTree, UInt8

from univg_jax import sharding
from univg_jax.batch import Array, Batch, Conditions, Text
from univg_jax.errors import UserError
from univg_jax.images import to_float
from univg_jax.models.codec import KLCodec, PatchCodec
from univg_jax.models.identity import ClipIdentity, IdentityEncoder
from univg_jax.models.text import ClipText, SD3Text, SentenceText

Frozen = Mapping[str, PyTree]  # 'text', 'codec', 'identity' -> the parameters of that encoder
TextEncoder = SentenceText | ClipText | SD3Text
Codec = PatchCodec | KLCodec
Images = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]  # in [0, 255], or in [-1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioner:
    """The modules of the frozen encoders.

    Every method is a pure function of their parameters `frozen`.
    """

    text: TextEncoder
    codec: Codec
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
        return encode_images(self.codec, frozen["codec"], images)

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
        if (latents := batch.latents) is None:
            return self.encode(frozen, batch.target)
        return self._completed(frozen, latents.target, latents.target_missing, batch.target)

    def source_latents(self, frozen: Frozen, batch: Batch) -> Float[Array, "b h w c"]:
        """The latents of the sources; those of rows without a source mean nothing."""
        if (latents := batch.latents) is None:
            return self.encode(frozen, batch.source)
        missing = latents.source_missing
        missing = None if missing is None else missing & batch.has_source
        return self._completed(frozen, latents.source, missing, batch.source)

    def _completed(
        self,
        frozen: Frozen,
        latents: Float[Array, "b h2 w2 c"],
        missing: Bool[Array, " b"] | None,
        images: Images,
    ) -> Float[Array, "b h2 w2 c"]:
        """`latents`, with those of the images that are `missing` encoded."""
        if missing is None:
            return jnp.asarray(latents)
        missing = jnp.asarray(missing)
        encoded = _encode_some(lambda rows: self.encode(frozen, rows), images, missing)
        return jnp.where(missing[:, None, None, None], encoded, latents)

    def conditions(self, frozen: Frozen, batch: Batch) -> Conditions:
        """All that the model is conditioned on."""
        b, h, w, _ = batch.mask.shape
        f = self.downsampling
        if batch.text is None:
            text = self.embed_text(frozen, batch.tokens, batch.text_mask)
        else:
            text = _float32(batch.text)
        if self.identity is None or "identity" not in frozen:
            face_emb = jnp.zeros((b, self.face_dim or 0))
        else:
            face_emb = jnp.where(batch.has_face[:, None], self.identify(frozen, batch.face), 0)
        # "No source" is a zero latent, which differs from the latent of a black image.
        has_source = batch.has_source[:, None, None, None]
        cond_latents = jnp.where(has_source, self.source_latents(frozen, batch), 0)
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


def encode_images(codec: Codec, params: PyTree, images: Images) -> Float[Array, "b h2 w2 c"]:
    """Images -> latents of about unit variance, by a codec's module and its parameters."""
    images = to_float(jnp.asarray(images))
    return jax.lax.stop_gradient(codec.apply({"params": params}, images, method="encode"))


def _encode_some(
    encode: Callable[[Images], Float[Array, "n h2 w2 c"]],
    images: Images,
    chosen: Bool[Array, " b"],
) -> Float[Array, "b h2 w2 c"]:
    """The latents of the chosen images; those of others may be zero.

    Rounds encode one row of every device, those with chosen rows first. A round without any does
    nothing: the encoder runs as often as the device with most chosen rows needs it, and holds the
    activations of one row.
    """
    b = len(images)
    n = sharding.num_rows_at_once(b)
    images = sharding.constrain_rows(jnp.asarray(images).reshape(n, b // n, *images.shape[1:]))
    chosen = chosen.reshape(n, b // n)
    order = jnp.argsort(~chosen, axis=1, stable=True)
    take = jax.vmap(lambda rows, index: rows[index])

    def one_round(_: None, index: Int32[Array, " n"]) -> tuple[None, Float[Array, "n h2 w2 c"]]:
        rows = sharding.constrain_rows(take(images, index))
        shape = jax.eval_shape(encode, rows)
        latents = jax.lax.cond(
            take(chosen, index).any(), encode, lambda _: jnp.zeros(shape.shape, shape.dtype), rows
        )
        return None, sharding.constrain_rows(latents)

    _, latents = jax.lax.scan(one_round, None, order.T)
    latents = take(latents.swapaxes(0, 1), jnp.argsort(order, axis=1))
    return latents.reshape(b, *latents.shape[2:])


def _float32(text: Text) -> Text:
    emb, pooled = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (text.emb, text.pooled)
    )
    return Text(emb=emb, mask=jnp.asarray(text.mask), pooled=pooled)
