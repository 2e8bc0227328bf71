"""Rows become batches of one shape, with conditions withheld where asked."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.collate import Collator, Row
from data_pipelines.tasks import TASKS, Example
from data_pipelines.tokenizer import load_tokenizer
from tests.data_pipelines.toy import (
    NUM_TOKENS,
    SCENES,
    SIZE,
    assert_same,
    make_collator,
    text_of,
    tokenize,
)
from univg_jax.batch import BatchShape, Text
from univg_jax.errors import UserError

SHAPE = BatchShape(height=8, width=12, num_tokens=NUM_TOKENS, face=4)


def rows(drop: str = "none") -> list[Row]:
    """Examples of ip, each with its own hole."""
    result = []
    for sample_id, scene in zip([4, 9, 2], SCENES):
        example = TASKS["ip"].example(scene, np.random.default_rng(sample_id), SIZE)
        result.append(make_collator().row(example, task="ip", sample_id=sample_id, drop=drop))
    return result


def shapes(batch) -> object:
    return jax.tree.map(lambda x: (x.shape, x.dtype), batch)


def test_null_conditions_differ_in_nothing_else():
    full, text, image, both = (
        make_collator()(rows(drop)) for drop in ("none", "text", "image", "both")
    )
    np.testing.assert_array_equal(full.sample_id, [4, 9, 2])
    assert {text_of(t) for t in text.tokens} == {text_of(t) for t in both.tokens} == {"<ip>"}
    assert (image.mask == 1).all()
    assert not both.has_source.any()
    same = dict(tokens=full.tokens, text_mask=full.text_mask)
    assert_same(dataclasses.replace(text, **same), full)
    same = dict(source=full.source, mask=full.mask, has_source=full.has_source)
    assert_same(dataclasses.replace(image, **same), full)


def test_conditions_dropped_from_a_batch_are_those_dropped_from_its_rows():
    collator = make_collator()
    full = collator(rows())
    for drop in ("none", "text", "image", "both"):
        assert_same(collator.drop_conditions(full, drop), collator(rows(drop)))
    mixed = [dataclasses.replace(r, drop=d) for r, d in zip(rows(), ("text", "none", "both"))]
    assert_same(collator.drop_conditions(full, ["text", "none", "both"]), collator(mixed))


def test_another_text_may_stand_instead_of_one_that_is_withheld():
    collator, examples = make_collator(), rows()
    full = collator([dataclasses.replace(row, drop="none") for row in examples])
    instead = ["a cat", "", "<p> and a dog"]
    made = collator.drop_conditions(full, ["text", "both", "text"], instead=instead)
    bare = collator.drop_conditions(full, ["text", "both", "text"])
    for k, (row, text) in enumerate(zip(examples, instead, strict=True)):
        assert text_of(made.tokens[k]) == f"<{row.task}> {text}".strip()
    np.testing.assert_array_equal(made.tokens[1], bare.tokens[1])
    assert not made.identity_slot.any(), "a row without its face has no place for it"
    for name in ("face", "has_face", "source", "mask", "has_source"):
        np.testing.assert_array_equal(getattr(made, name), getattr(bare, name))


def test_absent_parts_are_blank_and_pictures_may_be_oblong():
    collator = Collator(tokenizer=tokenize, shape=SHAPE)
    face = np.full((9, 9, 3), 7, np.uint8)
    examples = [
        Example(target=np.ones((8, 12, 3), np.uint8), text="<p>", face=f) for f in (None, face)
    ]
    batch = collator([collator.row(e, task="id", sample_id=2**32 + 5) for e in examples])
    assert not batch.source.any()
    assert (batch.mask == 1).all()
    np.testing.assert_array_equal(batch.has_face, [False, True])
    np.testing.assert_array_equal(batch.identity_slot.any(axis=1), batch.has_face)
    assert not batch.face[0].any()
    assert (batch.face[1] == 7).all()
    np.testing.assert_array_equal(batch.sample_id, [5, 5])
    assert shapes(batch) == shapes(collator.spec(2))


def test_the_spec_has_the_embeddings_of_a_cache():
    """Such a cache has the tags of its own config's tasks only."""

    def cached(text: str, num_tokens: int):
        if text.startswith("<t2i>"):
            raise UserError("no embedding of the prompt")
        mask = np.ones((1, num_tokens), bool)
        emb, pooled = np.zeros((1, num_tokens, 3), np.float32), np.zeros((1, 5), np.float32)
        embedding = Text(emb=emb, mask=mask, pooled=pooled)
        return dataclasses.replace(tokenize(text, num_tokens), embedding=embedding)

    collator = Collator(tokenizer=cached, shape=make_collator().shape)
    again = [collator.row(r.example, task=r.task, sample_id=r.sample_id) for r in rows()]
    assert shapes(collator.spec(3)) == shapes(collator(again))
    assert collator.spec(3).text.emb.shape == (3, NUM_TOKENS, 3)
    assert make_collator().spec(3).text is None


def test_what_cannot_be_a_row_is_refused_alone():
    """So that a batch of rows that were made can be made."""
    wide = Example(target=np.zeros((SIZE, SIZE + 1, 3), np.uint8))
    with pytest.raises(UserError, match=r"^target is uint8 \(8, 9, 3\), expected .*8, 8, 3"):
        make_collator().row(wide, task="ip", sample_id=0)


def test_a_length_that_the_tokenizer_cannot_make_fails_in_the_spec():
    shape = dataclasses.replace(SHAPE, num_tokens=1)
    with pytest.raises(UserError, match="a prompt has 2 special tokens"):
        Collator(tokenizer=load_tokenizer(), shape=shape).spec(2)
