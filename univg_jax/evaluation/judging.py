"""What benchmarks with a judge share: its prompts, and how items end.

A judge is a vision-language model (`scorers.endpoint`) that is shown pictures and a prompt of the
benchmark's authors, and whose reply is parsed for scores. Its prompts are read at run time from the
official repository's own file. An item without a usable reply is never given a made-up score: it
has an outcome of its own, is left out of what is `official`, and has the least score in what is
`strict`.
"""

import ast
import dataclasses
import hashlib
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from univg_jax.errors import UserError, suggestion
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.summaries import Scores, Summary, column

FAILURES = ("unparsed", "refused", "failed", "missing_image")
MOST_DROPPED = 0.01  # of items, without a warning


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The texts of a file of prompts by name, and the file's SHA-256, which results store."""

    texts: Mapping[str, str]
    sha256: str
    where: str

    def __getitem__(self, name: str) -> str:
        """Raises UserError for a name that the file lacks."""
        if name not in self.texts:
            raise UserError(f"{self.where} has no prompt {name!r}{suggestion(name, self.texts)}")
        return self.texts[name]


def read_json_prompts(file: InputFile, path: epath.PathLike) -> Prompts:
    """The prompts of a JSON object of texts. Raises UserError for anything else."""
    value = file.json(path)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise file.error(file.at(path), "is no JSON object of texts")
    return _prompts(file, path, value)


def read_python_prompts(file: InputFile, path: epath.PathLike) -> Prompts:
    """The texts that a Python file gives names to. It is parsed and never run.

    Raises UserError for a file that is no Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as \\d, which are its authors' matter
            tree = ast.parse(file.text(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise file.error(file.at(path), f"is not Python ({error})") from None
    texts = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return _prompts(file, path, texts)


def _prompts(file: InputFile, path: epath.PathLike, texts: Mapping[str, str]) -> Prompts:
    at = file.at(path)
    return Prompts(texts, hashlib.sha256(at.read_bytes()).hexdigest(), str(at))


def is_inside(name: str) -> bool:
    """Whether a name from a list stays in the folder that it is put after."""
    path = pathlib.PurePosixPath(name)
    return name != "" and not path.is_absolute() and ".." not in path.parts


def ask_all(vqa: Any, image: Image, questions: Sequence[str]) -> list[Any]:
    """The replies of a `scorers.endpoint.Endpoint` about an image; None could not be used."""
    replies = [vqa.vqa(image, question) for question in questions]
    return [reply if reply.kind == "answered" else None for reply in replies]


def outcome_columns(outcome: str) -> dict[str, Ratio]:
    """The columns of an item's scores that say how it ended: `judged`, or one of FAILURES."""
    columns = {"judged": "judged"} | {f"failures/{name}": name for name in FAILURES}
    return {column: Ratio.of(float(name == outcome)) for column, name in columns.items()}


def outcome_counts(scores: Sequence[Scores], *, what: str) -> Summary:
    """How many items ended how. Warns where more than MOST_DROPPED of them have no score."""
    names = outcome_columns("judged")
    counts = {name: float(merge(column(scores, name)).total.sum()) for name in names}
    dropped = {name: counts[f"failures/{name}"] for name in FAILURES}
    dropped = {name: count for name, count in dropped.items() if count}
    if sum(dropped.values()) > MOST_DROPPED * len(scores):
        logging.warning(
            "%s: %d of %d items have no score (%s): do not compare the averages that leave them "
            "out with published ones",
            what,
            sum(dropped.values()),
            len(scores),
            ", ".join(f"{name} {count:.0f}" for name, count in dropped.items()),
        )
    return counts
