"""What frozen encoders make of a run's prompts and pictures, from a cache on disk.

`CachedTokenizer` returns each prompt's embedding together with its tokens, `CachedLatents` the
latents of each row's pictures. A prompt is found by the hash of its tokens, a picture by that of
the bytes that the encoder would see. So what has changed is missing, never stale, and a cache of
another encoder is refused. `data_pipelines.cache_files` says how a cache lies on disk, and
`univg_jax.precompute` makes one.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Shaped, UInt8

from data_pipelines.cache_files import Arrays, Cache, Kind, Writer
from data_pipelines.tasks import TASKS, Example
from data_pipelines.tokenizer import TokenizedText, Tokenizer
from univg_jax.batch import Latents, Text
from univg_jax.errors import NotFoundError, quote
from univg_jax.images import check_finite

TEXT = Kind(
    what="the embeddings of another text encoder",
    record="cache.json",
    prefix="",
    fields=("emb", "mask", "pooled"),
    unit="prompts",
)
LATENTS = Kind(
    what="the latents of another codec",
    record="latents.json",
    prefix="latents_",
    fields=("latents",),
    unit="latents",
)
TEXT_ROWS = 64  # prompts that are embedded at a time

Embed = Callable[[Shaped[np.ndarray, "b m"], Shaped[np.ndarray, "b m"]], Text]
Encode = Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b h2 w2 c"]]


class CachedTokenizer:
    """`tokenizer` whose prompts come with their embeddings from `folder`.

    Raises NotFoundError if there is no finished cache, and for a prompt that it does not have;
    UserError for a damaged one, and for one of another identity.
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: epath.PathLike, *, identity: Mapping[str, Any]
    ):
        self._tokenizer, self._cache = tokenizer, Cache(folder, TEXT)
        self._cache.check_identity(identity)

    def __call__(self, text: str, num_tokens: int) -> TokenizedText:
        tokenized = self._tokenizer(text, num_tokens)
        found = self._cache.find(text_key(tokenized))
        if found is None:
            raise NotFoundError(
                f"{self._cache.folder} has no embedding of the prompt {quote(text)}; "
                "make it anew (univg data cache)"
            )
        emb, mask, pooled = found
        return dataclasses.replace(tokenized, embedding=Text(emb=emb, mask=mask, pooled=pooled))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLatents:
    """The latents of one row's pictures; None where it has no such picture, or the cache not."""

    target: Float[np.ndarray, "h w c"] | None
    source: Float[np.ndarray, "h w c"] | None
    has_source: bool


