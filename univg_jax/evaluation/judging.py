"""What benchmarks with a judge share: its prompts, and how items end.

A judge is a vision-language model (`scorers.endpoint`) that is shown pictures and a prompt of the
benchmark's authors, and whose reply is parsed for scores. Its prompts are read at run time from the
official repository's own file. An item without a usable reply is never given a made-up score: it
has an outcome of its own, is left out of what is `official`, and has the least score in what is
`strict`.
"""

import ast
import dataclasses
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from univg_jax.errors import UserError, suggestion
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.scorers.chat import ONE_TOKEN, Reply
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts

FAILURES = ("unparsed", "refused", "failed", "missing")
ASKED = dataclasses.asdict(ONE_TOKEN)  # how `ask_all` asks, which results store
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
    return Prompts(texts, file.sha256(path), str(file.at(path)))


def is_inside(name: str) -> bool:
    """Whether a name from a list stays in the folder that it is put after."""
    path = pathlib.PurePosixPath(name)
    return name != "" and not path.is_absolute() and ".." not in path.parts


def ask_all(
    vqa: Any, image: Image | None, questions: Sequence[str]
) -> tuple[list[Reply | None], list[str]]:
    """The replies of an `Endpoint` about an image, None for what cannot be used; and how each
    question ended, as `outcome_columns` has it. None is an image that is not there.
    """
    if image is None:
        return [None] * len(questions), ["missing"] * len(questions)
    replies = [vqa.vqa(image, question, sampling=ONE_TOKEN) for question in questions]
    ends = ["judged" if reply.kind == "answered" else reply.kind for reply in replies]
    return [reply if reply.kind == "answered" else None for reply in replies], ends


def outcome_columns(*outcomes: str) -> dict[str, Ratio]:
    """The columns of an item's scores that say how its questions ended, each `judged` or one of
    FAILURES.
    """
    columns = {"judged": "judged"} | {f"failures/{name}": name for name in FAILURES}
    count = len(outcomes)
    return {column: Ratio.of(outcomes.count(name), count) for column, name in columns.items()}


def outcome_counts(scores: Sequence[Scores], *, what: str) -> Summary:
    """How many questions were `judged`, and `failure_counts`. Warns where more than MOST_DROPPED of
    the questions have no answer.
    """
    judged, counts = merge(column(scores, "judged")), failure_counts(scores)
    asked = float(judged.count.sum())
    dropped = {name: counts[f"failures/{name}"] for name in FAILURES}
    dropped = {name: count for name, count in dropped.items() if count}
    if sum(dropped.values()) > MOST_DROPPED * asked:
        logging.warning(
            "%s: %d of %d judgments have no score (%s): do not compare these numbers "
            "with published ones",
            what,
            sum(dropped.values()),
            asked,
            ", ".join(f"{name} {count:.0f}" for name, count in dropped.items()),
        )
    return {"judged": float(judged.total.sum()), **counts}
