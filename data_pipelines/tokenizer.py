"""Prompts -> token ids, on hosts, with Hugging Face `tokenizers` (no transformers, no torch).

Task tags (`<t2i>`) are plain text to the tokenizer. After the tag of a task with a face `<p>` is
one position: the frozen encoder reads the word "person" there, a natural context, and
`identity_slot` tells the model which embedding to replace. Where the vocabulary spells that word in
several pieces, the encoder reads the first. Without such a tag `<p>` is text, as in HTML.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Bool, Int32
from tokenizers import normalizers, pre_tokenizers, processors

from data_pipelines.spiece import read_spiece
from data_pipelines.tasks import PLACEHOLDER, has_face, tag_of
from univg_jax.batch import Text
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.files import read_json
from univg_jax.pretrained import pretrained_folder

STAND_IN = "person"
CLIP_POSITIONS = 77  # of SD3's CLIP encoders
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
CLIP_SPECIALS = dict(
    bos_token=CLIP_START, eos_token=CLIP_END, unk_token=CLIP_END, pad_token=CLIP_END
)
UNKNOWN = ("[UNK]", "<unk>")  # of BERT, T5; CLIP reads any text
PADS = ("[PAD]", "<pad>", CLIP_END)  # of BERT, T5, CLIP: tried where a folder names none


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """One prompt, padded to a fixed number of tokens."""

    tokens: Int32[np.ndarray, " m"]
    text_mask: Bool[np.ndarray, " m"]  # True = a real token
    identity_slot: Bool[np.ndarray, " m"]  # True where `<p>` stands
    num_truncated: int  # tokens that did not fit and were cut off
    embedding: Text | None = None  # as a batch of one row, if it comes from a cache
    text: str = ""  # the prompt itself, where a message may have to name it


@runtime_checkable
class Tokenizer(Protocol):
    """Turns a prompt into a row of `num_tokens` token ids."""

    def __call__(self, text: str, num_tokens: int) -> TokenizedText: ...


class EncoderTokenizer:
    """The tokenizer of one encoder: a row ends with the end token, even if truncated, then padding.

    `tokenizer` has padding enabled, which names the pad token. Each process logs its first
    truncated prompt, and the first with what the encoder does not know; `num_truncated` says how
    many tokens a prompt lost. Raises UserError if truncation would cut off the person's `<p>`, or
    if not even the start and end tokens fit.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._pad = tokenizer.padding["pad_id"]
        # `__call__` truncates and pads itself: it keeps the end token and never drops a `<p>`.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        stand_in = tokenizer.encode(STAND_IN, add_special_tokens=False).ids
        if not stand_in:
            raise UserError(
                f"the tokenizer has no token of the word {STAND_IN!r} to stand in for {PLACEHOLDER}"
            )
        self._stand_in = stand_in[0]
        self._num_special = tokenizer.num_special_tokens_to_add(False)
        unknown = (token for token in UNKNOWN if tokenizer.token_to_id(token) is not None)
        self._unknown = next(unknown, None)
        self._tokenizer = tokenizer

    @functools.cached_property
    def _with_placeholder(self) -> tokenizers.Tokenizer:
        """The tokenizer of prompts with a face."""
        # An added token is split off before the text is lower-cased and cut into words. Its id lies
        # beyond the encoder's vocabulary and never leaves this class.
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.add_tokens([tokenizers.AddedToken(PLACEHOLDER, normalized=False)])
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the vocabulary or the way that texts are cut."""
        content = json.dumps([self._tokenizer.to_str(), self._pad, self._stand_in])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self._tokenizer.get_vocab()

    def parts(self, num_tokens: int) -> dict[str, tuple["EncoderTokenizer", int]]:
        """The tokenizers that make a row, in its order, each with its number of positions.

        They have the names that folders have in a pipeline of diffusers.
        """
        return {"tokenizer": (self, num_tokens)}

    @property
    def stand_in(self) -> int:
        """The id that the encoder reads where `<p>` stands."""
        return self._stand_in

    @property
    def placeholder(self) -> int:
        """The id of `<p>` in `to_json(with_placeholder=True)`, which no encoder reads."""
        return self._with_placeholder.token_to_id(PLACEHOLDER)

    def to_json(self, num_tokens: int, *, with_placeholder: bool) -> str:
        """A tokenizer.json that makes the same rows by itself: cut and padded to `num_tokens`.

        `with_placeholder` is for prompts with a face: `<p>` has an id of its own there, where
        `__call__` has `stand_in`.
        """
        tokenizer = copy.deepcopy(self._with_placeholder if with_placeholder else self._tokenizer)
        tokenizer.enable_truncation(num_tokens)
        pad = dict(pad_id=self._pad, pad_token=tokenizer.id_to_token(self._pad))
        tokenizer.enable_padding(length=num_tokens, **pad)
        return tokenizer.to_str()

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        if num_tokens < self._num_special:
            raise UserError(
                f"num_tokens={num_tokens}: "
                f"a prompt has {self._num_special} special tokens beside its text"
            )
        tokenizer, placeholder = self._tokenizer, None
        if has_face(text):
            tokenizer = self._with_placeholder
            placeholder = tokenizer.token_to_id(PLACEHOLDER)
        encoding = tokenizer.encode(text)
        self._report_unknown(text, encoding)
        ids = np.asarray(encoding.ids, np.int32)
        num_truncated = max(len(ids) - num_tokens, 0)
        if num_truncated:
            if (ids[num_tokens - 1 :] == placeholder).any():
                raise UserError(
                    f"prompt {quote(text)} has {len(ids)} tokens: "
                    f"cut to num_tokens={num_tokens} it would lose {PLACEHOLDER}; "
                    "shorten it, or raise data.num_tokens if the encoder has more positions"
                )
            logging.log_first_n(
                logging.WARNING,
                "prompt %s has %d tokens, of which %d are kept; "
                "further truncated prompts are not reported",
                *(1, quote(text), len(ids), num_tokens),
            )
            ids = np.append(ids[: num_tokens - 1], ids[-1])
        padded = np.full(num_tokens, self._pad, np.int32)
        padded[: len(ids)] = ids
        slot = (padded == placeholder) & (placeholder is not None)
        return TokenizedText(
            tokens=np.where(slot, np.int32(self._stand_in), padded),
            text_mask=np.arange(num_tokens) < len(ids),
            identity_slot=slot,
            num_truncated=num_truncated,
        )

    def _report_unknown(self, text: str, encoding: tokenizers.Encoding) -> None:
        """Logs the first prompt of which the encoder cannot read a part after the tag."""
        unknown = self._unknown and self._tokenizer.token_to_id(self._unknown)
        if unknown not in encoding.ids:
            return
        start, places = len(tag_of(text)), zip(encoding.ids, encoding.offsets, strict=True)
        parts = [text[a:b] for token, (a, b) in places if token == unknown and a >= start]
        if parts:
            logging.log_first_n(
                logging.WARNING,
                "the text encoder does not know %s of the prompt %s and reads it as %s; "
                "further such prompts are not reported",
                *(1, quote(" ".join(parts), most=40), quote(text), self._unknown),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SD3Tokenizer:
    """A prompt for Stable Diffusion 3's encoders: CLIP's 77 positions, then T5's, in one row.

    Position i of the row is position i of SD3's text embedding (arXiv 2403.03206, figure 2). T5
    gets `num_tokens` - 77 positions. Both CLIPs read the same ids, padded as CLIP-L's are; only
    where `text_mask` is False does bigG expect its own pad token, id 0. One difference remains:
    bigG's own tokenizer takes a "!" in a prompt, its pad token, for padding. Here it is read as
    CLIP-L reads it.

    `num_truncated` is the sum of both encoders' numbers. Raises UserError for fewer than 77 tokens,
    for more without a `t5`, and if either encoder would lose a `<p>`.
    """

    clip: EncoderTokenizer  # of CLIP-L
    t5: EncoderTokenizer | None = None  # not asked where num_tokens is 77

    @property
    def fingerprint(self) -> str:
        """That of both tokenizers."""
        return "".join(part.fingerprint for part in (self.clip, self.t5) if part is not None)

    def parts(self, num_tokens: int) -> dict[str, tuple[EncoderTokenizer, int]]:
        """As `EncoderTokenizer.parts`."""
        t5 = {} if self.t5 is None else {"tokenizer_3": (self.t5, num_tokens - CLIP_POSITIONS)}
        return {"tokenizer": (self.clip, CLIP_POSITIONS), **{k: p for k, p in t5.items() if p[1]}}

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        t5_positions = num_tokens - CLIP_POSITIONS
        if self.t5 is None and t5_positions != 0:
            raise UserError(f"num_tokens={num_tokens}: must be {CLIP_POSITIONS} without T5")
        if t5_positions < 0:
            raise UserError(f"num_tokens={num_tokens}: CLIP takes {CLIP_POSITIONS} of it")
        texts = [self.clip(text, CLIP_POSITIONS)]
        if t5_positions:
            texts.append(self.t5(text, t5_positions))
        return TokenizedText(
            tokens=np.concatenate([t.tokens for t in texts]),
            text_mask=np.concatenate([t.text_mask for t in texts]),
            identity_slot=np.concatenate([t.identity_slot for t in texts]),
            num_truncated=sum(t.num_truncated for t in texts),
        )


def load_tokenizer(name_or_folder: str = "minilm") -> EncoderTokenizer | SD3Tokenizer:
    """The tokenizer of a pretrained model, by its name or local folder.

    A folder has tokenizer.json, or CLIP's vocab.json and merges.txt, or T5's spiece.model. That of
    an SD3 pipeline has folders tokenizer, tokenizer_2 and, with T5, tokenizer_3.

    Raises NotFoundError for a missing file, UserError for one that is not a tokenizer.
    """
    folder = pretrained_folder(name_or_folder)
    if not (folder / "tokenizer").is_dir():
        return EncoderTokenizer(_read(folder))
    clip, second = (EncoderTokenizer(_read(folder / name)) for name in ("tokenizer", "tokenizer_2"))
    if clip.vocabulary != second.vocabulary:
        raise UserError(
            f"{folder}: tokenizer and tokenizer_2 differ in their vocabularies; "
            "SD3's CLIPs share one"
        )
    third = folder / "tokenizer_3"
    return SD3Tokenizer(clip=clip, t5=EncoderTokenizer(_read(third)) if third.is_dir() else None)


def _read(folder: Path) -> tokenizers.Tokenizer:
    """A folder's tokenizer, with the special tokens that it names and its padding enabled."""
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "spiece.model")]
    if (file := next(filter(Path.is_file, files), None)) is None:
        raise NotFoundError(
            f"{folder} has no tokenizer.json, nor CLIP's vocab.json and merges.txt, "
            "nor T5's spiece.model"
        )
    is_clip = file.name == "vocab.json"
    if is_clip and not (folder / "merges.txt").is_file():
        raise NotFoundError(f"{folder} has no merges.txt beside its vocab.json")
    try:
        if is_clip:
            tokenizer = _clip(folder)
        elif file.name == "spiece.model":
            tokenizer = read_spiece(file)
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        defaults = CLIP_SPECIALS if is_clip else {}
        config = defaults | _json(folder / "tokenizer_config.json")
        # The older of two ways in which a folder says which tokens are special.
        if "added_tokens_decoder" not in config:
            config |= _json(folder / "special_tokens_map.json")
        _add_special_tokens(tokenizer, config)
        usual = (pad for pad in PADS if tokenizer.token_to_id(pad) is not None)
        pad = _content(config.get("pad_token") or next(usual, PADS[0]))
        if (pad_id := tokenizer.token_to_id(pad)) is None:
            raise UserError(f"its vocabulary has no pad token {pad!r}")
        tokenizer.enable_padding(pad_id=pad_id, pad_token=pad)
    except Exception as error:  # The Rust library raises bare Exceptions.
        raise UserError(f"{file} is not a tokenizer: {error}") from None
    return tokenizer


