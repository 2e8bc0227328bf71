"""The result of a public benchmark on disk: its numbers, and all that is needed to repeat them.

    OUT/geneval-images-9c1d.../00000/samples/0000.png   images, in the official layout
    OUT/geneval-3f2a.../results.json                    the numbers
    OUT/geneval-3f2a.../scores.jsonl                    those of each row

A folder's name is a hash of the settings on which its content depends. So images serve every scorer
and any number of rows, and no result overwrites one of other settings.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.official import Official, Published, Request
from univg_jax.evaluation.results import FILE, Json, digest
from univg_jax.evaluation.summaries import Scores
from univg_jax.files import read_sealed, write_sealed, write_whole

VERSION = 1  # of the file
ROWS_FILE = "scores.jsonl"
SHOWN = 12  # cases of each kind (first, best, worst) that a report may show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorecard:
    """What a benchmark found, as its file has it.

    `settings` are what the numbers depend on; `provenance` says where and when they were made.
    `images` is the folder of the images: its name where it lies beside that of the file, or a path.
    `numbers` are None where nothing was counted. `cases` are rows to show: `first`, `best`,
    `worst`, each with its prompt, files and `quality`; and all rows with files that are
    `unreadable`, with the `reasons` by file.
    """

    benchmark: str
    settings: Json
    provenance: Json = dataclasses.field(default_factory=dict)
    images: str = ""
    rows: int = 0
    primary: str = ""
    numbers: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    published: Sequence[Json] = ()
    cases: Mapping[str, Sequence[Json]] = dataclasses.field(default_factory=dict)

    def folder(self, out: epath.PathLike) -> epath.Path:
        """Where results of these settings lie below `out`."""
        name = digest([VERSION, self.benchmark, self.settings])[:12]
        return epath.Path(out) / f"{self.benchmark}-{name}"

    def images_at(self, folder: epath.PathLike) -> epath.Path:
        """Where the images of results in `folder` lie."""
        return epath.Path(folder).parent / self.images  # a path that is absolute stays so

    def write(self, folder: epath.PathLike) -> None:
        """Writes results.json, whole or not at all."""
        content = {"version": VERSION, "kind": "public", **dataclasses.asdict(self)}
        write_sealed(epath.Path(folder) / FILE, content)

    @classmethod
    def read(cls, folder: epath.PathLike) -> "Scorecard":
        """The results in a folder. Raises NotFoundError for none, UserError for a damaged file."""
        path = epath.Path(folder) / FILE
        if not path.exists():
            raise NotFoundError(f"{path} is missing: `univg evaluate` writes it")
        content = read_sealed(path)
        if content.get("kind") != "public":
            raise UserError(f"{path} is not the result of a public benchmark")
        names = {field.name for field in dataclasses.fields(cls)}
        if content.get("version") != VERSION or names - set(content):
            raise UserError(f"{path} is of another version of univg_jax: evaluate again")
        return cls(**{name: content[name] for name in names})

    def table(self) -> str:
        """The numbers in columns of text, the primary one first, beside published ones."""
        published: dict[str, list[str]] = {}
        for entry in self.published:
            text = f"{entry['system']} {entry['value']:g}"
            published.setdefault(entry["metric"], []).append(text)
        names = [self.primary, *(name for name in self.numbers if name != self.primary)]
        names = [name for name in names if name in self.numbers]
        width = max(map(len, names), default=0)
        lines = [
            f"{name:{width}}  {format_number(self.numbers[name]):>10}  "
            f"{', '.join(published.get(name, ()))}"
            for name in names
        ]
        return "\n".join(map(str.rstrip, lines))


def format_number(value: int | float | None) -> str:
    """A number as people read it; a dash for one that nothing was counted for."""
    return "-" if value is None else f"{value:.0f}" if value == int(value) else f"{value:.4f}"


def numbers_of(summary: Mapping[str, float]) -> dict[str, float | None]:
    """A summary as JSON can hold it."""
    return {name: float(x) if math.isfinite(x) else None for name, x in summary.items()}


def published_of(entries: Sequence[Published]) -> list[dict[str, Any]]:
    """Published numbers as JSON can hold them."""
    return [dataclasses.asdict(entry) for entry in entries]


def cases_of(
    benchmark: Official,
    requests: Sequence[Request],
    scores: Sequence[Scores],
    unreadable: Mapping[int, Mapping[str, str]],
) -> dict[str, list[dict[str, Any]]]:
    """The first rows, the best and the worst ones by the benchmark's `quality`, and those with
    files that are `unreadable` (`score_files.unreadable`).
    """
    qualities = [float(benchmark.quality(entry)) for entry in scores]
    known = [k for k, quality in enumerate(qualities) if math.isfinite(quality)]
    ordered = sorted(known, key=lambda k: (-qualities[k], k))

    def case(k: int) -> dict[str, Any]:
        request, quality = requests[k], qualities[k]
        return {
            "index": request.index,
            "task": request.task,
            "prompt": str(request.inputs.get("prompt", "")),
            "files": list(request.files),
            "quality": quality if math.isfinite(quality) else None,
        }

    half = len(ordered) // 2  # none is among the best and the worst
    return {
        "first": [case(k) for k in range(min(SHOWN, len(requests)))],
        "best": [case(k) for k in ordered[: min(SHOWN, half)]],
        "worst": [case(k) for k in ordered[::-1][: min(SHOWN, half)]],
        "unreadable": [case(k) | {"reasons": dict(unreadable[k])} for k in sorted(unreadable)],
    }


def write_rows(
    folder: epath.PathLike, requests: Sequence[Request], scores: Sequence[Scores]
) -> None:
    """Writes scores.jsonl: of each row its first file, and each metric that is one number."""
    lines = []
    for request, entry in zip(requests, scores, strict=True):
        values = {
            name: ratio.value if math.isfinite(ratio.value) else None
            for name, ratio in entry.items()
            if len(ratio.total) == 1
        }
        lines.append(json.dumps({"index": request.index, "file": request.files[0], **values}))
    write_whole(epath.Path(folder) / ROWS_FILE, "".join(f"{line}\n" for line in lines))
