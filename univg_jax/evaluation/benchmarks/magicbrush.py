"""MagicBrush: edits of 535 pictures in up to three turns, with a picture by hand after each turn.

The rules are those of github.com/OSU-NLP-Group/MagicBrush, evaluation/image_eval.py (METRICS of
`evaluation.similarity`; CLIP-T is of the LOCAL caption, which tells what has changed):

    single   all turns, each from the picture by hand before it: ID_1.png, ID_inde_2.png, ...
    multi    the last turn of each chain, in which a turn's source is the result of the turn before:
             ID_iter_3.png, or ID_1.png of a session of one turn

The first turn is the same in both, and one file. Where the last ID_iter_k.png is missing, the
official code takes the one before and compares it with the last target: so does `official/multi`,
and `replaced` counts them. Where none is there, or a picture of `single` is missing, the official
code stops; here they are counted as missing and left out. In `strict/` a missing picture has the
worst numbers, and none stands for another one. The networks of the publication are ViT-B/32 of
CLIP and dino_vits16.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines.native.table_files import object_of
from data_pipelines.native.tables import get
from univg_jax.errors import UserError
from univg_jax.evaluation import similarity
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Output, Published, Request, requests_of
from univg_jax.evaluation.summaries import Scores, Summary

_WHAT = "of MagicBrush's test split (the zip that its README links)"
SESSIONS_FILE = InputFile("edit_sessions.json", f"the instructions {_WHAT}")
CAPTIONS_FILE = InputFile("local_captions.json", f"the captions of each turn {_WHAT}")
SESSIONS, TURNS = 535, 1053
TARGET = "a target of MagicBrush"
_LAST = "last/"  # columns: against the last target of the session


@dataclasses.dataclass(frozen=True)
class Settings(similarity.Backbones):
    """The networks; the defaults are those of the publication."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture to make: turn `turn` of `turns`, in a chain or of a source by hand.

    `target` and `caption` are its own, `last_target` and `last_caption` those of the last turn.
    """

    session: str
    turn: int
    turns: int
    chained: bool
    instruction: str
    source: str
    first: str  # source of the first turn
    target: str
    caption: str
    last_target: str
    last_caption: str


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The turns of all sessions, and those from the second on once more, in their chain.

    `path` is the official folder: edit_sessions.json, local_captions.json and images/ID/. Raises
    UserError if a file is missing or another one, or, unless it is an `excerpt`, has not all turns.
    """
    root = epath.Path(path)
    sessions, captions = (_object(f, root / f.name) for f in (SESSIONS_FILE, CAPTIONS_FILE))
    rows: list[Row] = []
    for session, turns in sessions.items():
        try:
            rows += _session(root, session, turns, captions.get(session))
        except UserError as error:
            reason = f"session {session!r}: {error}"
            raise SESSIONS_FILE.error(root / SESSIONS_FILE.name, reason) from None
    for what, found, official in (
        ("sessions", len(sessions), SESSIONS),
        ("turns", sum(not row.chained for row in rows), TURNS),
    ):
        SESSIONS_FILE.check_count(root, found=found, official=official, what=what, excerpt=excerpt)
    return tuple(rows)


def _object(file: InputFile, path: epath.Path) -> dict[str, Any]:
    value = file.json(path)
    if not isinstance(value, dict):
        raise file.error(path, "is no JSON object of sessions")
    return value


def _session(root: epath.Path, session: str, turns: Any, captions: Any) -> list[Row]:
    if not re.fullmatch(r"\w+", session, re.ASCII):
        raise UserError("its name is that of no folder")
    if not isinstance(turns, list) or not turns:
        raise UserError("it has no turns")
    folder = root / "images" / session
    said: Mapping[str, Any] = object_of(captions if captions is not None else {})
    found = []
    for turn in map(object_of, turns):
        names = {key: get(turn, key, str) for key in ("input", "output", "instruction")}
        for key in ("input", "output"):
            if not re.fullmatch(r"[\w-]+\.(png|jpg)", names[key], re.ASCII):
                raise UserError(f"its {key} {names[key]!r} is the name of no picture")
        if names["output"] not in said:
            raise UserError(f"{CAPTIONS_FILE.name} has no caption of {names['output']}")
        names["caption"] = get(said, names["output"], str)
        found.append(names)
    last = found[-1]
    return [
        Row(
            session=session,
            turn=turn,
            turns=len(found),
            chained=chained,
            instruction=names["instruction"],
            source=str(folder / names["input"]),
            target=str(folder / names["output"]),
            caption=names["caption"],
            first=str(folder / found[0]["input"]),
            last_target=str(folder / last["output"]),
            last_caption=last["caption"],
        )
        for chained in (False, True)
        for turn, names in enumerate(found, 1)
        if not chained or turn > 1
    ]


def image_files(row: Row) -> tuple[str, ...]:
    """Where the result lies."""
    return (_file(row.session, row.turn, chained=row.chained),)