def _clip(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer: lower-cased words as bytes, merged in pairs (arXiv 2103.00020, 2.4)."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    vocab, merges = tokenizers.models.BPE.read_file(*files)
    if not {CLIP_START, CLIP_END} <= vocab.keys():
        raise UserError(f"CLIP's vocabulary has {CLIP_START} and {CLIP_END}")
    model = tokenizers.models.BPE(
        vocab, merges, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    steps = [normalizers.NFC(), one_space, normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    ends = [(token, vocab[token]) for token in (CLIP_START, CLIP_END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{CLIP_START} $A {CLIP_END}", special_tokens=ends
    )
    return tokenizer


def _add_special_tokens(tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Keeps the special tokens of `config` whole wherever a text has them, as transformers does."""
    named = [
        config.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    ]
    tokens = filter(None, [*named, *config.get("added_tokens_decoder", {}).values()])
    # A token may have several entries; as in transformers, the last one counts.
    special = {_content(token): token for token in tokens}
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for content, token in special.items():
        if content not in added and tokenizer.token_to_id(content) is not None:
            options = dict(token) if isinstance(token, dict) else {}
            options.pop("__type", None)  # the name of a Python class, no option of the token
            options |= dict(content=content, special=True)
            tokenizer.add_special_tokens([tokenizers.AddedToken(**options)])


def _content(token: Any) -> str:
    """The text of a special token, which is a string or a dict with options of its matching."""
    return token["content"] if isinstance(token, dict) else token


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
