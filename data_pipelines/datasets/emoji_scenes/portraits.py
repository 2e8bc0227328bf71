"""Portraits of invented persons, from DiceBear's artwork "Personas".

An identity is a combination of hair, hair color, skin, facial hair and nose. Its pictures differ in
expression, clothes and wall. A seed shuffles all combinations once. So two person numbers never
have the same face, and splits that take different numbers have different faces.
"""

import dataclasses
import functools
import importlib.resources
import itertools
import json

import numpy as np
from dicebear import Avatar, Style
from jaxtyping import UInt8

from data_pipelines.datasets.emoji_scenes import PICTURES, captions
from data_pipelines.datasets.emoji_scenes.sprites import COLORS, rasterize

_HAIR = (
    *("bobBangs", "bobCut", "bunUndercut", "buzzcut", "curly", "curlyBun", "curlyHighTop"),
    *("extraLong", "fade", "long", "mohawk", "pigtails", "shortCombover", "sideShave"),
    "straightBun",
)
_HAIR_COLOR = ("#2a2230", "#6c3f2c", "#e0a84c", "#c8502f", "#dee1f5", "#e16381")
_SKIN = ("#f3c6ae", "#dd9a72", "#a8684f", "#623d36")
_FACIAL_HAIR = (None, "goatee", "walrus")  # only such that leaves the mouth visible
_NOSE = ("mediumRound", "smallRound", "wrinkles")

EXPRESSIONS: dict[str, dict[str, str]] = {
    "smiling": dict(mouth="bigSmile", eyes="open"),
    "laughing": dict(mouth="bigSmile", eyes="happy"),
    "frowning": dict(mouth="frown", eyes="open"),
    "surprised": dict(mouth="surprise", eyes="open"),
    "sleeping": dict(mouth="smirk", eyes="sleep"),
    "winking": dict(mouth="smile", eyes="wink"),
    "with glasses": dict(mouth="smile", eyes="glasses"),
}
_CLOTHES = ("rounded", "small", "squared")
SHIRTS = {**COLORS, "white": (240, 240, 242), "black": (52, 52, 60)}
WALLS = {
    "blue": (150, 200, 240),
    "green": (172, 214, 150),
    "yellow": (250, 226, 150),
    "pink": (248, 196, 212),
    "gray": (196, 200, 206),
}


@dataclasses.dataclass(frozen=True)
class Portrait:
    """One picture of a person."""

    person: int
    expression: str
    shirt: str
    cut: str
    wall: str

    @property
    def caption(self) -> str:
        """A caption with `<p>` for the person."""
        shirt, wall = captions.with_article(self.shirt), captions.with_article(self.wall)
        return f"a portrait of <p> {self.expression} in {shirt} shirt in front of {wall} wall"


@functools.cache
def identities(seed: int) -> tuple[tuple, ...]:
    """Every distinct face there is, in the seed's order."""
    cells = list(itertools.product(_HAIR, _HAIR_COLOR, _SKIN, _FACIAL_HAIR, _NOSE))
    return tuple(cells[k] for k in np.random.default_rng([seed, 0x1D]).permutation(len(cells)))


def sample_portraits(rng: np.random.Generator, person: int) -> list[Portrait]:
    """`PICTURES` pictures of a person, which all differ in expression, shirt and wall."""
    return [
        Portrait(person, str(expression), str(shirt), str(rng.choice(_CLOTHES)), str(wall))
        for expression, shirt, wall in zip(
            rng.choice(list(EXPRESSIONS), PICTURES, replace=False),
            rng.choice(list(SHIRTS), PICTURES, replace=False),
            rng.choice(list(WALLS), PICTURES, replace=False),
        )
    ]


@functools.cache
def _style() -> Style:
    file = importlib.resources.files("dicebear_styles") / "personas.json"
    return Style(json.loads(file.read_text("utf-8")))


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def render_portrait(
    portrait: Portrait, *, seed: int, resolution: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The portrait as a picture, mostly filled by the head."""
    hair, hair_color, skin, facial_hair, nose = identities(seed)[portrait.person]
    expression = EXPRESSIONS[portrait.expression]
    svg = Avatar(
        _style(),
        {
            "seed": "univg",  # without effect: everything that it would choose is set below
            "hairVariant": hair,
            "hairColor": hair_color,
            "facialHairColor": hair_color,
            "skinColor": skin,
            "facialHairProbability": 0 if facial_hair is None else 100,
            "facialHairVariant": facial_hair or "goatee",
            "noseVariant": nose,
            "mouthVariant": expression["mouth"],
            "eyesVariant": expression["eyes"],
            "clothesVariant": portrait.cut,
            "clothingColor": _hex(SHIRTS[portrait.shirt]),
            "backgroundColor": _hex(WALLS[portrait.wall]),
            "scale": 1.18,
        },
    ).to_string()
    # The artwork lightens the face by a white overlay, which would make its color differ from that
    # of the ears.
    svg = svg.replace('opacity=".36"', 'opacity=".12"')
    return rasterize(svg, resolution, resolution)[..., :3]
