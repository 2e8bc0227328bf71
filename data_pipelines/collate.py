"""Rows -> `Batch`: pads and stacks examples, tokenizes prompts, withholds conditions."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from data_pipelines import tasks, transforms
from data_pipelines.sources import Source
from data_pipelines.tasks import TASKS, Example
from data_pipelines.tokenizer import Tokenizer
from univg_jax.batch import Batch, BatchShape
from univg_jax.errors import UserError

# The conditions that a row goes without. Training withholds some at random (condition dropout), and
# guidance withholds them on purpose, to learn what the model does without them.
Drop = Literal["none", "text", "image", "both"]

_TEXT_FIELDS = ("tokens", "text_mask", "identity_slot", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One example on its way into a batch."""

    example: Example
    task: str
    sample_id: int
    drop: Drop = "none"
    valid: bool = True  # False = padding
    origin: tuple[Source, int] | None = None  # the source of its record, and the index in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches of one shape from rows of any tasks.

    Absent sources and faces become zeros, absent masks ones. `sample_id` is taken modulo 2^32.
    """

    tokenizer: Tokenizer
    shape: BatchShape

    def __call__(self, rows: Sequence[Row]) -> Batch:
        height, width, face = self.shape.height, self.shape.width, self.shape.face
        no_source = np.zeros((height, width, 3), np.uint8)
        all_ones = np.ones((height, width, 1), np.uint8)
        no_face = np.zeros((face, face, 3), np.uint8)
        names = list(TASKS)
        examples = [row.example for row in rows]
        faces = [
            no_face if e.face is None else transforms.resize_image(e.face, height=face, width=face)
            for e in examples
        ]
        batch = Batch(
            **self._texts([(row.task, row.example.text) for row in rows]),
            target=np.stack([e.target for e in examples]),
            source=np.stack([no_source if e.source is None else e.source for e in examples]),
            mask=np.stack([all_ones if e.mask is None else e.mask for e in examples]),
            face=np.stack(faces),
            has_source=np.array([e.source is not None for e in examples]),
            has_face=np.array([e.face is not None for e in examples]),
            task=np.array([names.index(row.task) for row in rows], np.int32),
            sample_id=np.array([row.sample_id % 2**32 for row in rows], np.uint32),
            valid=np.array([row.valid for row in rows]),
        )
        return self.drop_conditions(batch, [row.drop for row in rows])

    def spec(self, batch_size: int) -> Batch:
        """The abstract batch (shapes and dtypes, no data) of `batch_size` rows.

        It has `text` where the tokenizer returns the embeddings of prompts with their tokens.

        Raises UserError if the tokenizer cannot make `shape.num_tokens` tokens.
        """
        text = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype),
            self._any_tag()["text"],
        )
        # Inside eval_shape, because `Batch` takes arrays only, not their shapes.
        return jax.eval_shape(
            lambda batch, text: dataclasses.replace(batch, text=text),
            self.shape.spec(batch_size),
            text,
        )

    def drop_conditions(self, batch: Batch, drop: Drop | Sequence[Drop]) -> Batch:
        """`batch` with conditions withheld: the same for all rows, or one choice per row.

        A row without its text keeps its task's tag. It also loses its face, because the place of
        the face was in the text. A row without its image has no source, and a mask of ones.
        """
        drops = np.array([drop] * batch.size if isinstance(drop, str) else drop)
        no_text, no_image = np.isin(drops, ("text", "both")), np.isin(drops, ("image", "both"))
        rows, names = np.flatnonzero(no_text), list(TASKS)
        texts = {name: getattr(batch, name) for name in _TEXT_FIELDS}
        if len(rows):
            texts = jax.tree.map(np.array, texts)
            tags = self._texts([(names[task], "") for task in batch.task[rows]])
            for array, tag in zip(jax.tree.leaves(texts), jax.tree.leaves(tags), strict=True):
                array[rows] = tag
        has_image = (~no_image)[:, None, None, None]
        return dataclasses.replace(
            batch,
            **texts,
            face=np.where(no_text[:, None, None, None], np.uint8(0), batch.face),
            has_face=batch.has_face & ~no_text,
            source=np.where(has_image, batch.source, np.uint8(0)),
            mask=np.where(has_image, batch.mask, np.uint8(1)),
            has_source=batch.has_source & ~no_image,
        )

    def _texts(self, rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The fields _TEXT_FIELDS of a batch with these (task, text)."""
        texts = [
            self.tokenizer(tasks.prompt(task, text), self.shape.num_tokens) for task, text in rows
        ]
        # Without a cache every embedding is None, which is a tree without leaves.
        embeddings = [text.embedding for text in texts]
        return dict(
            tokens=np.stack([text.tokens for text in texts]),
            text_mask=np.stack([text.text_mask for text in texts]),
            identity_slot=np.stack([text.identity_slot for text in texts]),
            text=jax.tree.map(lambda *rows: np.concatenate(rows), *embeddings),
        )

    def _any_tag(self) -> dict[str, Any]:
        """The fields of a batch with some task's tag alone."""
        # A cache of embeddings has the tags of its own config's tasks only, so the first may be
        # missing there.
        *others, last = TASKS
        for task in others:
            with contextlib.suppress(UserError):
                return self._texts([(task, "")])
        return self._texts([(last, "")])
