"""A folder that has T5's `spiece.model` only is read as one with its tokenizer.json."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import spiece
from data_pipelines.tokenizer import load_tokenizer
from tests.data_pipelines.test_tokenizer import T5_PIECES, write_t5
from univg_jax.errors import UserError

SPECIAL = {"<pad>": 3, "</s>": 3, "<unk>": 2}  # types: control, unknown


def field(number, value):
    """A field of a protocol buffer: a whole number below 128, a float, or bytes."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    length = bytes([len(value) & 127 | 128, len(value) >> 7])
    return bytes([number << 3 | 2]) + length + value


def model(pieces=T5_PIECES, *, model_type=1):
    """What SentencePiece writes: pieces with score and type, and what trained them."""
    scores = {piece: -1.0 if len(piece) > 1 else -10.0 for piece in pieces}
    written = (
        field(1, piece.encode()) + field(2, scores[piece]) + field(3, SPECIAL.get(piece, 1))
        for piece in pieces
    )
    # Fields that are not read are skipped: the trainer's input, the normalizer's name.
    trainer = field(1, b"corpus.txt") + field(3, model_type) + field(4, 64)
    normalizer = field(1, b"identity") + field(3, 1)
    return b"".join(field(1, piece) for piece in written) + field(2, trainer) + field(3, normalizer)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    (folder / "spiece").mkdir()
    (folder / "spiece" / "spiece.model").write_bytes(model())
    write_t5(folder / "json")
    return [load_tokenizer(str(folder / name)) for name in ("spiece", "json")]


letters = sorted({letter for piece in T5_PIECES for letter in piece if letter != "\u2581"})


@settings(deadline=None)
@given(text=st.text(st.sampled_from([*letters, " ", "\n", "\u65e5"])))
def test_ids_are_those_of_the_folder_with_tokenizer_json(both, text):
    from_spiece, from_json = (tokenizer(text, 32) for tokenizer in both)
    np.testing.assert_array_equal(from_spiece.tokens, from_json.tokens)
    np.testing.assert_array_equal(from_spiece.text_mask, from_json.text_mask)


def test_sentinels_follow_the_pieces_in_falling_order(both):
    vocabulary = both[0].vocabulary
    count = len(T5_PIECES)
    assert [vocabulary[f"<extra_id_{i}>"] for i in (99, 98, 0)] == [count, count + 1, count + 99]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no piece for what is unknown"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not what SentencePiece"),
        (model()[:-9], "not what SentencePiece"),
        (model(model_type=2), "none of unigrams"),
        (model([p for p in T5_PIECES if p != "</s>"]), "or no </s>"),
        (model() + field(3, field(2, b"no map of characters")), "is not a tokenizer"),
        (bytes(spiece.MAX_BYTES + 1), "more than"),
    ],
    ids=["empty", "pointer", "cut", "bpe", "no-end", "charsmap", "large"],
)
def test_another_file_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"spiece\.model is not a tokenizer: .*{message}|{message}"
    ):
        load_tokenizer(str(tmp_path))


@pytest.mark.parity
def test_ids_are_those_of_sentencepiece(tmp_path):
    """Its normalization too: a map of characters that SentencePiece has made."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [*__doc__.split(), "a\ufb01ne \u00bd \uff21", "  two  \t spaces", ""]
    (tmp_path / "corpus.txt").write_text("\n".join(texts * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = load_tokenizer(str(tmp_path))
    for text in [*texts, "\u65e5\u672c <t2i> e\u0301 \u00e9"]:
        row = ours(text, 256)
        assert row.tokens[row.text_mask].tolist() == [*theirs.encode(text), 1], text
