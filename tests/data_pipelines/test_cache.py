"""Embeddings from a cache are those of the encoder, of the right prompt, or an error."""

import contextlib
import dataclasses
import json
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.cache import TEXT, CachedTokenizer, text_key, text_writer
from data_pipelines.cache_files import Cache
from data_pipelines.collate import Collator
from data_pipelines.tasks import Example, prompt
from data_pipelines.tokenizer import load_tokenizer
from univg_jax.batch import BatchShape, Text
from univg_jax.errors import AlreadyExistsError, NotFoundError, UserError

TOKENIZER = load_tokenizer()
NUM_TOKENS = 12
SHAPE = BatchShape(height=8, width=8, num_tokens=NUM_TOKENS, face=8)
IDENTITY = dict(kind="minilm", sha256="abc", num_tokens=NUM_TOKENS)
TEXTS = [
    prompt("t2i", ""),
    *(prompt("t2i", f"{count} pigs") for count in ("one", "two", "three", "four", "five")),
]


def embed(tokens, text_mask) -> Text:
    """Something of every prompt that no other has."""
    emb = (tokens * text_mask)[..., None] * np.float32([1, -1])
    return Text(emb=emb.astype(np.float32), mask=text_mask, pooled=emb.sum(1).astype(np.float32))


def write_cache(folder, rows, **options) -> int:
    """The whole of a build: every row once, and the record."""
    writer = text_writer(folder, **options)
    for key, row in {text_key(row): row for row in rows}.items():
        if key not in writer.done:
            writer.add(key, row)
    writer.flush()
    return writer.finish()


def write(folder) -> None:
    """Six prompts in files of four, in batches of two."""
    rows = [TOKENIZER(text, NUM_TOKENS) for text in TEXTS]
    row_bytes = NUM_TOKENS * (2 * 4 + 1) + 2 * 4 + 16 + 4
    options = dict(embed=embed, identity=IDENTITY, batch_size=2, file_bytes=4 * row_bytes)
    assert write_cache(folder, rows, **options) == len(TEXTS)
    assert len(list(folder.glob("*.safetensors"))) == 2


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "cache")
    return tmp_path / "cache"


def test_every_prompt_has_its_own_embedding(folder):
    cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    for text in TEXTS:
        plain, found = TOKENIZER(text, NUM_TOKENS), cached(text, NUM_TOKENS)
        want = embed(plain.tokens[None], plain.text_mask[None])
        for field in ("emb", "mask", "pooled"):
            np.testing.assert_array_equal(getattr(found.embedding, field), getattr(want, field))
        np.testing.assert_array_equal(found.tokens, plain.tokens)


@given(keys=st.sets(st.lists(st.sampled_from([0, 1, 255]), min_size=16, max_size=16).map(bytes)))
def test_a_key_is_any_bytes_also_such_as_end_in_zeros(keys):
    """One hash in 256 does, so every larger cache has some."""
    rows = {key: TOKENIZER(f"{number} pigs", NUM_TOKENS) for number, key in enumerate(keys)}
    with tempfile.TemporaryDirectory() as folder:
        writer = text_writer(folder, embed=embed, identity=IDENTITY)
        for key, row in rows.items():
            writer.add(key, row)
        writer.flush()
        assert writer.finish() == len(keys)
        cache = Cache(folder, TEXT)
        for key, row in rows.items():
            emb, _, _ = cache.find(key)
            np.testing.assert_array_equal(emb, embed(row.tokens[None], row.text_mask[None]).emb)
        for absent in ({bytes(16), b"\1" + bytes(15), b"\xff" * 16}) - keys:
            assert cache.find(absent) is None


def test_batches_carry_them_also_where_the_text_is_dropped(folder):
    cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    blank = np.zeros((8, 8, 3), np.uint8)

    def make_batch(collator: Collator):
        given = [("two", "none"), ("five", "text"), ("one", "image")]
        return collator(
            [
                collator.row(
                    Example(target=blank, text=f"{n} pigs"), task="t2i", sample_id=i, drop=drop
                )
                for i, (n, drop) in enumerate(given)
            ]
        )

    collator = Collator(tokenizer=cached, shape=SHAPE)
    batch = make_batch(collator)
    without = collator.drop_conditions(batch, "both")
    for made in (batch, without):
        want = embed(made.tokens, made.text_mask)
        np.testing.assert_array_equal(made.text.emb, want.emb)
        np.testing.assert_array_equal(made.text.pooled, want.pooled)
    assert (without.text.emb == without.text.emb[:1]).all()  # the tag's
    assert make_batch(Collator(tokenizer=TOKENIZER, shape=SHAPE)).text is None


def test_what_is_missing_stale_or_unfinished_is_an_error(folder, tmp_path):
    cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    with pytest.raises(UserError, match=r"no embedding of the prompt '<t2i> six pigs'"):
        cached(prompt("t2i", "six pigs"), NUM_TOKENS)
    with pytest.raises(
        ValueError, match=r"another text encoder: sha256 is 'abc', this run's 'def'"
    ):
        CachedTokenizer(TOKENIZER, folder, identity=IDENTITY | dict(sha256="def"))
    with pytest.raises(AlreadyExistsError, match="has a cache"):
        write_cache(folder, [], embed=embed, identity=IDENTITY)
    with pytest.raises(NotFoundError, match=r"no cache\.json: not a finished cache"):
        CachedTokenizer(TOKENIZER, tmp_path, identity=IDENTITY)
    part = folder / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"00001\.safetensors is not a readable part"):
        CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
    record = (folder / TEXT.record).read_text()
    for damaged, message in {
        record[:40]: "is not JSON",
        "[]": "is not a JSON object",
        "{}": "is damaged",
        record.replace("abc", "abd"): "is damaged",
        json.dumps(
            dict(identity=IDENTITY, files=["00000.safetensors"])
        ): "no checksums: an earlier",
    }.items():
        (folder / TEXT.record).write_text(damaged)
        with pytest.raises(UserError, match=message):
            CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)


