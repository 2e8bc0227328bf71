"""Which evaluations and followed runs a page shows."""

import dataclasses
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from univg_jax.errors import NotFoundError, UserError, shorten
from univg_jax.evaluation.report.cards import Card
from univg_jax.evaluation.report.differences import in_order
from univg_jax.evaluation.results import FILE, Json
from univg_jax.retention import read_evaluations
from univg_jax.workdir import EVALUATIONS

MOST = 12  # evaluations of a benchmark that are shown of a folder

Log = Sequence[Json]  # of a followed run: rows of step and numbers


@dataclasses.dataclass(frozen=True)
class Found:
    """Evaluations, logs by benchmark and run, and the names of evaluations that are left out."""

    cards: Sequence[Card]
    logs: Mapping[str, Mapping[str, Log]]
    left_out: Sequence[str]


def find(paths: Sequence[epath.PathLike]) -> Found:
    """All that some folders have.

    Each is an evaluation's own, or one with many, as `univg evaluate` was given it, or the workdir
    of a run that was followed. Of many, the newest MOST of each benchmark are taken, in the order
    of their settings, and a damaged one is left out with a warning.

    Raises NotFoundError for a folder that has nothing, UserError for an evaluation that is damaged.
    """
    cards: dict[epath.Path, Card] = {}
    logs: dict[str, dict[str, Log]] = {}
    left_out: list[str] = []
    for path in map(epath.Path, paths):
        folder = path / EVALUATIONS if (path / EVALUATIONS).is_dir() else path
        if (folder / FILE).exists():
            cards[folder] = Card.read(folder)
            continue
        written = _logs(folder) if folder.name == EVALUATIONS else {}
        found, others = _below(folder, required=not written)
        cards |= {card.folder: card for card in found}
        left_out += others
        for benchmark, rows in written.items():
            logs.setdefault(benchmark, {})[str(folder.parent)] = rows
    return Found(list(cards.values()), logs, left_out)


def find_of(weights: str, path: epath.PathLike) -> list[Card]:
    """The evaluations below a folder that are of the weights with this digest.

    Raises UserError if there are none: no number is shown of another model.
    """
    cards = find([path]).cards
    if own := [card for card in cards if card.settings.get("weights") == weights]:
        return own
    there = [f"{card.folder.name} of step {card.settings.get('step')}" for card in cards]
    raise UserError(
        f"{path} has no evaluation of this checkpoint: it has {shorten(there) or 'none'}; "
        "run `univg evaluate`"
    )


def _logs(folder: epath.Path) -> dict[str, Log]:
    """The rows of each benchmark that have numbers."""
    rows = {file.stem: read_evaluations(file) for file in sorted(folder.glob("*.jsonl"))}
    kept = {name: [row for row in log if "numbers" in row] for name, log in rows.items()}
    return {name: log for name, log in kept.items() if log}


def _below(out: epath.Path, *, required: bool) -> tuple[list[Card], list[str]]:
    """The newest evaluations in a folder's folders, and the names of the others."""
    found, left_out, damage = [], [], None
    for folder in sorted(file.parent for file in out.glob(f"*/{FILE}")):
        try:
            found.append(Card.read(folder))
        except UserError as error:
            logging.warning("%s", error)
            left_out.append(folder.name)
            damage = error
    if not found and required:
        raise damage or NotFoundError(f"{out} has no evaluation: `univg evaluate` writes them")
    found.sort(key=lambda card: (str(card.provenance.get("date", "")), card.folder.name))
    kept = []
    for name in dict.fromkeys(card.benchmark for card in found):
        of_it = [card for card in found if card.benchmark == name]
        left_out += [card.folder.name for card in of_it[:-MOST]]
        kept += in_order(of_it[-MOST:])
    return kept, left_out
