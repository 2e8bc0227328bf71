"""Prompts become ids of a fixed length; `<p>` is one known position that is never lost.

CLIP's and T5's tokenizers have small vocabularies here; live (marker `parity`) their ids are
transformers'.
"""

import json

import numpy as np
import pytest
import tokenizers
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import tasks
from data_pipelines.tasks import TASKS
from data_pipelines.tokenizer import SD3Tokenizer, load_tokenizer
from univg_jax.errors import NotFoundError, UserError
from univg_jax.pretrained import pretrained_folder

TOKENIZER = load_tokenizer()
CLS, SEP, PERSON = 101, 102, 2711  # ids of bert-base-uncased's vocabulary


def test_known_ids():
    text = TOKENIZER("<t2i> A red car", 12)
    np.testing.assert_array_equal(
        text.tokens, [CLS, 1026, 1056, 2475, 2072, 1028, 1037, 2417, 2482, SEP, 0, 0]
    )
    np.testing.assert_array_equal(text.text_mask, [True] * 10 + [False] * 2)
    assert not text.identity_slot.any()
    assert text.num_truncated == 0


def test_the_fingerprint_changes_with_the_vocabulary(tmp_path):
    assert load_tokenizer().fingerprint == TOKENIZER.fingerprint
    state = json.loads((pretrained_folder("minilm") / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    words["red"], words["car"] = words["car"], words["red"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert load_tokenizer(str(tmp_path)).fingerprint != TOKENIZER.fingerprint


def test_placeholder_is_one_position_read_as_person():
    text, spelled = (
        TOKENIZER("<id> a photo of <p> outdoors", 16),
        TOKENIZER("<id> a photo of person outdoors", 16),
    )
    np.testing.assert_array_equal(text.tokens, spelled.tokens)
    np.testing.assert_array_equal(text.identity_slot, text.tokens == PERSON)
    assert text.identity_slot.sum() == 1
    assert not spelled.identity_slot.any()


@pytest.mark.parametrize(
    ("text", "slots"), [("<p>", 1), ("<p>,<p>", 2), ("x<p>y", 1), ("<P> < p > p", 0), ("", 0)]
)
def test_placeholder_is_found_wherever_it_stands(text, slots):
    assert TOKENIZER(f"<id> {text}", 16).identity_slot.sum() == slots


@settings(max_examples=100, deadline=None)
@given(
    task=st.sampled_from([name for name in TASKS if name != "id"]),
    parts=st.lists(st.sampled_from(["<p>", "</p>", "<id>", "< ID >", "<<id>>", "a pig", " "])),
)
def test_nothing_in_a_text_makes_a_slot_or_another_task(task, parts):
    """Captions come from web pages, full of HTML."""
    text = tasks.prompt(task, "".join(parts).strip())
    row = TOKENIZER(text, 64)
    assert not row.identity_slot.any()
    tags = [TOKENIZER(f"<{name}>", 64) for name in TASKS]
    first, *others = (
        place
        for place in range(row.text_mask.sum())
        for tag in tags
        if np.array_equal((ids := tag.tokens[tag.text_mask][1:-1]), row.tokens[place:][: len(ids)])
    )
    assert (first, others) == (1, [])


def test_placeholder_without_a_face_is_read_as_it_is_spelled():
    text = TOKENIZER("<t2i> <p>a chair</p>", 20)
    words = TOKENIZER.vocabulary
    spelled = ["<", "p", ">", "a", "chair", "<", "/", "p", ">"]
    np.testing.assert_array_equal(text.tokens[6:15], [words[word] for word in spelled])


def test_what_the_encoder_does_not_know_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    for text in ("<t2i> a pig", "<t2i> a 🙂 on grass, 猫", "<t2i> 🙂"):
        TOKENIZER(text, 20)
    (record,) = caplog.records
    assert "does not know '🙂 猫' of the prompt '<t2i> a 🙂 on grass, 猫'" in record.getMessage()


def test_a_tag_that_the_encoder_does_not_know_is_not_the_users(sd3, monkeypatch, caplog):
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    load(sd3)("<t2i> a cat", 90)
    assert not caplog.records
    load(sd3)("<t2i> a <cat", 90)
    assert "does not know '<' of the prompt" in caplog.text


def test_a_long_prompt_is_not_echoed(monkeypatch, caplog):
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    long = "猫 " * 10_000
    TOKENIZER(f"<t2i> {long}", 20)
    assert len(caplog.records) == 2, "unknown and truncated"
    with pytest.raises(UserError) as error:
        TOKENIZER(f"<id> {long} <p>", 20)
    assert all(len(text) < 400 for text in (str(error.value), *caplog.messages))


def test_truncation_keeps_the_end_token_and_is_counted():
    text = TOKENIZER("one two three four five six", 5)
    np.testing.assert_array_equal(text.tokens, [CLS, 2028, 2048, 2093, SEP])
    assert text.num_truncated == 3
    assert text.text_mask.all()


def test_truncation_never_drops_the_placeholder():
    prompt = "<id> one two three <p>"
    assert TOKENIZER(prompt, 9).identity_slot[7]
    with pytest.raises(
        ValueError, match=r"two three <p>' has 9 tokens: cut to num_tokens=8 it would lose <p>"
    ):
        TOKENIZER(prompt, 8)


def test_errors(tmp_path):
    with pytest.raises(UserError, match="num_tokens=1"):
        TOKENIZER("a", 1)
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(NotFoundError, match="did you mean 'minilm'"):
        load_tokenizer("minilmm")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), num_tokens=st.integers(2, 24))
def test_any_text_gives_a_closed_prompt_in_the_vocabulary(text, num_tokens):
    result = TOKENIZER(text.replace("<p>", ""), num_tokens)
    n = result.text_mask.sum()
    assert (
        result.tokens.shape == result.text_mask.shape == result.identity_slot.shape == (num_tokens,)
    )
    assert result.tokens[0] == CLS
    assert result.tokens[n - 1] == SEP
    assert (result.tokens[n:] == 0).all()
    assert (result.tokens < 30522).all()


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(["t2i", "id"]),
    text=st.text(max_size=40),
    person=st.sampled_from(["", "<p> "]),
    num_tokens=st.integers(4, 24),
)
def test_a_saved_tokenizer_makes_the_same_rows(task, text, person, num_tokens):
    prompt = f"<{task}> {person}{text}"
    try:
        expected = TOKENIZER(prompt, num_tokens)
    except UserError:  # too few tokens for the person, which the file cannot tell
        return
    saved = TOKENIZER.to_json(num_tokens, with_placeholder=task == "id")
    row = tokenizers.Tokenizer.from_str(saved).encode(prompt)
    ids = np.array(row.ids)
    slot = ids == TOKENIZER.placeholder
    np.testing.assert_array_equal(slot, expected.identity_slot)
    np.testing.assert_array_equal(np.where(slot, TOKENIZER.stand_in, ids), expected.tokens)
    np.testing.assert_array_equal(np.array(row.attention_mask, bool), expected.text_mask)


