"""Scores the images of a public benchmark in a folder, whoever made them.

A file that is no picture, or none that the benchmark can take, ends nothing: it scores as one that
is missing, is counted in `failures/unreadable`, and is named (`unreadable`).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath

from univg_jax.errors import UserError, check_name
from univg_jax.evaluation import metrics, score
from univg_jax.evaluation.fid import FeatureSums, merge
from univg_jax.evaluation.job import missing
from univg_jax.evaluation.metrics import Ratio
from univg_jax.evaluation.official import Columns, Official, Request, Row, requests_in
from univg_jax.evaluation.scorers import PROTOCOLS, Scorers, backbones, local_mesh
from univg_jax.evaluation.summaries import Features, Scores, Summary, column
from univg_jax.images import open_picture, to_rgb
from univg_jax.progress import Bar
from univg_jax.together import each_together, of_all

Item = TypeVar("Item")
Result = TypeVar("Result")
UNREADABLE = "failures/unreadable"
_TRIVIAL = "trivial_"  # before the name of an answer that needs no model
_CHUNK = 256  # pictures whose features are added up at once


@dataclasses.dataclass(frozen=True)
class Read:
    """The pictures of a request's files, None for one that is missing or cannot be read; and by the
    names of the latter, why not.
    """

    images: Sequence[np.ndarray | None]
    reasons: Mapping[str, str]


def read_images(benchmark: Official, request: Request, folder: epath.PathLike) -> Read:
    """The pictures of a request's files that the benchmark can take."""
    images: list[np.ndarray | None] = []
    reasons: dict[str, str] = {}
    for name in request.files:
        image = None
        try:
            image = to_rgb(open_picture((epath.Path(folder) / name).read_bytes()), drop_alpha=True)
            benchmark.check_image(image)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except UserError as error:
            image, reasons[name] = None, str(error)
        except OSError as error:
            reasons[name] = f"cannot be read: {error.strerror or error}"
        images.append(image)
    return Read(images, reasons)


