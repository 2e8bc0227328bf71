"""The one schema: every task is (target image, source image, mask, text, face), absent parts blank.

`Batch` is what hosts produce (numpy) and what enters the compiled step (sharded arrays).
`Conditions` is what the frozen encoders make of it: the model's inputs beside the noisy latent.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8, UInt32

from univg_jax.settings import Data

Array = jax.Array | np.ndarray


def pytree_dataclass(cls: type) -> type:
    """A frozen keyword-only dataclass whose fields are pytree children, keyed by name.

    Unflattening skips `__init__`, so that a tree of shardings or shapes may take the
    place of arrays while construction from arrays stays type-checked in tests.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = tuple(f.name for f in dataclasses.fields(cls))

    def flatten_with_keys(tree: object) -> tuple[tuple, None]:
        return tuple((jax.tree_util.GetAttrKey(n), getattr(tree, n)) for n in names), None

    def unflatten(_: None, children: Iterable) -> object:
        tree = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(tree, name, child)
        return tree

    def flatten(tree: object) -> tuple[tuple, None]:
        return tuple(getattr(tree, n) for n in names), None

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


@pytree_dataclass
class Text:
    """Prompts, embedded: `emb` of each position, `mask` where it counts, `pooled` of the whole."""

    emb: Float[Array, "b m d"]
    mask: Bool[Array, "b m"]
    pooled: Float[Array, "b p"]


@pytree_dataclass
class Latents:
    """Latents of a batch's pictures, as the codec gives them.

    Those that are marked missing are zeros, and encoded in the step. A mark that is None says that
    none are missing, and then the step need not hold the encoder: it is part of the structure, so
    that it is known when the step is compiled.
    """

    target: Float[Array, "b h w c"]
    source: Float[Array, "b h w c"]  # zeros where the batch has no source
    target_missing: Bool[Array, " b"] | None = None
    source_missing: Bool[Array, " b"] | None = None


@pytree_dataclass
class Batch:
    """Examples of any tasks, one a row. Images are RGB in [0, 255]; `mask` is 1 = generate, 0 =
    keep; `loss_mask` is 1 where the target counts in the loss.
    """

    target: UInt8[Array, "b h w 3"]
    source: UInt8[Array, "b h w 3"]  # zeros where `has_source` is False
    mask: UInt8[Array, "b h w 1"]
    loss_mask: UInt8[Array, "b h w 1"]
    tokens: Int32[Array, "b m"]
    text_mask: Bool[Array, "b m"]  # True = a real token
    identity_slot: Bool[Array, "b m"]  # True where `<p>` stands
    face: UInt8[Array, "b f f 3"]  # zeros where `has_face` is False
    has_source: Bool[Array, " b"]
    has_face: Bool[Array, " b"]
    task: Int32[Array, " b"]  # index into the task table's order
    sample_id: UInt32[Array, " b"]  # keys noise and times: position in the stream that made the row
    valid: Bool[Array, " b"]  # False = padding, counts nowhere
    text: Text | None = None  # the tokens' embeddings, if they come from a cache
    latents: Latents | None = None  # of target and source, if they come from a cache

    @property
    def size(self) -> int:
        return self.target.shape[0]


@pytree_dataclass
class Conditions:
    """What the model is conditioned on, at latent resolution. `face_emb` is zero where there is no
    face.
    """

    cond_latents: Float[Array, "b h w c"]  # zero latent where there is no source
    mask: Float[Array, "b h w 1"]
    text_emb: Float[Array, "b m d"]
    text_mask: Bool[Array, "b m"]
    pooled_emb: Float[Array, "b p"]
    face_emb: Float[Array, "b e"]
    identity_slot: Bool[Array, "b m"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Everything that the shapes of a `Batch` depend on but its number of rows."""

    height: int  # of target, source and masks, pixels
    width: int
    num_tokens: int
    face: int  # pixels a side

    @classmethod
    def of(cls, data: Data) -> "BatchShape":
        """The square of `data.resolution`: the shape of samples, and of the one bucket."""
        side = data.resolution
        return cls(height=side, width=side, num_tokens=data.num_tokens, face=data.face_resolution)

    @classmethod
    def buckets(cls, data: Data) -> tuple["BatchShape", ...]:
        """The shapes of a config's training batches: of `data.buckets`, or the one square."""
        square = cls.of(data)
        return tuple(square.resized(*size) for size in data.buckets) or (square,)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    def resized(self, height: int, width: int) -> "BatchShape":
        """The same with pictures of another size. Prompts and faces stay as they are."""
        return dataclasses.replace(self, height=height, width=width)

    def spec(self, batch_size: int) -> Batch:
        """The abstract `Batch` (shapes and dtypes, no data) of so many rows, without `text`."""
        h, w, m, f = self.height, self.width, self.num_tokens, self.face

        def blank(*shape: int, dtype: type) -> np.ndarray:
            # A broadcast view holds one element, however large its shape.
            return np.broadcast_to(np.zeros((), dtype), (batch_size, *shape))

        batch = Batch(
            target=blank(h, w, 3, dtype=np.uint8),
            source=blank(h, w, 3, dtype=np.uint8),
            mask=blank(h, w, 1, dtype=np.uint8),
            loss_mask=blank(h, w, 1, dtype=np.uint8),
            tokens=blank(m, dtype=np.int32),
            text_mask=blank(m, dtype=bool),
            identity_slot=blank(m, dtype=bool),
            face=blank(f, f, 3, dtype=np.uint8),
            has_source=blank(dtype=bool),
            has_face=blank(dtype=bool),
            task=blank(dtype=np.int32),
            sample_id=blank(dtype=np.uint32),
            valid=blank(dtype=bool),
        )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
