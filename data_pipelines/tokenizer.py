"""Prompts -> token ids, on hosts, by Hugging Face `tokenizers` (no transformers, no torch).

Task tags (`<t2i>`) are plain text to the tokenizer. `<p>` is one position: the frozen encoder reads the word
"person" there, a natural context, and `identity_slot` tells the model which embedding to replace.
"""

import dataclasses

import numpy as np
import tokenizers
from absl import logging
from jaxtyping import Bool, Int32

from data_pipelines.tasks import PLACEHOLDER
from univg_jax.pretrained import pretrained_folder

STAND_IN = "person"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """One prompt, padded to a fixed number of tokens."""

    tokens: Int32[np.ndarray, " m"]
    text_mask: Bool[np.ndarray, " m"]  # True = a real token
    identity_slot: Bool[np.ndarray, " m"]  # True where `<p>` stands
    num_truncated: int  # tokens that did not fit and were cut off


class Tokenizer:
    """`tokenizer(text, num_tokens) -> TokenizedText`, closed by the end token even if truncated.

    A truncated prompt is logged once a process and counted in `num_truncated`. Raises ValueError if truncation
    would cut off a `<p>`, or if not even the start and end tokens fit.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()  # ours keeps the end token and never drops `<p>`
        tokenizer.no_padding()
        self._stand_in = tokenizer.token_to_id(STAND_IN)
        if self._stand_in is None:
            raise ValueError(f"the tokenizer's vocabulary has no word {STAND_IN!r} to stand in for {PLACEHOLDER}")
        self._pad = tokenizer.token_to_id("[PAD]") or 0
        # An added token is split off before the text is lower-cased and cut into words. Its id lies
        # beyond the encoder's vocabulary and never leaves this class.
        tokenizer.add_tokens([tokenizers.AddedToken(PLACEHOLDER, normalized=False)])
        self._placeholder = tokenizer.token_to_id(PLACEHOLDER)
        self._tokenizer = tokenizer

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        if num_tokens < 2:
            raise ValueError(f"num_tokens={num_tokens}: a prompt needs at least its start and end tokens")
        ids = np.asarray(self._tokenizer.encode(text).ids, np.int32)
        num_truncated = max(len(ids) - num_tokens, 0)
        if num_truncated:
            if (ids[num_tokens - 1 :] == self._placeholder).any():
                raise ValueError(
                    f"prompt {text!r} has {len(ids)} tokens: cut to num_tokens={num_tokens} it would lose "
                    f"{PLACEHOLDER}; shorten it or raise data.num_tokens"
                )
            logging.log_first_n(
                logging.WARNING,
                "prompt %r has %d tokens, of which %d are kept; further truncated prompts are not reported",
                *(1, text, len(ids), num_tokens),
            )
            ids = np.append(ids[: num_tokens - 1], ids[-1])
        padded = np.full(num_tokens, self._pad, np.int32)
        padded[: len(ids)] = ids
        slot = padded == self._placeholder
        return TokenizedText(
            tokens=np.where(slot, np.int32(self._stand_in), padded),
            text_mask=np.arange(num_tokens) < len(ids),
            identity_slot=slot,
            num_truncated=num_truncated,
        )


def load_tokenizer(name_or_folder: str = "minilm") -> Tokenizer:
    """The tokenizer of a pretrained model's name or folder (its tokenizer.json).

    Raises FileNotFoundError if there is none, ValueError if it is not a tokenizer.
    """
    file = pretrained_folder(name_or_folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no tokenizer.json")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(file.read_text("utf-8")))
    except Exception as error:  # the Rust library raises bare Exceptions
        raise ValueError(f"{file} is not a tokenizer: {error}") from None