# --- CLIP, T5, SD3 -------------------------------------------------------------------------------

MERGES = ["p e", "pe r", "s o", "so n</w>", "per son</w>", "a t</w>", "c at</w>", "i t</w>"]
START, END = "<|startoftext|>", "<|endoftext|>"


def special(content, *, normalized):
    how = dict(lstrip=False, rstrip=False, single_word=False, normalized=normalized, special=True)
    return dict(content=content, **how)


def clip_vocabulary():
    """Every byte's letter as CLIP orders them ("!" is 0), inside a word and at its end, the merges,
    the two ends.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = letters + [letter + "</w>" for letter in letters] + merged + [START, END]
    return {token: i for i, token in enumerate(tokens)}


CLIP = clip_vocabulary()


def write_clip(folder, *, pad=END, specials="decoder"):
    """A folder as SD3's are, `specials` given in the newer or older form, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(CLIP))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    named = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad)
    if specials == "decoder":
        # As in SD3: the ends are matched in the normalized text, bigG's pad in the raw one.
        decoder = {
            CLIP[token]: special(token, normalized=token != "!") for token in {START, END, pad}
        }
        config = dict(
            added_tokens_decoder=decoder,
            tokenizer_class="CLIPTokenizer",
            model_max_length=77,
            **named,
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    elif specials == "map":
        (folder / "tokenizer_config.json").write_text(
            json.dumps(dict(tokenizer_class="CLIPTokenizer", pad_token=END))
        )
        tokens = {key: special(token, normalized=True) for key, token in named.items()}
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens | dict(pad_token=pad)))
    return folder


