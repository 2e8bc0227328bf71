"""Embeddings from a cache are those of the encoder, of the right prompt, or an error."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipelines.cache import RECORD, CachedTokenizer, write_cache
from data_pipelines.mixture import Row, collate, drop_conditions
from data_pipelines.tasks import Example, prompt
from data_pipelines.tokenizer import load_tokenizer
from univg_jax.batch import Text

TOKENIZER = load_tokenizer()
NUM_TOKENS = 12
IDENTITY = dict(kind="minilm", sha256="abc", num_tokens=NUM_TOKENS)
TEXTS = [
    prompt("t2i", ""),
    *(prompt("t2i", f"{count} pigs") for count in ("one", "two", "three", "four", "five")),
]


def embed(tokens, text_mask) -> Text:
    """Something of every prompt that no other has."""
    emb = (tokens * text_mask)[..., None] * np.float32([1, -1])
    return Text(emb=emb.astype(np.float32), mask=text_mask, pooled=emb.sum(1).astype(np.float32))


@pytest.fixture
def folder(tmp_path):
    rows = [TOKENIZER(text, NUM_TOKENS) for text in TEXTS]
    # Batches and files of uneven sizes: 6 rows in files of 4, in batches of 3.
    assert (
        write_cache(
            tmp_path / "cache", rows, embed=embed, identity=IDENTITY, batch_size=3, file_rows=4
        )
        == 6
    )
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    return tmp_path / "cache"


def test_every_prompt_has_its_own_embedding(folder):
    cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    for text in TEXTS:
        plain, found = TOKENIZER(text, NUM_TOKENS), cached(text, NUM_TOKENS)
        want = embed(plain.tokens[None], plain.text_mask[None])
        for field in ("emb", "mask", "pooled"):
            np.testing.assert_array_equal(getattr(found.embedding, field), getattr(want, field))
        np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_batches_carry_them_also_where_the_text_is_dropped(folder):
    cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    blank = np.zeros((8, 8, 3), np.uint8)
    rows = [
        Row(example=Example(target=blank, text=f"{count} pigs"), task="t2i", sample_id=i, drop=drop)
        for i, (count, drop) in enumerate([("two", "none"), ("five", "text"), ("one", "image")])
    ]
    batch = collate(rows, tokenizer=cached, resolution=8, num_tokens=NUM_TOKENS, face_resolution=8)
    without = drop_conditions(batch, "both", tokenizer=cached)
    for made in (batch, without):
        want = embed(made.tokens, made.text_mask)
        np.testing.assert_array_equal(made.text.emb, want.emb)
        np.testing.assert_array_equal(made.text.pooled, want.pooled)
    assert (without.text.emb == without.text.emb[:1]).all()  # the tag's
    assert (
        collate(
            rows, tokenizer=TOKENIZER, resolution=8, num_tokens=NUM_TOKENS, face_resolution=8
        ).text
        is None
    )


def test_what_is_missing_stale_or_unfinished_is_an_error(folder, tmp_path):
    cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    with pytest.raises(ValueError, match=r"no embedding of the prompt '<t2i> six pigs'"):
        cached(prompt("t2i", "six pigs"), NUM_TOKENS)
    with pytest.raises(
        ValueError, match=r"another text encoder: sha256 is 'abc', this run's 'def'"
    ):
        CachedTokenizer(TOKENIZER, folder, identity=IDENTITY | dict(sha256="def"))
    with pytest.raises(FileExistsError, match="has a cache"):
        write_cache(folder, [], embed=embed, identity=IDENTITY)
    with pytest.raises(FileNotFoundError, match=r"no cache\.json: not a finished cache"):
        CachedTokenizer(TOKENIZER, tmp_path, identity=IDENTITY)
    part = folder / json.loads((folder / RECORD).read_text())["files"][1]
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"00001\.safetensors is not a readable part"):
        CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)


def test_a_killed_build_leaves_no_cache(tmp_path):
    def killed(tokens, text_mask):
        raise KeyboardInterrupt

    rows = [dataclasses.replace(TOKENIZER(TEXTS[0], NUM_TOKENS))]
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, rows, embed=killed, identity=IDENTITY)
    assert not (tmp_path / RECORD).exists()
