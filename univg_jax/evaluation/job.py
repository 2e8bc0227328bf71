"""Generation apart from scoring: the images of a benchmark, as files in its official layout.

A `Request` is what one item of a benchmark asks for. `generate` makes the files that are not there
yet, and no other. Whoever made a file does not matter: a job that was killed goes on, and a folder
that another model filled is scored by the same code.

An image is a function of (seed, item, image number): its noise is keyed by them, and not by the
batch, the process or the device that it was made on. A request may take the file of another one
(`Output`), as each turn of a dialog does. So requests are made in stages, and what is taken is
always read from its file, also where this run wrote it.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from data_pipelines import tasks, transforms
from data_pipelines.collate import Collator
from data_pipelines.tasks import INPUTS, TASKS
from univg_jax.batch import Batch
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.generate import exist
from univg_jax.evaluation.metrics import Image
from univg_jax.evaluation.official import Official, Output, Request, Row
from univg_jax.evaluation.prompts import EncodedPrompts
from univg_jax.files import write_whole
from univg_jax.images import jpeg_bytes, png_bytes
from univg_jax.inputs import read_input
from univg_jax.pipeline import Pixels
from univg_jax.progress import Bar
from univg_jax.together import each_together, of_first, together

JPEG_QUALITY = 95
_WRITERS = 4
_AHEAD = 2  # batches that are read and tokenized while one is computed
_WINDOW = 4  # batches whose prompts are encoded before: more take memory, 5 MB each with T5-XXL

# Images of a batch of one task, for the rows of this process.
Answer = Callable[[Batch, str], Pixels]


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to make, and the numbers of its images among those of the request."""

    request: Request
    number: int

    @property
    def name(self) -> str:
        return self.request.files[self.number]

    @property
    def images(self) -> range:
        cells = self.request.cells
        return range(self.number * cells, (self.number + 1) * cells)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """This process's part of a batch: which file each row is of; None for padding."""

    task: str
    batch: Batch
    files: tuple[_File | None, ...]


@dataclasses.dataclass(frozen=True)
class _Window:
    """Images of one task, some batches of them: files and numbers of images, by process.

    Without any left, a process works on the image `spare` again: a program runs on all devices or
    none.
    """

    task: str
    shares: Sequence[Sequence[tuple[_File, int]]]
    spare: tuple[_File, int]


def missing(requests: Sequence[Request], folder: epath.PathLike) -> list[_File]:
    """The files that are not there yet. All processes call it, and get the same.

    Raises UserError if two requests ask for one file.
    """
    files = [_File(r, k) for r in requests for k in range(len(r.files))]
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two items of the benchmark ask for the file {twice}")
    return [file for file, is_there in zip(files, exist(names, folder)) if not is_there]


def write_side_files(benchmark: Official, rows: Sequence[Row], folder: epath.PathLike) -> None:
    """Writes what the official scorer reads beside the images. All processes call it."""
    with together():
        if jax.process_index() == 0:
            for name, content in benchmark.side_files(rows).items():
                path = epath.Path(folder) / name
                if not callable(content):
                    write_whole(path, content)
                elif not path.exists():
                    write_whole(path, content())


def generate(
    requests: Sequence[Request],
    folder: epath.PathLike,
    *,
    answer: Answer,
    collator: Collator,
    batch_size: int,
    prompts: EncodedPrompts | None = None,
) -> int:
    """Makes the files of `requests` that `folder` does not have; returns how many images that were.

    All processes call it. `batch_size` is global; the last batch of a task is padded with rows that
    are not `valid`. Files are written by threads, whole or not at all. `prompts` is the collator's
    tokenizer where prompts are to be encoded before, each of them once.

    Raises UserError for a batch size that does not divide over the processes, an input that cannot
    be read, and a file that cannot be written; what was made before is kept. Raises ValueError for
    requests that wait for one another.
    """
    count = jax.process_count()
    if batch_size < 1 or batch_size % count:
        raise UserError(f"batch size {batch_size}: expected a multiple of {count} processes")
    folder, todo = epath.Path(folder), missing(requests, folder)
    total = sum(file.request.cells for file in todo)
    made, rows, stages = 0, batch_size // count, _stages(todo)
    with (
        Bar(total=total, desc="generate", unit="image", disable=jax.process_index() > 0) as bar,
        _Writer(folder) as writer,
    ):
        for files in stages:
            for window in _windows(files, rows=rows):
                if prompts is not None:
                    prompts.encode(_texts(window), collator.shape.num_tokens, rows=rows)
                batches = _batches(window, folder, collator=collator, rows=rows)
                for part in each_together(_ahead(batches)):
                    images = answer(part.batch, part.task)
                    for row, (image, file) in enumerate(zip(images, part.files)):
                        if file is not None:
                            is_whole = not file.request.composite
                            writer.add(file, image if is_whole else _keep(image, part.batch, row))
                            made += 1
                    bar.update(min(made * count, total) - bar.n)
            with together():  # the next stage may read what any process wrote
                writer.finish()
    return total


