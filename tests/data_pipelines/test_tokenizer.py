"""Prompts become ids of a fixed length; `<p>` is one known position that is never lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
CLS, SEP, PERSON = 101, 102, 2711  # ids of bert-base-uncased's vocabulary


def test_known_ids():
    text = TOKENIZER("<t2i> A red car", 12)
    np.testing.assert_array_equal(text.tokens, [CLS, 1026, 1056, 2475, 2072, 1028, 1037, 2417, 2482, SEP, 0, 0])
    np.testing.assert_array_equal(text.text_mask, [True] * 10 + [False] * 2)
    assert not text.identity_slot.any()
    assert text.num_truncated == 0


def test_placeholder_is_one_position_read_as_person():
    text, spelled = TOKENIZER("<id> a photo of <p> outdoors", 16), TOKENIZER("<id> a photo of person outdoors", 16)
    np.testing.assert_array_equal(text.tokens, spelled.tokens)
    np.testing.assert_array_equal(text.identity_slot, text.tokens == PERSON)
    assert text.identity_slot.sum() == 1
    assert not spelled.identity_slot.any()


@pytest.mark.parametrize(("text", "slots"), [("<p>", 1), ("<p>,<p>", 2), ("x<p>y", 1), ("<P> < p > p", 0), ("", 0)])
def test_placeholder_is_found_wherever_it_stands(text, slots):
    assert TOKENIZER(text, 16).identity_slot.sum() == slots


def test_truncation_keeps_the_end_token_and_is_counted():
    text = TOKENIZER("one two three four five six", 5)
    np.testing.assert_array_equal(text.tokens, [CLS, 2028, 2048, 2093, SEP])
    assert text.num_truncated == 3
    assert text.text_mask.all()


def test_truncation_never_drops_the_placeholder():
    prompt = "one two three <p>"
    assert TOKENIZER(prompt, 6).identity_slot[4]
    with pytest.raises(ValueError, match=r"'one two three <p>' has 6 tokens: cut to num_tokens=5 it would lose <p>"):
        TOKENIZER(prompt, 5)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="num_tokens=1"):
        TOKENIZER("a", 1)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="did you mean 'minilm'"):
        load_tokenizer("minilmm")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), num_tokens=st.integers(2, 24))
def test_any_text_gives_a_closed_prompt_in_the_vocabulary(text, num_tokens):
    result = TOKENIZER(text.replace("<p>", ""), num_tokens)
    n = result.text_mask.sum()
    assert result.tokens.shape == result.text_mask.shape == result.identity_slot.shape == (num_tokens,)
    assert result.tokens[0] == CLS
    assert result.tokens[n - 1] == SEP
    assert (result.tokens[n:] == 0).all()
    assert (result.tokens < 30522).all()