def unreadable(
    benchmark: Official,
    requests: Sequence[Request],
    scores: Sequence[Scores],
    folder: epath.PathLike,
) -> dict[int, Mapping[str, str]]:
    """By the place of a row, those of its files that cannot be read, and why not.

    Only rows whose `scores` count some are read again.
    """
    return {
        place: read_images(benchmark, requests[place], folder).reasons
        for place, entry in enumerate(scores)
        if entry[UNREADABLE].total.any()
    }


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of all rows, and the sums of all features by name."""

    rows: Sequence[Scores]
    sums: Mapping[str, FeatureSums]

    def summary(
        self, benchmark: Official, rows: Sequence[Row], *, without: Collection[str] = ()
    ) -> Summary:
        """The benchmark's numbers, and the official ones of trivial answers; but for those of
        scorers that a user does `without`.
        """
        found = {**benchmark.summary(rows, self.rows), **benchmark.distances(self.sums)}
        if any(UNREADABLE in entry for entry in self.rows[:1]):
            found[UNREADABLE] = float(metrics.merge(column(self.rows, UNREADABLE)).total.sum())
        for name in benchmark.trivial:
            scores = [_of_trivial(name, columns) for columns in self.rows]
            numbers = benchmark.summary(rows, scores)
            numbers = {**numbers, **benchmark.distances(_of_trivial(name, self.sums))}
            found |= {
                f"{_TRIVIAL}{name}/{metric}": number
                for metric, number in numbers.items()
                if {"strict", "failures"}.isdisjoint(metric.split("/"))
            }
        left = {part for name in without for part in benchmark.needs[name]}
        return {name: x for name, x in found.items() if left.isdisjoint(name.split("/"))}


def check_scorers(
    benchmark: Official, names: Collection[str], *, without: Collection[str] = ()
) -> None:
    """Raises UserError for a scorer that is needed, and is neither given nor done `without`."""
    for name in without:
        check_name(name, benchmark.needs, what=f"scorer of {benchmark.name}:")
        if not benchmark.needs[name]:
            raise UserError(f"{benchmark.name} has no number without the scorer {name!r}")
    for name, numbers in benchmark.needs.items():
        if name not in names and name not in without:
            rest = f"; --without={name} leaves out {', '.join(numbers)}" if numbers else ""
            given = benchmark.weights.get(name, PROTOCOLS[name])
            raise UserError(f"{benchmark.name} needs the scorer {name!r}: {given}{rest}")


def check_settings(benchmark: Official, scorers: Scorers) -> None:
    """Raises UserError for a scorer opened with another setting than the benchmark names."""
    for name, scorer in scorers.items():
        for key, value in getattr(scorer, "opened_with", {}).items():
            wanted = benchmark.settings.get(key, value)
            if wanted != value:
                raise UserError(
                    f"{benchmark.name} has {key}={wanted}, but the scorer {name!r} has "
                    f"{key}={value}: give both the same"
                )


def warn_of_networks(benchmark: Official, scorers: Scorers) -> None:
    """Warns of networks of another size than the benchmark names."""
    for name, backbone in backbones(scorers).items():
        named = benchmark.settings.get(name, backbone)
        if named != backbone:
            logging.warning(
                "%s has %s=%s, but the scorer %r is %s: these numbers do not compare",
                benchmark.name,
                name,
                named,
                name,
                backbone,
            )


def score_images(
    benchmark: Official, rows: Sequence[Row], folder: epath.PathLike, scorers: Scorers
) -> Scored:
    """The sums and counts of each row, from the images in `folder`.

    All processes call it, each reads its share of the rows, and all return all rows. A scorer that
    waits for a server has a `concurrency`: so many rows are scored at once. Raises UserError for a
    folder that has no picture of the benchmark, and what `check_settings` and the benchmark's
    `check_scoring` refuse.
    """
    check_settings(benchmark, scorers)
    benchmark.check_scoring(rows, scorers)
    count, index = jax.process_count(), jax.process_index()
    requests = requests_in(benchmark, rows, folder)
    if len(missing(requests, folder)) == sum(len(request.files) for request in requests):
        expected = benchmark.requests(rows[:1])[0].files[0]
        raise UserError(
            f"{folder} has no image of {benchmark.name}: expected {expected} and others"
        )
    template = _columns(benchmark, rows[0], None, requests[0], scorers)
    sums = _Sums({name: f.convention for name, f in template.items() if isinstance(f, Features)})

    def scored(number: int) -> tuple[int, Columns] | None:
        if number >= len(rows):  # equally many turns on every process, which may have no row left
            return None
        found = read_images(benchmark, requests[number], folder)
        with local_mesh():
            return number, _columns(benchmark, rows[number], found, requests[number], scorers)

    found: dict[int, Scores] = {}
    turns = range(index, -(-len(rows) // count) * count, count)
    with (
        Bar(total=len(rows), desc="score", unit="row", disable=index > 0) as bar,
        computed_ahead(scored, turns, scorers.values()) as rows_scored,
    ):
        for item in each_together(rows_scored):
            if item is not None:
                number, columns = item
                found[number] = sums.without_features(columns)
            bar.update(min(count, len(rows) - bar.n))
    ratios = {name: ratio for name, ratio in template.items() if isinstance(ratio, Ratio)}
    table = score.gather(found, count=len(rows), template=ratios)
    by_row = [{name: column[k] for name, column in table.items()} for k in range(len(rows))]
    return Scored(by_row, sums.gathered())


def _columns(
    benchmark: Official,
    row: Row,
    read: Read | None,
    request: Request,
    scorers: Scorers,
) -> Columns:
    """What a row's images score, and with their names before it, trivial answers.

    With nothing `read` it is what nothing would score.
    """
    count = len(request.files)
    images, reasons = ([None] * count, {}) if read is None else (read.images, read.reasons)
    columns = {**benchmark.score(row, images, scorers), UNREADABLE: Ratio.of(len(reasons), count)}
    for name, answer in benchmark.trivial.items():
        picture = None if read is None else answer(row)
        scores = benchmark.score(row, [picture] * count, scorers)
        columns |= {f"{_TRIVIAL}{name}/{metric}": value for metric, value in scores.items()}
    return columns


def _of_trivial(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of columns or sums those of a trivial answer, by their own names."""
    prefix = f"{_TRIVIAL}{name}/"
    return {key.removeprefix(prefix): x for key, x in values.items() if key.startswith(prefix)}


