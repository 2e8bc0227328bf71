"""A scene as a value, and its rendering: a picture with exact instance masks and metric depth.

A camera at height 1 m looks level over a ground plane. With image heights as the unit of length in
the picture and a focal length of 1, a ground point `d` below the horizon lies at depth `z = 1 / d`
meters, and a thing of `s` meters standing there is `s / z = s * d` image heights tall. All sizes,
places and depths follow from that.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

from data_pipelines.datasets.emoji_scenes import sprites

FAR = 20.0  # meters: the sky, and ground beyond it
THING_HEIGHT = 1.2  # meters, for a noun of size 1 that is not wider than tall

# name -> (far or top color, near or horizon color)
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ((150, 200, 96), (84, 148, 56)),
    "sand": ((246, 226, 170), (222, 184, 112)),
    "snow": ((236, 242, 250), (214, 226, 242)),
    "mud": ((150, 112, 84), (98, 68, 48)),
}
SKIES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "blue": ((92, 168, 236), (190, 224, 250)),
    "pink": ((236, 124, 168), (252, 208, 200)),
    "gray": ((142, 150, 160), (196, 202, 208)),
    "dark": ((18, 22, 58), (62, 66, 118)),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: what it is, and where its foot stands."""

    noun: str
    color: str | None  # None for a noun that cannot be painted
    x: float  # as a fraction of the image's width
    drop: float  # below the horizon, in image heights

    @property
    def height(self) -> float:
        """In image heights."""
        size = sprites.NOUNS[self.noun].size
        return THING_HEIGHT * size * self.drop / max(1.0, sprites.aspect(self.noun))

    @property
    def width(self) -> float:
        return self.height * sprites.aspect(self.noun)

    @property
    def depth(self) -> float:
        """In meters."""
        return 1 / self.drop


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things on a named ground under a named sky."""

    things: tuple[Thing, ...]
    ground: str
    sky: str
    horizon: float  # in image heights from the top


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A picture of a scene and its labels."""

    image: UInt8[np.ndarray, "h w 3"]
    masks: UInt8[np.ndarray, "k h w"]  # 1 where thing k is what is seen
    depth: Float32[np.ndarray, "h w"]  # meters


def render(scene: Scene, resolution: int) -> Rendered:
    """Draw the scene, nearer things over farther ones."""
    image = background(scene.ground, scene.sky, scene.horizon, resolution)
    rows = (np.arange(resolution) + 0.5) / resolution
    ground_depth = 1 / np.maximum(rows - scene.horizon, 1 / FAR)
    depth = np.repeat(ground_depth[:, None], resolution, axis=1).astype(np.float32)
    coverage = np.zeros((len(scene.things), resolution, resolution), np.float32)

    # From far to near, so that nearer things cover farther ones.
    order = sorted(range(len(scene.things)), key=lambda k: scene.things[k].drop)
    for k in order:
        thing = scene.things[k]
        cast_shadow(image, x=thing.x, y=scene.horizon + thing.drop, width=thing.width)
        pixels = sprites.sprite(thing.noun, thing.color, max(4, round(thing.height * resolution)))
        height, width = pixels.shape[:2]
        top = round((scene.horizon + thing.drop) * resolution) - height
        left = round(thing.x * resolution - width / 2)
        y0, y1 = max(top, 0), min(top + height, resolution)
        x0, x1 = max(left, 0), min(left + width, resolution)
        seen = pixels[y0 - top : y1 - top, x0 - left : x1 - left].astype(np.float32)
        alpha = seen[..., 3] / 255
        window = (slice(y0, y1), slice(x0, x1))
        image[window] += (seen[..., :3] - image[window]) * alpha[..., None]
        coverage[:, *window] *= 1 - alpha  # what this thing hides of those behind it
        coverage[k][window] = alpha
    masks = coverage > 0.5
    for thing, mask in zip(scene.things, masks):
        depth[mask] = thing.depth
    return Rendered(
        image=np.clip(np.rint(image), 0, 255).astype(np.uint8),
        masks=masks.astype(np.uint8),
        depth=depth,
    )


def background(
    ground: str, sky: str, horizon: float, resolution: int
) -> Float32[np.ndarray, "h w 3"]:
    """Sky gradient over ground gradient, the horizon antialiased; values in [0, 255]."""
    rows = (np.arange(resolution) + 0.5) / resolution
    high, low = np.asarray(SKIES[sky], np.float32)
    far, near = np.asarray(GROUNDS[ground], np.float32)
    sky_rows = high + (low - high) * np.clip(rows / horizon, 0, 1)[:, None]
    ground_rows = far + (near - far) * np.clip((rows - horizon) / (1 - horizon), 0, 1)[:, None]
    is_ground = np.clip((rows - horizon) * resolution + 0.5, 0, 1)[:, None]
    column = sky_rows + (ground_rows - sky_rows) * is_ground
    return np.repeat(column[:, None].astype(np.float32), resolution, axis=1)


def cast_shadow(image: Float32[np.ndarray, "h w 3"], *, x: float, y: float, width: float) -> None:
    """Darken the ground, in place, in a soft ellipse under a foot at (x, y) in image heights."""
    centers = (np.arange(image.shape[0]) + 0.5) / image.shape[0]
    rows = (centers[:, None] - y) / max(0.08 * width, 0.015)
    columns = (centers - x) / max(0.5 * width, 0.03)
    strength = 0.45 * np.clip(1.2 - rows**2 - columns**2, 0, 1)
    image *= (1 - strength[..., None]).astype(np.float32)
