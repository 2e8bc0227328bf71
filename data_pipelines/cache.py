"""Embeddings of prompts on disk, so that a run need not hold its text encoders.

A cache is a folder: `cache.json` says whose embeddings these are (`identity`: encoder, hash of its
weights, number of tokens), `NNNNN.safetensors` hold them. A prompt is found by the hash of its
tokens: a changed caption is missing, never stale, and a cache of another encoder is refused.
`CachedTokenizer` gives each prompt's embedding with its tokens; nothing else in the data's way
knows of caches.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from data_pipelines import mixture, tasks
from data_pipelines.tokenizer import TokenizedText, Tokenizer
from univg_jax.batch import Text

RECORD = "cache.json"
FIELDS = ("emb", "mask", "pooled")


class CachedTokenizer:
    """`tokenizer` whose prompts come with their embeddings from `folder`.

    Raises FileNotFoundError without a finished cache there, ValueError for a damaged one, for one
    whose identity is not `identity`, and for a prompt that it does not have.
    """

    def __init__(self, tokenizer: Tokenizer, folder: str | Path, *, identity: Mapping[str, Any]):
        self._tokenizer, self._folder = tokenizer, Path(folder)
        file = self._folder / RECORD
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {RECORD}: not a finished cache (univg data cache)"
            )
        stored = json.loads(file.read_text())
        if different := [
            k
            for k in {**stored["identity"], **identity}
            if stored["identity"].get(k) != identity.get(k)
        ]:
            key = different[0]
            raise ValueError(
                f"{folder} has the embeddings of another text encoder: {key} is {stored['identity'].get(key)!r}, "
                f"this run's {identity.get(key)!r}; make it anew (univg data cache)"
            )
        self._places: dict[bytes, tuple[Any, int]] = {}
        for name in stored["files"]:
            try:
                opened = safe_open(self._folder / name, framework="np")
                keys = opened.get_tensor("keys")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self._folder / name} is not a readable part of the cache: {error}"
                ) from None
            self._places |= {bytes(key): (opened, row) for row, key in enumerate(keys)}

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        tokenized = self._tokenizer(text, num_tokens)
        place = self._places.get(_key(tokenized))
        if place is None:
            raise ValueError(
                f"{self._folder} has no embedding of the prompt {text!r}; make it anew (univg data cache)"
            )
        opened, row = place
        emb, mask, pooled = (opened.get_slice(name)[row : row + 1] for name in FIELDS)
        return dataclasses.replace(tokenized, embedding=Text(emb=emb, mask=mask, pooled=pooled))


def prompts(config: Any, tokenizer: Tokenizer, *, steps: int) -> list[TokenizedText]:
    """Every distinct prompt that a run of `config` tokenizes in its first `steps` steps, its
    validation and samples.
    """
    seen: dict[bytes, TokenizedText] = {}

    def recorder(text: str, num_tokens: int) -> TokenizedText:
        tokenized = tokenizer(text, num_tokens)
        seen.setdefault(_key(tokenized), tokenized)
        return tokenized

    size, num = (
        config.data.batch_size,
        max(config.train.eval_examples, config.train.sample_examples),
    )
    stream = mixture.make_stream(config, tokenizer=recorder)
    for _ in tqdm(range(steps), desc="read prompts", unit="step"):
        next(stream)
    stream.close()
    for name in stream.shares:
        recorder(tasks.prompt(name, ""), config.data.num_tokens)  # without its text
        for _ in mixture.eval_batches(
            config, name, split="validation", num=num, batch_size=size, tokenizer=recorder
        ):
            pass
    return list(seen.values())


def write_cache(
    folder: str | Path,
    rows: Iterable[TokenizedText],
    *,
    embed: Callable[[Shaped[np.ndarray, "b m"], Shaped[np.ndarray, "b m"]], Text],
    identity: Mapping[str, Any],
    batch_size: int = 64,
    file_rows: int = 4096,
) -> int:
    """Embeds `rows` by `embed(tokens, text_mask)`, `batch_size` at a time, and writes the cache;
    returns their number.

    `cache.json` is written last: a killed build leaves no cache. Raises FileExistsError if there is
    one.
    """
    folder, rows = Path(folder), list(rows)
    if (folder / RECORD).exists():
        raise FileExistsError(f"{folder} has a cache; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with tqdm(total=len(rows), desc="embed prompts", unit="prompt") as bar:
        for start in range(0, len(rows), file_rows):
            part = rows[start : start + file_rows]
            texts = []
            for first in range(0, len(part), batch_size):
                batch = part[first : first + batch_size]
                # one shape, one compilation
                padded = batch + [batch[-1]] * (batch_size - len(batch))
                text = embed(
                    np.stack([r.tokens for r in padded]), np.stack([r.text_mask for r in padded])
                )
                texts.append(
                    {name: np.asarray(getattr(text, name))[: len(batch)] for name in FIELDS}
                )
                bar.update(len(batch))
            arrays = {name: np.concatenate([text[name] for text in texts]) for name in FIELDS}
            keys = np.stack([np.frombuffer(_key(row), np.uint8) for row in part])
            files.append(f"{len(files):05d}.safetensors")
            save_file({**arrays, "keys": keys}, folder / files[-1])
    (folder / RECORD).write_text(
        json.dumps(dict(identity=dict(identity), files=files, prompts=len(rows)), indent=1)
    )
    return len(rows)


def _key(row: TokenizedText) -> bytes:
    parts = (row.tokens.astype("<i4"), row.text_mask.astype(np.uint8))
    return hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=16).digest()
