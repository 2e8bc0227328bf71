"""Examples -> rows -> `Batch`: tokenizes prompts, pads and stacks, withholds conditions."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, UInt8

from data_pipelines import tasks, transforms
from data_pipelines.cache import CachedLatents, RowLatents
from data_pipelines.sources import Source
from data_pipelines.tasks import TASKS, Example
from data_pipelines.tokenizer import TokenizedText, Tokenizer
from univg_jax.batch import Batch, BatchShape, Latents
from univg_jax.errors import UserError

# The conditions that a row goes without. Training withholds some at random (condition dropout), and
# guidance withholds them on purpose, to learn what the model does without them.
Drop = Literal["none", "text", "image", "both"]

_TEXT_FIELDS = ("tokens", "text_mask", "identity_slot", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One example on its way into a batch, of the batch's shape (`Collator.row`)."""

    example: Example
    prompt: TokenizedText  # tag and text
    task: str
    sample_id: int
    drop: Drop = "none"
    valid: bool = True  # False = padding
    origin: tuple[Source, int] | None = None  # the source of its record, and the index in it
    # What became of the record whose turn it was, the first time: see `Stream.counters`.
    events: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes rows and batches of one shape from examples of any tasks.

    Absent sources and faces become zeros, absent masks and loss masks ones. `sample_id` is taken
    modulo 2^32. `caption_weights` are what `tasks.Task.example` takes.
    """

    tokenizer: Tokenizer
    shape: BatchShape
    caption_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    latents: CachedLatents | None = None

    def resized(self, height: int, width: int) -> "Collator":
        """That of batches with pictures of another size."""
        return dataclasses.replace(self, shape=self.shape.resized(height, width))

    def row(self, example: Example, *, task: str, sample_id: int, **options: Any) -> Row:
        """An example as a row: its prompt tokenized, its face resized, its shapes checked.

        All that can fail for one example fails here, so that no example ends the batch of others.
        `options` are further fields of `Row`. Raises UserError.
        """
        height, width, face = self.shape.height, self.shape.width, self.shape.face
        if example.face is not None:
            resized = transforms.resize_image(example.face, height=face, width=face)
            example = dataclasses.replace(example, face=resized)
        picture, plane = (height, width, 3), (height, width, 1)
        shapes = dict(target=picture, source=picture, mask=plane, loss_mask=plane)
        for name, expected in {**shapes, "face": (face, face, 3)}.items():
            pixels = getattr(example, name)
            if pixels is not None and (pixels.shape != expected or pixels.dtype != np.uint8):
                raise UserError(
                    f"{name} is {pixels.dtype} {pixels.shape}, expected uint8 {expected}"
                )
        prompt = self.tokenizer(tasks.prompt(task, example.text), self.shape.num_tokens)
        return Row(example=example, prompt=prompt, task=task, sample_id=sample_id, **options)

    def __call__(self, rows: Sequence[Row]) -> Batch:
        height, width, face = self.shape.height, self.shape.width, self.shape.face
        picture, plane = (height, width, 3), (height, width, 1)
        names = list(TASKS)
        examples = [row.example for row in rows]
        has_face = np.array([e.face is not None for e in examples])
        texts = _stack([row.prompt for row in rows])
        texts["identity_slot"] &= has_face[:, None]
        batch = Batch(
            **texts,
            target=np.stack([e.target for e in examples]),
            source=_filled([e.source for e in examples], picture, 0),
            mask=_filled([e.mask for e in examples], plane, 1),
            loss_mask=_filled([e.loss_mask for e in examples], plane, 1),
            face=_filled([e.face for e in examples], (face, face, 3), 0),
            has_source=np.array([e.source is not None for e in examples]),
            has_face=has_face,
            task=np.array([names.index(row.task) for row in rows], np.int32),
            sample_id=np.array([row.sample_id % 2**32 for row in rows], np.uint32),
            valid=np.array([row.valid for row in rows]),
            latents=self._latents(rows),
        )
        return self.drop_conditions(batch, [row.drop for row in rows])

    def _latents(self, rows: Sequence[Row]) -> Latents | None:
        """The latents of rows; None without a cache."""
        if self.latents is None:
            return None
        found = []
        for row in rows:
            record = f"{row.origin[0].name}[{row.origin[1]}]" if row.origin else "a picture"
            where = f"{record} for task {row.task!r}, sample {row.sample_id}"
            found.append(self.latents.of(row.example, task=row.task, drop=row.drop, where=where))
        return self.latents.stack(found, height=self.shape.height, width=self.shape.width)

    def spec(self, batch_size: int) -> Batch:
        """The abstract batch (shapes and dtypes, no data) of `batch_size` rows.

        It has `text` where the tokenizer returns the embeddings of prompts with their tokens, and
        `latents` where the collator has them.

        Raises UserError if the tokenizer cannot make `shape.num_tokens` tokens.
        """

        def spec(example: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), example
            )

        latents = None
        if self.latents is not None:
            blank = RowLatents(target=None, source=None, has_source=False)
            size = dict(height=self.shape.height, width=self.shape.width)
            latents = spec(self.latents.stack([blank], **size))
        # Inside eval_shape, because `Batch` takes arrays only, not their shapes.
        return jax.eval_shape(
            lambda batch, text, latents: dataclasses.replace(batch, text=text, latents=latents),
            self.shape.spec(batch_size),
            spec(self._any_tag().embedding),
            latents,
        )

    def drop_conditions(
        self, batch: Batch, drop: Drop | Sequence[Drop], *, instead: Sequence[str] = ()
    ) -> Batch:
        """`batch` with conditions withheld: the same for all rows, or one choice per row.

        A row without its text keeps its task's tag, and has the text of `instead` behind it, which
        has one for each row or is empty. It also loses its face, because the place of the face was
        in the text. A row without its image has no source, and a mask of ones.
        """
        drops = np.array([drop] * batch.size if isinstance(drop, str) else drop)
        no_text, no_image = np.isin(drops, ("text", "both")), np.isin(drops, ("image", "both"))
        rows, names = np.flatnonzero(no_text), list(TASKS)
        texts = {name: getattr(batch, name) for name in _TEXT_FIELDS}
        if len(rows):
            texts = jax.tree.map(np.array, texts)
            tags = _stack(
                [self._tag(names[batch.task[k]], instead[k] if instead else "") for k in rows]
            )
            tags["identity_slot"] &= False  # there is no face
            for array, tag in zip(jax.tree.leaves(texts), jax.tree.leaves(tags), strict=True):
                array[rows] = tag
        return dataclasses.replace(
            batch,
            **texts,
            face=_withheld(batch.face, no_text, 0),
            has_face=batch.has_face & ~no_text,
            source=_withheld(batch.source, no_image, 0),
            mask=_withheld(batch.mask, no_image, 1),
            has_source=batch.has_source & ~no_image,
        )

    def _tag(self, task: str, instead: str = "") -> TokenizedText:
        """The prompt of a row without its text, or with another `instead`."""
        return self.tokenizer(tasks.prompt(task, instead), self.shape.num_tokens)

    def _any_tag(self) -> TokenizedText:
        """Some task's tag."""
        # A cache of embeddings has the tags of its own config's tasks only, so the first may be
        # missing there.
        *others, last = TASKS
        for task in others:
            with contextlib.suppress(UserError):
                return self._tag(task)
        return self._tag(last)