T5_PIECES = [
    "<pad>",
    "</s>",
    "<unk>",
    *"▁abcdefghijklmnopqrstuvwxyz0123456789.,'>",
    "▁a",
    "▁cat",
    "▁it",
    "▁person",
]


def write_t5(folder):
    """A tokenizer.json as T5's is; like T5's the vocabulary has no "<"."""
    folder.mkdir(parents=True, exist_ok=True)
    # words before letters
    pieces = [(piece, -1.0 if len(piece) > 1 else -10.0) for piece in T5_PIECES]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    write_clip(folder / "tokenizer")
    write_clip(folder / "tokenizer_2", pad="!")
    write_t5(folder / "tokenizer_3")
    return folder


def load(folder):
    return load_tokenizer(str(folder))


def clip_ids(*tokens):
    return [CLIP[token] for token in tokens]


def t5_ids(*pieces):
    return [T5_PIECES.index(piece) for piece in pieces]


def test_clip_ids(sd3):
    text = load(sd3 / "tokenizer")("A  CAT's <t2i> 12 \u00c9 e\u0301", 24)
    # the bytes of é, as the vocabulary writes them: composed and lower-cased, both of them
    e_acute = ["Ã", "©</w>"]
    words = [
        "a</w>",
        "cat</w>",
        "'",
        "s</w>",
        "<</w>",
        "t</w>",
        "2</w>",
        "i</w>",
        "></w>",
        "1</w>",
        "2</w>",
    ]
    want = clip_ids(START, *words, *e_acute, *e_acute, END)
    np.testing.assert_array_equal(text.tokens, want + clip_ids(END) * (24 - len(want)))
    assert text.text_mask.sum() == len(want)


def test_bigg_pads_with_its_own_token(sd3):
    text, other = (load(sd3 / name)("a cat", 6) for name in ("tokenizer_2", "tokenizer"))
    np.testing.assert_array_equal(text.tokens, [*clip_ids(START, "a</w>", "cat</w>", END), 0, 0])
    np.testing.assert_array_equal(text.tokens, np.where(other.text_mask, other.tokens, 0))


def test_t5_ids(sd3):
    text = load(sd3 / "tokenizer_3")("a  cat <t2i>", 11)
    words = ["▁a", "▁cat", "▁", "<unk>", "t", "2", "i", ">", "</s>"]
    np.testing.assert_array_equal(text.tokens, [*t5_ids(*words), 0, 0])
    assert text.text_mask.sum() == 9
    np.testing.assert_array_equal(load(sd3 / "tokenizer_3")("a cat", 1).tokens, t5_ids("</s>"))


@pytest.mark.parametrize(
    ("name", "person"), [("tokenizer", "person</w>"), ("tokenizer_3", "▁person")]
)
@pytest.mark.parametrize("prompt", ["a <p> it", "<p>", "<p>,<p>", "it <p>"])
def test_placeholder_is_the_whole_word_to_every_encoder(sd3, name, person, prompt):
    tokenizer = load(sd3 / name)
    prompt = f"<id> {prompt}"
    text, spelled = tokenizer(prompt, 24), tokenizer(prompt.replace("<p>", " person "), 24)
    assert text.identity_slot.sum() == prompt.count("<p>")
    stand_in = (CLIP if name == "tokenizer" else {piece: i for i, piece in enumerate(T5_PIECES)})[
        person
    ]
    np.testing.assert_array_equal(text.identity_slot, text.tokens == stand_in)
    np.testing.assert_array_equal(text.tokens, spelled.tokens)
    assert not spelled.identity_slot.any()


