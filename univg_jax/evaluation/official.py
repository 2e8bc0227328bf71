"""Public benchmarks: the rows of their official files, the images these ask for, and their scores.

Generation (`job.generate`) writes images in the benchmark's official layout, and scoring reads
them, whoever made them. So the official scorer may score ours, and ours another model's.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from univg_jax.evaluation.fid import FeatureSums
from univg_jax.evaluation.metrics import Image, Ratio
from univg_jax.evaluation.summaries import Features, Scores, Summary

Row = Any  # of a benchmark: an item of its official files
Columns = Mapping[str, Ratio | Features]  # of a row, by name
MAX_ITEMS = 2**21  # of a benchmark; with MAX_IMAGES of each, a sample id has 32 bits
MAX_IMAGES = 2**11


@dataclasses.dataclass(frozen=True)
class Output:
    """An input that is the file of another request, which is made before."""

    file: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The files that item `index` of a benchmark asks for.

    `inputs` are those of `Pipeline.run`. A picture may be a path or a function without arguments,
    which is read or called when it is due, or an `Output`. A file shows `cells` images, row by row
    in a square.

    The model makes squares. It is given the middle of a picture, or with `whole` all of it,
    squeezed, so that its answer is of all of it, too. Outside a mask the file has the picture's own
    pixels (`composite`), or what the model made there.
    """

    index: int
    task: str
    inputs: Mapping[str, Any]
    files: tuple[str, ...]
    cells: int = 1
    whole: bool = False
    composite: bool = True

    def __post_init__(self):
        if math.isqrt(self.cells) ** 2 != self.cells:
            raise ValueError(f"cells={self.cells}: expected a square number")
        if self.index >= MAX_ITEMS or len(self.files) * self.cells > MAX_IMAGES:
            raise ValueError(f"item {self.index} of {len(self.files)} x {self.cells} images")

    def sample_id(self, image: int) -> int:
        """What keys the noise of one of its images, beside the seed."""
        return self.index * MAX_IMAGES + image


@dataclasses.dataclass(frozen=True)
class Published:
    """A number that somebody published, and where it stands."""

    system: str
    metric: str  # a name in the summary
    value: float
    source: str


# Open models of 2025 and 2026: mage_flow/README.md of github.com/microsoft/Mage.
MAGE_FLOW = "README of Mage-Flow"


def of_systems(metric: str, source: str, systems: Mapping[str, float]) -> tuple[Published, ...]:
    """One number of each of several systems, from one source."""
    return tuple(Published(system, metric, value, source) for system, value in systems.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Official:
    """A public benchmark, one module of `evaluation/benchmarks/`.

    `read(path)` reads its official files; with `excerpt=True` there may be fewer rows.
    `requests(rows)` has the images that each row asks for, and `side_files(rows)` what the official
    scorer reads beside them, by name: a text, or a function that is called where the file is not
    there yet. `found(rows, folder)` has the names of each row's images in a folder that somebody
    filled, where the official scorer takes other names, or another number of images, than
    `requests` does; it raises UserError for images of other rows.

    `check_image(image)` raises UserError, whose message begins with a verb, for a picture that
    cannot be scored. It then counts as one that cannot be read.

    `score(row, images, scorers)` has the sums and counts of a row's images, and features of sets of
    pictures; None is an image that is not there or cannot be read. `summary(rows, scores)` has the
    official numbers, of which `primary` is the first to look at, and `distances(sums)` those that
    compare sets of pictures, from the sums of all features by name.

    `needs` says for each scorer which numbers it is for, by the parts of their names: of
    "strict/clip_t" these are "strict" and "clip_t", and none stands for all numbers. A scorer that
    a user does without is not among `scorers`, and these numbers are left out of the results.
    `weights` says what to give for a scorer, where the benchmark wants one of its own.
    `quality(scores)` says how good the images of a row are, to show the best and the worst: higher
    is better, NaN if it is not known.

    `trivial` has answers that need no model, by name: a row's picture, or None where it has none.
    They are scored beside the images; names of their numbers begin with `trivial_NAME`.

    A benchmark of the model itself has no images, and its `score` is that of a row of which nothing
    is known. All processes call `measure(pipeline, rows, seed)`, and each gets the columns of its
    own rows, by their numbers.

    `check_scoring(rows, scorers)` raises UserError for what scoring lacks beside the scorers, such
    as the prompts of a judge: it is asked before any image is made.

    `settings` are choices in which papers differ, so a result has to say them; those that are
    named in `scoring` change no image. Raise `version` when numbers would change.
    """

    name: str
    version: int
    read: Callable[..., Sequence[Row]]
    requests: Callable[[Sequence[Row]], list[Request]]
    score: Callable[
        [Row, Sequence[Image | None], Mapping[str, Any]], Mapping[str, Ratio | Features]
    ]
    summary: Callable[[Sequence[Row], Sequence[Scores]], Summary]
    primary: str
    trivial: Mapping[str, Callable[[Row], Image | None]] = dataclasses.field(default_factory=dict)
    quality: Callable[[Scores], float] = lambda scores: next(iter(scores.values())).value
    distances: Callable[[Mapping[str, FeatureSums]], Summary] = lambda sums: {}
    needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    check_scoring: Callable[[Sequence[Row], Mapping[str, Any]], None] = lambda rows, scorers: None
    side_files: Callable[[Sequence[Row]], Mapping[str, str | Callable[[], bytes]]] = lambda rows: {}
    check_image: Callable[[Image], object] = lambda image: None
    found: Callable[[Sequence[Row], epath.PathLike], Sequence[Sequence[str]]] | None = None
    measure: Callable[[Any, Sequence[Row], int], Mapping[int, Scores]] | None = None
    published: tuple[Published, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scoring: tuple[str, ...] = ()


def requests_in(benchmark: Official, rows: Sequence[Row], folder: epath.PathLike) -> list[Request]:
    """The requests of the rows, with the files that `folder` has of them.

    Where it has fewer than were asked for, the first of the other names are files that are missing.
    """
    requests = benchmark.requests(rows)
    if benchmark.found is None:
        return requests
    filled = []
    for request, there in zip(requests, benchmark.found(rows, folder), strict=True):
        absent = [name for name in request.files if name not in there]
        absent = absent[: max(0, len(request.files) - len(there))]
        filled.append(dataclasses.replace(request, files=(*there, *absent)))
    return filled


def requests_of(
    rows: Sequence[Row],
    image_files: Callable[[Row], tuple[str, ...]],
    *,
    task: str = "t2i",
    inputs: Callable[[Row], Mapping[str, Any]] = lambda row: {"prompt": row.prompt},
    **options: Any,
) -> list[Request]:
    """A request of each row: by default, pictures of its `prompt`. `options` are of `Request`."""
    return [
        Request(index=index, task=task, inputs=inputs(row), files=image_files(row), **options)
        for index, row in enumerate(rows)
    ]