def _file(session: str, turn: int, *, chained: bool) -> str:
    kind = "" if turn == 1 else "iter_" if chained else "inde_"
    return f"{session}/{session}_{kind}{turn}.png"


def requests(rows: Sequence[Row]) -> list[Request]:
    """An edit of the picture by hand, or of the result of the turn before."""
    return requests_of(
        rows,
        image_files,
        task="ie",
        inputs=lambda row: {
            "prompt": row.instruction,
            "image": Output(_file(row.session, row.turn - 1, chained=True))
            if row.chained
            else row.source,
        },
        whole=True,
    )


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """METRICS against the row's own target and, of a turn in a chain, against the last one.

    Raises UserError (NotFoundError) for a target that cannot be read.
    """
    (image,) = images
    if image is None:
        return similarity.ratios(None) | similarity.ratios(None, _LAST)
    own = _compared(image, row.target, row.caption, scorers)
    if row.turn == row.turns:
        last = own
    elif row.chained:
        last = _compared(image, row.last_target, row.last_caption, scorers)
    else:
        last = None
    return similarity.ratios(own) | similarity.ratios(last, _LAST)


def _copy(row: Row) -> Image | None:
    """The picture that a turn, or a chain, begins with; None if it is not there."""
    begun = row.first if row.chained else row.source
    if not epath.Path(begun).exists():
        return None
    return similarity.read_rgb(begun, what="a source of MagicBrush", drop_alpha=True)


def _compared(
    image: Image, target: str, caption: str, scorers: Mapping[str, Any]
) -> dict[str, float]:
    truth = similarity.read_rgb(target, what=TARGET, drop_alpha=True)
    return similarity.compare(image, truth, caption, scorers)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`official/` and `strict/`, of `single` and `multi` each, and what is missing.

    `strict/` has a number wherever there are rows; `official/` is NaN where no picture is.
    """
    single = [scores[k] for k, row in enumerate(rows) if not row.chained]
    chains: dict[str, dict[int, Scores]] = {}
    for row, entry in zip(rows, scores, strict=True):
        if row.chained or row.turns == 1:
            chains.setdefault(row.session, {})[row.turn] = entry
    ends = {row.session: row.turns for row in rows}
    last = [chain.get(ends[session]) for session, chain in chains.items()]
    taken = [_latest(chain) for chain in chains.values()]
    found: Summary = {}
    for name in similarity.METRICS:
        worst = similarity.WORST[name]
        of_single = [entry[name] for entry in single]
        of_last = [_there(entry, _LAST + name) for entry in last]
        of_taken = [_there(entry, _LAST + name) for entry in taken]
        found[f"official/single/{name}"] = merge(of_single).value
        found[f"official/multi/{name}"] = merge(of_taken).value
        found[f"strict/single/{name}"] = merge(_or_worst(of_single, worst)).value
        found[f"strict/multi/{name}"] = merge(_or_worst(of_last, worst)).value
    ended = sum(map(_is_there, last))
    return found | {
        "failures/single_missing": float(len(single) - sum(map(_is_there, single))),
        "failures/multi_missing": float(len(last) - ended),
        "failures/multi_replaced": float(sum(map(_is_there, taken)) - ended),
    }


def _latest(chain: Mapping[int, Scores]) -> Scores | None:
    """The scores of the last turn of a chain that there is."""
    return next(
        (chain[turn] for turn in sorted(chain, reverse=True) if _is_there(chain[turn])), None
    )


def _is_there(entry: Scores | None) -> bool:
    return entry is not None and bool(entry["l1"].count[0])


def _there(entry: Scores | None, name: str) -> Ratio:
    return Ratio.of(0.0, 0.0) if entry is None else entry[name]


def _or_worst(ratios: Sequence[Ratio], worst: float) -> list[Ratio]:
    return [ratio if ratio.count[0] else Ratio.of(worst) for ratio in ratios]


def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
    """Raises NotFoundError for a target that is not there."""
    for row in rows:
        similarity.check_file(row.target, what=TARGET)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these networks; others than the published ones do not compare."""
    return Official(
        name="magicbrush",
        version=1,
        read=read,
        requests=requests,
        needs=similarity.NEEDS,
        weights=similarity.clip_weights(settings.clip),
        check_scoring=check_scoring,
        score=score,
        trivial={"copy": _copy},
        summary=summary,
        primary="official/single/dino",
        # The paper does not say whether of single turns; its numbers are 100 times these.
        published=(
            Published("UniVG", "official/single/clip_t", 0.295, "UniVG (arXiv 2503.12652)"),
            Published("UniVG", "official/single/clip_i", 0.863, "UniVG (arXiv 2503.12652)"),
        ),
        settings=dataclasses.asdict(settings) | similarity.COSINE,
        scoring=("clip", "dino", "clip_score"),
    )


BENCHMARK = benchmark()