def test_stand_in_of_several_pieces_is_the_first(tmp_path, sd3):
    state = json.loads((sd3 / "tokenizer_3" / "tokenizer.json").read_text())
    state["model"]["vocab"] = [piece for piece in state["model"]["vocab"] if piece[0] != "▁person"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    text = load(tmp_path)("<id> <p>", 7)
    tag = ["▁", "<unk>", "i", "d", ">"]
    np.testing.assert_array_equal(text.tokens, t5_ids(*tag, "▁", "</s>"))
    np.testing.assert_array_equal(np.flatnonzero(text.identity_slot), [5])


def test_sd3_is_one_row_of_clip_then_t5(sd3):
    tokenizer = load(sd3)
    assert isinstance(tokenizer, SD3Tokenizer)
    text = tokenizer("<id> a <p>", 90)
    parts = load(sd3 / "tokenizer")("<id> a <p>", 77), load(sd3 / "tokenizer_3")("<id> a <p>", 13)
    for field in ("tokens", "text_mask", "identity_slot"):
        np.testing.assert_array_equal(
            getattr(text, field), np.concatenate([getattr(part, field) for part in parts])
        )
    np.testing.assert_array_equal(
        np.flatnonzero(text.identity_slot), [6, 77 + 6]
    )  # (start) < i d > a, and ▁ < i d > ▁a
    np.testing.assert_array_equal(
        tokenizer("a cat", 77).tokens, load(sd3 / "tokenizer")("a cat", 77).tokens
    )


@pytest.mark.parametrize("text", ["<t2i> a cat", "<id> a <p> at it", "<t2i> " + "a cat so " * 40])
def test_the_parts_of_sd3_make_its_row_when_they_are_saved(sd3, text):
    ours, num_tokens = load(sd3), 77 + 12
    expected = ours(text, num_tokens)
    ids, mask = [], []
    for part, count in ours.parts(num_tokens).values():
        saved = part.to_json(count, with_placeholder="<id>" in text)
        row = tokenizers.Tokenizer.from_str(saved).encode(text)
        ids += [part.stand_in if i == part.placeholder else i for i in row.ids]
        mask += row.attention_mask
    assert ids == expected.tokens.tolist()
    assert list(map(bool, mask)) == expected.text_mask.tolist()
    assert list(load_tokenizer(str(sd3)).parts(77)) == ["tokenizer"]


def test_sd3_truncates_each_part(sd3):
    text = load(sd3)("it " * 80, 77 + 9)
    assert text.text_mask.all()
    assert text.num_truncated == (82 - 77) + (81 - 9)
    assert text.tokens[76] == CLIP[END]
    assert text.tokens[-1] == 1
    with pytest.raises(UserError, match="cut to num_tokens=9 it would lose <p>"):
        load(sd3)("<id>" + " it" * 20 + "<p>", 77 + 9)
    with pytest.raises(UserError, match="cut to num_tokens=77 it would lose <p>"):
        load(sd3)("<id>" + " it" * 80 + "<p>", 77 + 100)


def test_sd3_without_t5(tmp_path):
    write_clip(tmp_path / "tokenizer")
    write_clip(tmp_path / "tokenizer_2", pad="!")
    tokenizer = load(tmp_path)
    assert tokenizer("a cat", 77).text_mask.sum() == 4
    for num_tokens in (76, 78):
        with pytest.raises(UserError, match=f"num_tokens={num_tokens}: must be 77 without T5"):
            tokenizer("a cat", num_tokens)


def test_sd3_needs_room_for_clip(sd3):
    with pytest.raises(UserError, match="num_tokens=76: CLIP takes 77 of it"):
        load(sd3)("a cat", 76)


def test_damaged_clip_folders(tmp_path):
    folder = write_clip(tmp_path / "tokenizer")

    def refuses(message, error=ValueError, where=folder):
        with pytest.raises(error, match=message):
            load(where)

    refuses(
        r"tokenizer_2 has no tokenizer\.json, nor CLIP's vocab\.json and merges\.txt",
        FileNotFoundError,
        tmp_path,
    )
    write_clip(tmp_path / "tokenizer_2", pad="!")
    (tmp_path / "tokenizer_3").mkdir()
    refuses(r"tokenizer_3 has no tokenizer\.json", FileNotFoundError, tmp_path)
    (tmp_path / "tokenizer_2" / "vocab.json").write_text(json.dumps(CLIP | {"new</w>": len(CLIP)}))
    refuses("tokenizer and tokenizer_2 differ in their vocabularies", where=tmp_path)
    write_clip(folder, pad="[PAD]", specials="map")
    (folder / "tokenizer_config.json").write_text("{}")
    refuses(r"its vocabulary has no pad token '\[PAD\]'")
    (folder / "tokenizer_config.json").write_text("{")
    refuses(r"tokenizer_config\.json is not JSON")
    (folder / "merges.txt").write_text("x y z\n")
    refuses("vocab.json is not a tokenizer")
    (folder / "merges.txt").unlink()
    refuses(r"tokenizer has no merges\.txt beside its vocab\.json", FileNotFoundError)
    (folder / "merges.txt").write_text("")
    # GPT-2's files have these names too
    (folder / "vocab.json").write_text(json.dumps({"a": 0, END: 1}))
    refuses(r"CLIP's vocabulary has <\|startoftext\|> and <\|endoftext\|>")


# What tells tokenizers apart: case, accents whole and composed, ligatures, emoji, spaces, digits,
# special tokens.
PARTS = (
    *(
        "A cat",
        "it's",
        "WE'LL",
        "person",
        "  ",
        "\t\n",
        "\u00a0",
        "e\u0301",
        "\u00c9",
        "\ufb01",
        "ß",
        "İ",
        "日本",
        "!",
        "?!.",
    ),
    *(
        "🙂",
        "👩‍👩‍👧",
        "0123",
        "½",
        "<t2i>",
        "< p >",
        END,
        END.upper(),
        START,
        "</s>",
        "<pad>",
        "<unk>",
        "<extra_id_1>",
        "\u200b",
        "\0",
    ),
)
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
).map(lambda text: text.replace("<p>", ""))