def _stages(todo: Sequence[_File]) -> list[list[_File]]:
    """The files to make, such that each stage takes nothing but files of earlier ones."""
    stages, left = [], list(todo)
    while left:
        names = {file.name for file in left}
        ready = [file for file in left if not names & _taken(file.request)]
        if not ready:
            raise ValueError(f"requests wait for one another: {', '.join(sorted(names)[:3])}")
        stages.append(ready)
        chosen = {file.name for file in ready}
        left = [file for file in left if file.name not in chosen]
    return stages


def _taken(request: Request) -> set[str]:
    return {given.file for given in request.inputs.values() if isinstance(given, Output)}


def _windows(todo: Sequence[_File], *, rows: int) -> Iterator[_Window]:
    """The next images of one task, _WINDOW batches at most, and each process's share of them."""
    count = jax.process_count()
    for task in dict.fromkeys(file.request.task for file in todo):
        files = [file for file in todo if file.request.task == task]
        # The images of one request on one process, where its prompt is encoded.
        order = {index: k for k, index in enumerate(dict.fromkeys(f.request.index for f in files))}
        shares = [
            [(f, k) for f in files if order[f.request.index] % count == p for k in f.images]
            for p in range(count)
        ]
        for start in range(0, max(map(len, shares)), rows * _WINDOW):
            parts = [share[start : start + rows * _WINDOW] for share in shares]
            yield _Window(task, parts, spare=next(part[0] for part in parts if part))


def _texts(window: _Window) -> list[list[str]]:
    """The prompts of each process, with their tags, and the tag alone."""
    shares = [share or [window.spare] for share in window.shares]
    prompts = [[f.request.inputs.get("prompt", "").strip() for f, _ in share] for share in shares]
    return [[tasks.prompt(window.task, text) for text in ("", *own)] for own in prompts]


def _batches(
    window: _Window, folder: epath.Path, *, collator: Collator, rows: int
) -> Iterator[_Rows]:
    """This process's rows of all batches; every process has equally many."""
    mine = window.shares[jax.process_index()]
    for start in range(0, max(map(len, window.shares)), rows):
        part = list(mine[start : start + rows])
        padding = [(mine or [window.spare])[-1]] * (rows - len(part))
        made = [
            collator.row(
                _example(file.request, folder, collator),
                task=window.task,
                sample_id=file.request.sample_id(image),
                valid=k < len(part),
            )
            for k, (file, image) in enumerate(part + padding)
        ]
        files = [file for file, _ in part] + [None] * len(padding)
        yield _Rows(window.task, collator(made), tuple(files))


def _example(request: Request, folder: epath.Path, collator: Collator) -> Any:
    """What the model is given; raises UserError that names the files that were asked for."""
    side = collator.shape.height
    try:
        given = {name: _due(value, folder) for name, value in request.inputs.items()}
        pictures = {name: read_input(name, given.get(name)) for name in INPUTS}
        if request.whole:
            pictures |= _squeezed(pictures, side)
        return TASKS[request.task].from_inputs(
            prompt=given.get("prompt", ""), **pictures, resolution=side
        )
    except UserError as error:
        raise _of_item(request, error) from None


def pictures_digest(requests: Sequence[Request]) -> str:
    """A digest of the pictures that requests give the model; empty if they give none.

    All processes call it; process 0 reads them. Raises UserError for one that cannot be read.
    """
    given = [
        (request, name, value)
        for request in requests
        for name, value in request.inputs.items()
        if name in INPUTS and not isinstance(value, Output)
    ]
    if not given:
        return ""
    found = np.zeros(32, np.uint8)
    with together():
        if jax.process_index() == 0:
            whole = hashlib.sha256()
            read = functools.lru_cache(_file_digest)  # sentences about one picture follow another
            for request, name, value in given:
                try:
                    if callable(value):
                        pixels = read_input(name, value())
                        whole.update(str(pixels.shape).encode() + pixels.tobytes())
                    else:
                        whole.update(read(os.fspath(value)))
                except UserError as error:
                    raise _of_item(request, error) from None
            found = np.frombuffer(whole.digest(), np.uint8)
    return of_first(found).tobytes().hex()[:16]