def test_no_flipped_bit_is_read_back(folder):
    """In any file, at any place: all prompts are as they were, or one line names the file."""
    tokens = [TOKENIZER(text, NUM_TOKENS) for text in TEXTS]
    want = [embed(row.tokens[None], row.text_mask[None]) for row in tokens]
    rng = np.random.default_rng(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(60):
            flipped = bytearray(content)
            # Half of them in the header of a part, which is small beside its rows.
            end = header if file.name != TEXT.record and rng.random() < 0.5 else len(content)
            flipped[rng.integers(end)] ^= 1 << rng.integers(8)
            file.write_bytes(flipped)
            try:
                cached = CachedTokenizer(TOKENIZER, folder, identity=IDENTITY)
                found = [cached(text, NUM_TOKENS).embedding for text in TEXTS]
            except UserError as error:
                found = str(error)
            if isinstance(found, str):
                assert file.name in found
                assert "\n" not in found
            else:
                jax.tree.map(np.testing.assert_array_equal, found, want)
        file.write_bytes(content)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["emb", "pooled"])
def test_an_embedding_that_is_not_finite_is_never_written(tmp_path, field, value):
    rows = [dataclasses.replace(TOKENIZER(text, NUM_TOKENS), text=text) for text in TEXTS]

    def overflowing(tokens, text_mask):
        text = embed(tokens, text_mask)
        getattr(text, field)[1] = value
        return text

    message = r"^the embedding of the prompt '<t2i> one pigs' is not finite"
    with pytest.raises(UserError, match=message):
        write_cache(tmp_path, rows, embed=overflowing, identity=IDENTITY, batch_size=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", range(4))
def test_a_killed_build_leaves_no_cache_and_goes_on_to_the_same_bytes(folder, tmp_path, after):
    rows, calls = [TOKENIZER(text, NUM_TOKENS) for text in TEXTS], []
    row_bytes = NUM_TOKENS * (2 * 4 + 1) + 2 * 4 + 16 + 4
    options = dict(identity=IDENTITY, batch_size=2, file_bytes=4 * row_bytes)

    def killed(tokens, text_mask):
        if len(calls) == min(after, 3):
            raise KeyboardInterrupt
        calls.append(len(tokens))
        return embed(tokens, text_mask)

    if after < 3:  # the whole takes three calls
        with pytest.raises(KeyboardInterrupt):
            write_cache(tmp_path / "new", rows, embed=killed, **options)
        with pytest.raises(NotFoundError, match="not a finished cache"):
            CachedTokenizer(TOKENIZER, tmp_path / "new", identity=IDENTITY)
    with (
        pytest.raises(UserError, match="left of an unfinished cache")
        if after >= 2
        else (contextlib.nullcontext())
    ):
        if after == 3:
            write_cache(tmp_path / "new", rows, embed=killed, **options)
            (tmp_path / "new" / TEXT.record).unlink()
        text_writer(tmp_path / "new", embed=embed, identity=dict(kind="clip"))
    calls.clear()

    def counted(tokens, text_mask):
        calls.append(len(tokens))
        return embed(tokens, text_mask)

    write_cache(tmp_path / "new", rows, embed=counted, **options)
    assert len(calls) == {0: 3, 1: 3, 2: 1, 3: 0}[after]  # what was written is not embedded again
    for path in folder.iterdir():
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()


def test_processes_write_one_cache_and_others_may_go_on(folder, tmp_path):
    rows = {text_key(row): row for row in (TOKENIZER(text, NUM_TOKENS) for text in TEXTS)}
    options = dict(embed=embed, identity=IDENTITY, batch_size=2, file_bytes=1)
    for count, chosen in ((2, slice(0, 4)), (3, slice(4, 6))):  # the first two were killed
        share = [
            text_writer(tmp_path, **options, process_index=i, process_count=count)
            for i in range(count)
        ]
        assert len(share[0].done) == chosen.start
        for number, (key, row) in enumerate([*rows.items()][chosen]):
            share[number % count].add(key, row)
        for writer in share:
            writer.flush()
    assert share[0].finish() == len(TEXTS)
    one, many = (CachedTokenizer(TOKENIZER, f, identity=IDENTITY) for f in (folder, tmp_path))
    for text in TEXTS:
        jax.tree.map(
            np.testing.assert_array_equal,
            one(text, NUM_TOKENS).embedding,
            many(text, NUM_TOKENS).embedding,
        )


def test_a_cache_in_a_bucket_is_written_and_read_there(bucket):
    write(bucket / "new" / "cache")
    cached = CachedTokenizer(TOKENIZER, str(bucket / "new" / "cache"), identity=IDENTITY)
    for text in TEXTS:
        plain = TOKENIZER(text, NUM_TOKENS)
        want = embed(plain.tokens[None], plain.text_mask[None])
        np.testing.assert_array_equal(cached(text, NUM_TOKENS).embedding.emb, want.emb)
    with pytest.raises(AlreadyExistsError):
        write_cache(str(bucket / "new" / "cache"), [], embed=embed, identity=IDENTITY)
    with pytest.raises(NotFoundError, match=r"gs://bucket/other has no cache\.json"):
        CachedTokenizer(TOKENIZER, "gs://bucket/other", identity=IDENTITY)
