"""Prompts that are encoded once, however many images are made of each."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from data_pipelines.tokenizer import TokenizedText, Tokenizer
from univg_jax.batch import Text
from univg_jax.together import together

# Embeddings of as many prompts as a process has rows in a batch. All processes call it.
Embed = Callable[[Sequence[TokenizedText]], Text]


class EncodedPrompts:
    """A tokenizer whose prompts come with their embeddings, which `encode` makes before."""

    def __init__(self, tokenizer: Tokenizer, embed: Embed):
        self._tokenizer, self._embed = tokenizer, embed
        self._found: dict[str, TokenizedText] = {}
        self._held: dict[int, Sequence[str]] = {}  # the texts that each process has

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        return self._found[text]

    def encode(self, texts: Sequence[Sequence[str]], num_tokens: int, *, rows: int) -> None:
        """Encodes what this process has not yet of its own texts, `rows` at a time, and forgets
        all others.

        All processes call it, with the texts of each of them: since the encoder is a program over
        all devices, all encode equally often. Raises UserError on all of them for a prompt that
        cannot be tokenized.
        """
        new = [
            [text for text in dict.fromkeys(own) if text not in self._held.get(process, ())]
            for process, own in enumerate(texts)
        ]
        self._held = dict(enumerate(texts))
        index = jax.process_index()
        self._found = {t: found for t, found in self._found.items() if t in texts[index]}
        with together():  # a prompt that cannot be read must not leave the others waiting
            spare = self._tokenizer(texts[index][0], num_tokens)
            tokenized = {text: self._tokenizer(text, num_tokens) for text in new[index]}
        for start in range(0, max(map(len, new)), rows):
            part = new[index][start : start + rows]
            # One that has none left encodes any text again.
            filled = [*(tokenized[text] for text in part), *[spare] * (rows - len(part))]
            embedded = self._embed(filled)
            for k, text in enumerate(part):
                row = jax.tree.map(lambda x, k=k: x[k : k + 1], embedded)
                self._found[text] = dataclasses.replace(tokenized[text], embedding=row)