def _filled(
    rows: Sequence[np.ndarray | None], shape: tuple[int, ...], blank: int
) -> UInt8[np.ndarray, "b ..."]:
    """The rows in one array, where what is None is `blank`."""
    # Most rows of text-to-image are blank: memory of zeros is not touched before it is read.
    size = (len(rows), *shape)
    stacked = np.full(size, blank, np.uint8) if blank else np.zeros(size, np.uint8)
    for k, row in enumerate(rows):
        if row is not None:
            stacked[k] = row
    return stacked


def _withheld(
    pixels: UInt8[Any, "b ..."], rows: Bool[np.ndarray, " b"], blank: int
) -> UInt8[Any, "b ..."]:
    """The pixels, of these rows `blank`."""
    if rows.any():
        pixels = np.array(pixels)
        pixels[rows] = blank
    return pixels


def _stack(prompts: Sequence[TokenizedText]) -> dict[str, Any]:
    """The fields _TEXT_FIELDS of a batch with these prompts."""
    # Without a cache every embedding is None, which is a tree without leaves.
    embeddings = [prompt.embedding for prompt in prompts]
    return dict(
        tokens=np.stack([prompt.tokens for prompt in prompts]),
        text_mask=np.stack([prompt.text_mask for prompt in prompts]),
        identity_slot=np.stack([prompt.identity_slot for prompt in prompts]),
        text=jax.tree.map(lambda *rows: np.concatenate(rows), *embeddings),
    )