@contextlib.contextmanager
def computed_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], scorers: Iterable[Any]
) -> Iterator[Iterator[Result]]:
    """`function(item)` of each in their order, as many at once as the scorers' `concurrency`.

    An error, of the function or in the block, ends all of it: threads that wait to ask a server
    again give up, those whose answers are on the way keep them first.
    """
    scorers = list(scorers)
    threads = max([1, *(getattr(scorer, "concurrency", 1) for scorer in scorers)])
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            yield _in_order((pool.submit(function, item) for item in items), ahead=2 * threads)
        except BaseException:
            with contextlib.ExitStack() as stack:
                for scorer in scorers:
                    if hasattr(scorer, "interrupted"):
                        stack.enter_context(scorer.interrupted())
                pool.shutdown(cancel_futures=True)
            raise


def _in_order(
    submitted: Iterator[concurrent.futures.Future[Result]], *, ahead: int
) -> Iterator[Result]:
    """The results in their order, with up to `ahead` more on their way; an error comes at once."""
    waiting = collections.deque(itertools.islice(submitted, ahead))
    while waiting:
        waiting.extend(itertools.islice(submitted, 1))
        while not waiting[0].done():
            unfinished = [future for future in waiting if not future.done()]
            done, _ = concurrent.futures.wait(
                unfinished, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                future.result()
        yield waiting.popleft().result()


class _Sums:
    """Sums of the features of this process's rows, by name, in chunks that fit in memory."""

    def __init__(self, conventions: Mapping[str, str]):
        self._conventions = conventions
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in conventions}
        self._sums: dict[str, FeatureSums] = {}

    def without_features(self, columns: Columns) -> Scores:
        """The ratios of a row, whose features are added."""
        ratios = {}
        for name, value in columns.items():
            if isinstance(value, Ratio):
                ratios[name] = value
            elif value.vector is not None:
                self._waiting[name].append(value.vector)
                if len(self._waiting[name]) >= _CHUNK:
                    self._add(name)
        return ratios

    def _add(self, name: str) -> None:
        features = np.stack(self._waiting[name])
        self._waiting[name] = []
        made = FeatureSums.of(features, convention=self._conventions[name])
        self._sums[name] = self._sums[name] + made if name in self._sums else made

    def gathered(self) -> dict[str, FeatureSums]:
        """The sums of all processes, which all call it; without names that nobody has."""
        for name, waiting in self._waiting.items():
            if waiting:
                self._add(name)
        if jax.process_count() == 1:
            return self._sums
        gathered = {}
        for name, convention in self._conventions.items():
            own = self._sums.get(name)
            widths = of_all(np.int32(own.sums.shape[-1] if own else 0))
            if width := int(widths.max()):
                empty = FeatureSums.of(np.zeros((0, width)), convention=convention)
                gathered[name] = merge(_of_all_processes(own or empty))
        return gathered


def _of_all_processes(own: FeatureSums) -> list[FeatureSums]:
    # As 32-bit words: on its way through a device JAX would round float64 to float32.
    parts = (np.array([own.count], float), own.sums, own.products)
    words = of_all(tuple(part.view(np.uint32) for part in parts))
    counts, sums, products = (np.ascontiguousarray(x).view(np.float64) for x in words)
    return [
        FeatureSums(own.convention, int(count), *arrays)
        for count, *arrays in zip(counts[:, 0], sums, products, strict=True)
    ]