class CachedLatents:
    """The latents of rows' targets and sources, from `folder`.

    Sources that are drawn anew for every row (`Task.draws_source`) are never there, and are encoded
    in the step; `draws_sources` says whether a run has any. With `encode_missing` so are all others
    that the cache lacks, targets too. The two decide the structure of `Latents`, and so the
    compiled step, which is the same on all hosts.

    Raises NotFoundError if there is no finished cache, UserError for a damaged one.
    """

    def __init__(self, folder: epath.PathLike, *, draws_sources: bool, encode_missing: bool):
        self._cache = Cache(folder, LATENTS)
        self._draws_sources, self._encode_missing = draws_sources, encode_missing
        identity = self._cache.identity
        self._cell, self._channels = identity.get("downsampling"), identity.get("channels")

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises UserError if the latents are those of another codec."""
        self._cache.check_identity(identity)

    def of(self, example: Example, *, task: str, drop: str, where: str) -> RowLatents:
        """The latents of an example's pictures.

        Raises NotFoundError for one that should be there and is not; `where` names the example.
        """
        has_source = example.source is not None and drop not in ("image", "both")
        found: dict[str, np.ndarray | None] = {"target": None, "source": None}
        for name, pixels in pictures(example, task=task, drop=drop).items():
            arrays = self._cache.find(picture_key(pixels))
            if arrays is not None:
                found[name] = arrays[0][0]
            elif not self._encode_missing:
                raise NotFoundError(
                    f"{self._cache.folder} has no latents of the {name} of {where}; make it anew "
                    "(univg data cache --what=latents), or encode in the step what it lacks "
                    "(data.encode_missing=True)"
                )
        return RowLatents(**found, has_source=has_source)

    def stack(self, rows: Sequence[RowLatents], *, height: int, width: int) -> Latents:
        """The latents of a batch of pictures of this size in pixels."""
        blank = np.zeros((height // self._cell, width // self._cell, self._channels), np.float32)
        missing = [row.source is None and row.has_source for row in rows]
        return Latents(
            target=np.stack([blank if row.target is None else row.target for row in rows]),
            source=np.stack([blank if row.source is None else row.source for row in rows]),
            target_missing=np.array([row.target is None for row in rows])
            if self._encode_missing
            else None,
            source_missing=np.array(missing)
            if self._encode_missing or self._draws_sources
            else None,
        )


def pictures(example: Example, *, task: str, drop: str) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """The pictures of a row whose latents a cache holds: `target`, and `source` where it has one.

    None are a source that the row goes without, and one that is drawn anew for every row.
    """
    found = {"target": example.target}
    is_shown = example.source is not None and drop not in ("image", "both")
    if is_shown and not TASKS[task].draws_source:
        found["source"] = example.source
    return found


def text_key(row: TokenizedText) -> bytes:
    """The hash by which a prompt is found: of its tokens and of which of them count."""
    content = row.tokens.astype("<i4").tobytes() + row.text_mask.astype(np.uint8).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def picture_key(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The hash by which a picture is found: of its pixels and its shape. It takes 1 ns a byte."""
    hashed = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(pixels))
    return hashed.digest()


def text_writer(
    folder: epath.PathLike,
    *,
    embed: Embed,
    identity: Mapping[str, Any],
    batch_size: int = TEXT_ROWS,
    **options: Any,
) -> Writer[TokenizedText]:
    """Writes the embeddings of prompts, by `embed(tokens, text_mask)`.

    Rows are of `text_key`. `embed` gets `batch_size` of them at a time, and `options` are those of
    `Writer`. An embedding that is not finite ends the build with a UserError that has the prompt.
    """

    def encode(rows: Sequence[TokenizedText]) -> Arrays:
        # The last batch is filled up, so that `embed` compiles for one shape only.
        padded = [*rows, *[rows[-1]] * (batch_size - len(rows))]
        tokens = np.stack([row.tokens for row in padded])
        text = embed(tokens, np.stack([row.text_mask for row in padded]))
        arrays = {name: np.asarray(getattr(text, name))[: len(rows)] for name in TEXT.fields}
        names = [f"the embedding of the prompt {quote(row.text)}" for row in rows]
        for name in ("emb", "pooled"):
            check_finite(arrays[name].astype(np.float32), names, what="embedding")
        return arrays

    return Writer(
        folder, TEXT, identity=identity, encode=encode, batch_size=lambda _: batch_size, **options
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture to encode, and what it is, for messages."""

    pixels: UInt8[np.ndarray, "h w 3"]
    name: str


def latents_writer(
    folder: epath.PathLike,
    *,
    encode: Encode,
    identity: Mapping[str, Any],
    batch_size: Callable[[tuple[int, ...]], int],
    **options: Any,
) -> Writer[Picture]:
    """Writes the latents of pictures, by `encode(pixels)`.

    Rows are of `picture_key`, and their group is the shape of the pixels. `encode` gets
    `batch_size(shape)` of them at a time, and `options` are those of `Writer`. Latents that are not
    finite end the build with a UserError that names the picture.
    """

    def encode_all(rows: Sequence[Picture]) -> Arrays:
        size = batch_size(rows[0].pixels.shape)
        padded = [*rows, *[rows[-1]] * (size - len(rows))]
        latents = np.asarray(encode(np.stack([row.pixels for row in padded])))[: len(rows)]
        check_finite(latents, [f"the latents of {row.name}" for row in rows], what="latents")
        return {"latents": latents}

    return Writer(
        folder,
        LATENTS,
        identity=identity,
        encode=encode_all,
        batch_size=batch_size,
        **options,
    )
