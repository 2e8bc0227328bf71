"""Opens the scorers that `--scorer=NAME=VALUE` names."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from univg_jax.errors import UserError, check_name
from univg_jax.evaluation.scorers import PROTOCOLS, Scorers
from univg_jax.fields import parse_literal

Options = Mapping[str, Any]


def open_scorers(specs: Mapping[str, str], *, answers: str) -> Scorers:
    """The scorers of VALUE[,OPTION=...], by name; `answers` is the folder of servers' answers.

    Raises UserError for a name or an option that is unknown, with the nearest one, and for what is
    not there or cannot be opened.
    """
    found: dict[str, Any] = {}
    for name, text in specs.items():
        check_name(name, OPENERS, what="scorer")
        value, *rest = re.split(r",(?=\w+=)", text)
        given = dict(item.split("=", 1) for item in rest)
        opener = OPENERS[name]
        for option in given:
            check_name(option, opener.options, what=f"option of --scorer={name}:")
        if name in ("vqa", "judge"):
            given.setdefault("cache", answers)
        try:
            found[name] = opener.open(os.path.expanduser(value), **given)
        except UserError as error:
            raise type(error)(f"--scorer={name}: {error} ({PROTOCOLS[name]})") from None
    return Scorers(**found)


@dataclasses.dataclass(frozen=True)
class _Opener:
    """`open(value, **options)`; options are texts."""

    open: Callable[..., Any]
    options: tuple[str, ...] = ()


# A network is imported when it is asked for: most jobs need one of them.


def _clip(folder: str, **options: str) -> Any:
    from univg_jax.evaluation.scorers.clip import Clip

    return Clip(folder, **options)


def _color(folder: str) -> Any:
    from univg_jax.evaluation.scorers.clip import Clip, ClipColors

    return ClipColors(Clip(folder))


def _detect(path: str) -> Any:
    from univg_jax.evaluation.scorers.detector import open_detector

    return open_detector(path)


def _depth(path: str) -> Any:
    from univg_jax.evaluation.scorers.depth_network import DepthNetwork

    return DepthNetwork(path)


def _inception(path: str, **options: str) -> Any:
    from univg_jax.evaluation.scorers.inception import open_inception

    return open_inception(path, **options)


def _dino(folder: str) -> Any:
    from univg_jax.evaluation.scorers.dino import open_dino

    return open_dino(folder)


def _identify(path: str) -> Any:
    from univg_jax.evaluation.scorers.faces import FaceEncoder

    return FaceEncoder(path)


def _lpips(path: str, **options: str) -> Any:
    from univg_jax.evaluation.scorers.lpips import Lpips

    return Lpips(path, **{name: os.path.expanduser(value) for name, value in options.items()})


def _endpoint(url: str, **options: str) -> Any:
    from univg_jax.evaluation.scorers.endpoint import Endpoint

    if "model" not in options:
        raise UserError(f"{url} needs the name of its model, {url},model=NAME")
    numbers = {name: parse_literal(options[name]) for name in _NUMBERS if name in options}
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            raise UserError(f"{name}={value}: expected a number")
    return Endpoint(url=url, **{**options, **numbers})


_NUMBERS = ("concurrency", "timeout", "attempts")
_ASKED = ("model", "snapshot", "cache", "key_variable", *_NUMBERS)
OPENERS = {
    "clip": _Opener(_clip, ("preprocessing",)),
    "color": _Opener(_color),
    "depth": _Opener(_depth),
    "detect": _Opener(_detect),
    "dino": _Opener(_dino),
    "identify": _Opener(_identify),
    "inception": _Opener(_inception, ("convention",)),
    "lpips": _Opener(_lpips, ("heads",)),
    "vqa": _Opener(_endpoint, _ASKED),
    "judge": _Opener(_endpoint, _ASKED),
}
