"""Embeddings of prompts on disk, so that a run need not hold its text encoders.

A cache is a folder, local or in a bucket. Its `cache.json` says whose embeddings these are
(`identity`: the encoder, the hash of its weights, the number of tokens), and `NNNNN.safetensors`
hold them. A prompt is found by the hash of its tokens. So a changed caption is missing, never
stale, and a cache of another encoder is refused. `CachedTokenizer` returns each prompt's embedding
together with its tokens; nothing else in the data pipeline knows of caches.

What is on disk is checked when it is read. Each row has a CRC-32, made and compared at about
4 GB/s: a millisecond for a prompt of SD3 in float32. The rows' keys and CRCs have a checksum in
`cache.json`, which has one of itself.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipelines import tasks
from data_pipelines.collate import Collator
from data_pipelines.held_out import HeldOut
from data_pipelines.mixture import Stream
from data_pipelines.tokenizer import TokenizedText, Tokenizer
from univg_jax.batch import Text
from univg_jax.errors import AlreadyExistsError, NotFoundError, UserError, quote
from univg_jax.files import read_sealed, write_sealed, write_whole
from univg_jax.images import check_finite
from univg_jax.progress import Bar
from univg_jax.settings import Config

RECORD = "cache.json"
FIELDS = ("emb", "mask", "pooled")
PART = r"\d{5,}\.safetensors"
FILE_BYTES = 2**30  # a file is serialized in memory, so it should not be much larger

Embed = Callable[[Shaped[np.ndarray, "b m"], Shaped[np.ndarray, "b m"]], Text]


class CachedTokenizer:
    """`tokenizer` whose prompts come with their embeddings from `folder`.

    Raises NotFoundError if there is no finished cache, and for a prompt that it does not have;
    UserError for a damaged one, and for one of another identity.
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: epath.PathLike, *, identity: Mapping[str, Any]
    ):
        self._tokenizer, self._folder = tokenizer, epath.Path(folder)
        record = self._folder / RECORD
        if not record.exists():
            raise NotFoundError(
                f"{folder} has no {RECORD}: not a finished cache (univg data cache)"
            )
        stored = read_sealed(record)
        if isinstance(stored.get("files"), list):
            raise UserError(
                f"{folder} has no checksums: an earlier version made it; make it anew "
                "(univg data cache)"
            )
        files, stored_identity = stored.get("files"), stored.get("identity")
        if not (isinstance(files, dict) and isinstance(stored_identity, dict)):
            raise UserError(f"{record} is damaged: it has no files, or no identity")
        for key in {**stored_identity, **identity}:
            found, expected = stored_identity.get(key), identity.get(key)
            if found != expected:
                raise UserError(
                    f"{folder} has the embeddings of another text encoder: {key} is {found!r}, "
                    f"this run's {expected!r}; make it anew (univg data cache)"
                )
        self._copies: epath.Path | None = None
        self._places: dict[bytes, tuple[str, Any, int]] = {}  # prompt -> name, open file, row in it
        for name, expected in files.items():
            try:
                if not re.fullmatch(PART, name):
                    raise OSError("it is none of its files")
                file = safe_open(self._local(self._folder / name), framework="np")
                keys, sums = file.get_tensor("keys"), file.get_tensor("sums")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self._folder / name} is not a readable part of the cache: {error}"
                ) from None
            if _sum_of_index(keys, sums) != expected:
                raise UserError(f"{self._folder / name} is damaged; make the cache anew")
            self._places |= {bytes(key): (name, file, row) for row, key in enumerate(keys)}

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        tokenized = self._tokenizer(text, num_tokens)
        place = self._places.get(_key(tokenized))
        if place is None:
            raise NotFoundError(
                f"{self._folder} has no embedding of the prompt {quote(text)}; "
                "make it anew (univg data cache)"
            )
        name, file, row = place
        try:
            emb, mask, pooled, written = (
                file.get_slice(name)[row : row + 1] for name in (*FIELDS, "sums")
            )
            is_sound = _sum_of_row(emb, mask, pooled) == written[0]
        except SafetensorError:
            is_sound = False
        if not is_sound:
            raise UserError(f"{self._folder / name} is damaged at row {row}; make the cache anew")
        return dataclasses.replace(tokenized, embedding=Text(emb=emb, mask=mask, pooled=pooled))

    def _local(self, path: epath.Path) -> str:
        """The path of a local file with this content."""
        if "://" not in os.fspath(path):
            return os.fspath(path)
        # Rows are read one at a time from a file that is mapped into memory, which only a local
        # file can be. So a bucket's files are copied, for as long as this tokenizer lives.
        if self._copies is None:
            self._copies = epath.Path(tempfile.mkdtemp(prefix="univg_cache_"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        copy = self._copies / path.name
        path.copy(copy)
        return os.fspath(copy)


def prompts(
    config: Config,
    collator: Collator,
    *,
    steps: int,
    begin: Callable[[Stream], None] = lambda stream: None,
) -> list[TokenizedText]:
    """Every distinct prompt of the first `steps` training steps, validation and previews.

    `begin` puts the stream where the run begins, if it follows another one.
    """
    seen: dict[bytes, TokenizedText] = {}

    def remember(text: str, num_tokens: int) -> TokenizedText:
        tokenized = dataclasses.replace(collator.tokenizer(text, num_tokens), text=text)
        seen.setdefault(_key(tokenized), tokenized)
        return tokenized

    remembering = dataclasses.replace(collator, tokenizer=remember)
    stream = Stream(config, collator=remembering)
    begin(stream)
    for _ in Bar(range(steps), desc="read prompts", unit="step"):
        next(stream)
    stream.close()
    num = max(config.train.eval_examples, config.train.sample_examples)
    for name in stream.shares:
        remember(tasks.prompt(name, ""), config.data.num_tokens)  # of rows without their text
        # Making the sequence tokenizes the prompts of its examples.
        HeldOut(config, name, split="validation", num=num, collator=remembering)
    return list(seen.values())


def write_cache(
    folder: epath.PathLike,
    rows: Iterable[TokenizedText],
    *,
    embed: Embed,
    identity: Mapping[str, Any],
    batch_size: int = 64,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Embeds `rows` by `embed(tokens, text_mask)` and writes the cache; returns their number.

    `embed` gets `batch_size` rows at a time. A file of about `file_bytes` is written as soon as its
    rows are embedded, and `cache.json` last, so that a killed build leaves no cache.

    Raises AlreadyExistsError if `folder` has a cache, and UserError with the prompt if an embedding
    is not finite.
    """
    folder, rows = epath.Path(folder), list(rows)
    if (folder / RECORD).exists():
        raise AlreadyExistsError(f"{folder} has a cache; choose another folder or delete it")
    files: dict[str, str] = {}  # name -> checksum of its keys and of its rows' sums
    pending: list[dict[str, np.ndarray]] = []

    def flush() -> None:
        if pending:
            arrays = {name: np.concatenate([p[name] for p in pending]) for name in pending[0]}
            name = f"{len(files):05d}.safetensors"
            files[name] = _sum_of_index(arrays["keys"], arrays["sums"])
            write_whole(folder / name, save(arrays))
            pending.clear()

    for arrays in _embedded(rows, embed=embed, batch_size=batch_size):
        pending.append(arrays)
        if sum(x.nbytes for arrays in pending for x in arrays.values()) >= file_bytes:
            flush()
    flush()
    record = dict(identity=dict(identity), files=files, prompts=len(rows))
    write_sealed(folder / RECORD, record)
    return len(rows)


def _embedded(
    rows: Sequence[TokenizedText], *, embed: Embed, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays to store for each batch of rows, with a progress bar."""
    with Bar(total=len(rows), desc="embed prompts", unit="prompt") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            # The last batch is filled up, so that `embed` compiles for one shape only.
            padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]
            tokens = np.stack([row.tokens for row in padded])
            text = embed(tokens, np.stack([row.text_mask for row in padded]))
            arrays = {name: np.asarray(getattr(text, name))[: len(batch)] for name in FIELDS}
            names = [
                f"the embedding of the prompt {quote(row.text)}" if row.text else f"row {start + i}"
                for i, row in enumerate(batch)
            ]
            for name in ("emb", "pooled"):
                check_finite(arrays[name].astype(np.float32), names, what="embedding")
            keys = np.stack([np.frombuffer(_key(row), np.uint8) for row in batch])
            rows_of = zip(*(np.split(arrays[name], len(batch)) for name in FIELDS), strict=True)
            sums = np.array([_sum_of_row(*row) for row in rows_of], np.uint32)
            yield {**arrays, "keys": keys, "sums": sums}
            bar.update(len(batch))


def _key(row: TokenizedText) -> bytes:
    """The hash by which a prompt is found: of its tokens and of which of them count."""
    content = row.tokens.astype("<i4").tobytes() + row.text_mask.astype(np.uint8).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _sum_of_row(*arrays: Shaped[np.ndarray, "1 ..."]) -> int:
    """CRC-32 of a row's arrays, with their shapes and dtypes."""
    total = 0
    for array in arrays:
        total = zlib.crc32(f"{array.dtype.name}{array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), total)
    return total


def _sum_of_index(keys: np.ndarray, sums: np.ndarray) -> str:
    return hashlib.blake2b(keys.tobytes() + sums.tobytes(), digest_size=16).hexdigest()