def assert_ids_of(reference, tokenizer):
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(text=TEXTS, num_tokens=st.integers(2, 24))
    def check(text, num_tokens):
        theirs = reference(text, padding="max_length", max_length=num_tokens, truncation=True)
        ours = tokenizer(text, num_tokens)
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert ours.text_mask.tolist() == [bool(m) for m in theirs["attention_mask"]]
        assert not ours.identity_slot.any()

    check()


@pytest.mark.parity
@pytest.mark.parametrize("pad", [END, "!"])
@pytest.mark.parametrize("specials", ["decoder", "map", "none"])
def test_clip_ids_are_those_of_transformers(tmp_path, pad, specials):
    transformers = pytest.importorskip("transformers")
    folder = write_clip(tmp_path, pad=pad, specials=specials)
    reference = transformers.CLIPTokenizerFast.from_pretrained(folder)
    assert_ids_of(reference, load(folder))
    reference.save_pretrained(tmp_path / "json")  # the same as a tokenizer.json
    assert_ids_of(reference, load(tmp_path / "json"))


@pytest.mark.parity
def test_t5_ids_are_those_of_transformers(tmp_path):
    """With the character map of a SentencePiece model, which is what T5's tokenizer.json has."""
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["a person and a cat, it's 2 of them >", "der Bär, l'été; 12 persons"] * 50
        ),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    reference = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    reference.save_pretrained(tmp_path / "json")
    assert "precompiled_charsmap" in (tmp_path / "json" / "tokenizer.json").read_text()
    assert_ids_of(reference, load(tmp_path / "json"))


@pytest.mark.parity
def test_minilm_ids_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    assert_ids_of(
        transformers.BertTokenizerFast.from_pretrained(pretrained_folder("minilm")), TOKENIZER
    )