def rows_digest(rows: Sequence[Row]) -> str:
    """A digest of what a benchmark's items say, and of the files that they name, such as targets.

    Not of where these lie, nor of pictures that an item makes. All processes call it; process 0
    reads the files. Raises UserError for one that cannot be read.
    """
    found = np.zeros(32, np.uint8)
    with together():
        if jax.process_index() == 0:
            read = functools.lru_cache(_file_digest)
            text = json.dumps([_content(row, read) for row in rows], sort_keys=True)
            found = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return of_first(found).tobytes().hex()[:16]


def _content(value: Any, read: Callable[[str], bytes]) -> Any:
    """A value as JSON, with a file's digest for its path."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _content(x, read) for name, x in fields.items() if not callable(x)}
    if isinstance(value, Mapping):
        return [[_content(x, read) for x in item] for item in value.items()]
    if isinstance(value, tuple | list | np.ndarray):
        return [_content(x, read) for x in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and "/" in value and epath.Path(value).is_file():
        return read(value).hex()
    return value if isinstance(value, str | int | float | None) else repr(value)


def _file_digest(path: str) -> bytes:
    try:
        return hashlib.sha256(epath.Path(path).read_bytes()).digest()
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _of_item(request: Request, error: UserError) -> UserError:
    """The error with the files that were asked for."""
    return type(error)(f"item {request.index} ({request.files[0]}): {error}")


def _due(value: Any, folder: epath.Path) -> Any:
    if isinstance(value, Output):
        return folder / value.file
    return value() if callable(value) else value


def _squeezed(pictures: Mapping[str, np.ndarray | None], side: int) -> dict[str, np.ndarray]:
    """The image and the mask, if given, as squares."""
    planes = {"image": pictures["image"], "edit_mask": pictures["mask"]}
    given = {name: plane for name, plane in planes.items() if plane is not None}
    names = {"image": "image", "edit_mask": "mask"}
    squares = transforms.resize(given, height=side, width=side)
    return {names[name]: plane for name, plane in squares.items()}


def _keep(image: Image, batch: Batch, row: int) -> Image:
    """The image, with the source's own pixels where the mask does not ask for others."""
    if not batch.has_source[row] or batch.mask[row].all():
        return image
    return np.where(batch.mask[row] > 0, image, batch.source[row])


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """`items`, some of which a thread makes ahead."""
    end = object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(next, items, end) for _ in range(_AHEAD)]
        while (item := waiting.pop(0).result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item


class _Writer:
    """Writes files in threads, each as soon as it has all of its images."""

    def __init__(self, folder: epath.Path):
        self._folder, self._cells = folder, {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_WRITERS)
        self._writing: list[concurrent.futures.Future] = []

    def add(self, file: _File, image: Image) -> None:
        """Takes the next image of a file. Raises what went wrong with an earlier one."""
        cells = self._cells.setdefault(file.name, [])
        cells.append(image)
        if len(cells) == file.request.cells:
            picture = join(self._cells.pop(file.name))
            self._writing.append(self._pool.submit(_write, self._folder / file.name, picture))
        self._wait(most=4 * _WRITERS)  # or images would pile up where the disk is slow

    def _wait(self, *, most: int) -> None:
        while len(self._writing) > most or (self._writing and self._writing[0].done()):
            self._writing.pop(0).result()

    def finish(self) -> None:
        """Waits until all files are written."""
        self._wait(most=0)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _write(path: epath.Path, picture: UInt8[np.ndarray, "height width 3"]) -> None:
    """A PNG, or a JPEG where the official layout asks for one."""
    is_jpeg = path.suffix == ".jpg"
    write_whole(path, jpeg_bytes(picture, quality=JPEG_QUALITY) if is_jpeg else png_bytes(picture))


def join(images: Sequence[Image]) -> UInt8[np.ndarray, "height width 3"]:
    """Images of one size as a square of them, row by row."""
    side = math.isqrt(len(images))
    rows = [np.concatenate(images[k : k + side], axis=1) for k in range(0, len(images), side)]
    return np.concatenate(rows, axis=0)
