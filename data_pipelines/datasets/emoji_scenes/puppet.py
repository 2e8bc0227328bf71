"""An articulated figure facing the camera, with exact COCO-17 joints.

The figure is a tree of bones given by angles. Its joints are computed first, in units of its own
height, and then placed in the picture. Everything that is drawn follows from the joints. Left and
right are the figure's own: its left arm is on the viewer's right.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageDraw

from data_pipelines.datasets.emoji_scenes import captions
from data_pipelines.datasets.emoji_scenes.scene import GROUNDS, SKIES, background, cast_shadow
from data_pipelines.datasets.emoji_scenes.sprites import COLORS

_PAIRS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
JOINTS = ("nose", *(f"{side}_{pair}" for pair in _PAIRS for side in ("left", "right")))
SKINS = ((240, 188, 150), (214, 152, 110), (164, 106, 72), (112, 72, 50))
# Clothes of this color would be lost against the background.
_CLASHES = {"grass": "green", "sand": "yellow", "blue": "blue", "pink": "pink"}
_SHOE, _MOUTH = (70, 50, 44), (150, 50, 56)
HAIRS = ((40, 30, 28), (120, 74, 42), (226, 180, 92), (178, 70, 34))

# Ranges of an arm's angles (upper arm, forearm), in degrees from straight down, outwards.
_DOWN = ((8, 28), (0, 25))
_OUT = ((75, 100), (75, 105))
_UP = ((140, 168), (155, 185))
_WAVING = ((80, 110), (150, 185))
_ON_HIP = ((40, 55), (-50, -35))
POSES: dict[str, tuple] = {  # of the left and the right arm
    "": (_DOWN, _DOWN),
    "with arms out": (_OUT, _OUT),
    "with arms up": (_UP, _UP),
    "waving": (_WAVING, _DOWN),
    "with hands on hips": (_ON_HIP, _ON_HIP),
}


Point = Float[np.ndarray, "2"]


@dataclasses.dataclass(frozen=True)
class Puppet:
    """A figure with its clothes and its place in the picture."""

    joints: Float[np.ndarray, "17 2"]  # x, y in [0, 1], in the order of JOINTS
    scale: float  # the figure's height, as a fraction of the picture's
    pose: str
    shirt: str
    pants: str
    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    long_hair: bool
    ground: str
    sky: str
    horizon: float

    @property
    def caption(self) -> str:
        """ "a person in a red shirt and blue pants waving on grass under a blue sky"."""
        clothes = f"a person in {captions.with_article(self.shirt)} shirt and {self.pants} pants"
        return " ".join(filter(None, [clothes, self.pose, captions.setting(self.ground, self.sky)]))


@dataclasses.dataclass(frozen=True)
class RenderedPuppet:
    """A picture of a figure and its mask."""

    image: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]  # 1 where the figure is what is seen


def sample_puppet(rng: np.random.Generator) -> Puppet:
    """A random figure: pose, clothes, place and size; all of it inside the picture."""
    pose = str(rng.choice(list(POSES)))
    arms = POSES[pose] if rng.random() < 0.5 else POSES[pose][::-1]
    points = _sample_points(rng, arms)
    low, high = points.min(0) - 0.05, points.max(0) + 0.05
    size = high - low
    scale = min(float(rng.uniform(0.78, 0.97) / size[1]), 0.97 / size[0])
    free = 1 - scale * size
    offset = free * [rng.uniform(0.1, 0.9), rng.uniform(0.5, 1)] - scale * low
    ground, sky = str(rng.choice(list(GROUNDS))), str(rng.choice(list(SKIES)))
    clothes = [color for color in COLORS if color not in (_CLASHES.get(ground), _CLASHES.get(sky))]
    shirt, pants = (str(color) for color in rng.choice(clothes, size=2, replace=False))
    return Puppet(
        joints=(points * scale + offset)[:-1],
        scale=scale,
        pose=pose,
        shirt=shirt,
        pants=pants,
        skin=SKINS[rng.integers(len(SKINS))],
        hair=HAIRS[rng.integers(len(HAIRS))],
        long_hair=bool(rng.random() < 0.5),
        ground=ground,
        sky=sky,
        horizon=float(rng.uniform(0.4, 0.6)),
    )


def _sample_points(rng: np.random.Generator, arms: tuple) -> Float[np.ndarray, "18 2"]:
    """The joints and the crown of a figure, from the middle of its hips, in its own heights.

    `arms` are the ranges of the left and the right arm's angles, as in `POSES`.
    """
    joint: dict[str, np.ndarray] = {}
    lean = np.deg2rad(rng.uniform(-7, 7))
    joint["neck"] = np.array([np.sin(lean) * 0.3, -np.cos(lean) * 0.3])
    joint["head"] = joint["neck"] + 0.15 * np.array([np.sin(lean), -np.cos(lean)])
    across = np.array([np.cos(lean), np.sin(lean)])
    gaze = float(rng.uniform(-0.02, 0.02))
    joint["nose"] = joint["head"] + across * gaze + [0, 0.012]
    stance, lift = rng.uniform(4, 20, size=2), rng.random()
    for k, (side, sign) in enumerate((("left", 1), ("right", -1))):

        def bone(start: str, end: str, length: float, angle: float, side=side, sign=sign) -> None:
            direction = np.array([sign * np.sin(angle), np.cos(angle)])
            joint[f"{side}_{end}"] = joint[f"{side}_{start}"] + length * direction

        joint[f"{side}_eye"] = joint["head"] + across * (sign * 0.036 + gaze) - [0, 0.018]
        joint[f"{side}_ear"] = joint["head"] + across * sign * 0.098
        joint[f"{side}_shoulder"] = joint["neck"] + across * sign * 0.105 + [0, 0.02]
        joint[f"{side}_hip"] = np.array([sign * 0.062, 0.0])
        upper, fore = (np.deg2rad(rng.uniform(*bounds)) for bounds in arms[k])
        bone("shoulder", "elbow", 0.16, upper)
        bone("elbow", "wrist", 0.15, fore)
        thigh = shin = np.deg2rad(stance[k])
        # In three of ten figures one knee is raised sideways.
        if (lift < 0.15 and side == "left") or (lift > 0.85 and side == "right"):
            thigh, shin = np.deg2rad(rng.uniform(40, 65)), np.deg2rad(rng.uniform(-30, 0))
        bone("hip", "knee", 0.22, thigh)
        bone("knee", "ankle", 0.21, shin)
    crown = joint["head"] - [0, 0.11]  # no joint, but it has to stay inside the picture too
    return np.stack([*(joint[name] for name in JOINTS), crown])


def render_puppet(puppet: Puppet, resolution: int) -> RenderedPuppet:
    """The figure over a plain background, drawn four times as large and averaged."""
    pixels = np.asarray(_draw(puppet, 4 * resolution), np.float32) / 255
    # Premultiplied, so that averaging does not bring the transparent color to the outline.
    pixels[..., :3] *= pixels[..., 3:]
    pixels = pixels.reshape(resolution, 4, resolution, 4, 4).mean((1, 3))
    image: Float32[np.ndarray, "h w 3"] = background(
        puppet.ground, puppet.sky, puppet.horizon, resolution
    )
    feet = puppet.joints[-2:]
    cast_shadow(
        image,
        x=float(feet[:, 0].mean()),
        y=float(feet[:, 1].max() + 0.04 * puppet.scale),
        width=0.35 * puppet.scale,
    )
    image = pixels[..., :3] * 255 + image * (1 - pixels[..., 3:])
    return RenderedPuppet(
        image=np.clip(np.rint(image), 0, 255).astype(np.uint8),
        mask=(pixels[..., 3] > 0.5).astype(np.uint8),
    )


def _shade(color: tuple, factor: float) -> tuple:
    return tuple(round(c * factor) for c in color)


@dataclasses.dataclass(frozen=True)
class _Pen:
    """Draws on a canvas, with radii in units of the figure's height."""

    draw: ImageDraw.ImageDraw
    unit: float  # the figure's height in pixels

    def dot(self, center: Point, radius: float, color: tuple) -> None:
        x, y, r = *center, radius * self.unit
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=(*color, 255))

    def line(self, a: Point, b: Point, width: float, color: tuple) -> None:
        self.draw.line((*a, *b), fill=(*color, 255), width=max(1, round(width * self.unit)))

    def limb(self, a: Point, b: Point, radius: float, color: tuple) -> None:
        """A thick line with round ends."""
        self.line(a, b, 2 * radius, color)
        self.dot(a, radius, color)
        self.dot(b, radius, color)


def _draw(puppet: Puppet, size: int) -> Image.Image:
    """The figure alone, on a transparent square: what is behind comes first."""
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    at = dict(zip(JOINTS, puppet.joints * size))
    unit = puppet.scale * size
    pen = _Pen(ImageDraw.Draw(canvas), unit)
    shirt, pants, skin = COLORS[puppet.shirt], COLORS[puppet.pants], puppet.skin
    head = at["left_ear"] + (at["right_ear"] - at["left_ear"]) * 0.5
    neck = at["left_shoulder"] + (at["right_shoulder"] - at["left_shoulder"]) * 0.5
    if puppet.long_hair:
        pen.limb(head, head + (neck - head) * 0.75, 0.105, puppet.hair)
    for side, sign in (("left", 1), ("right", -1)):
        hip, knee, ankle = (at[f"{side}_{name}"] for name in ("hip", "knee", "ankle"))
        leg = _shade(pants, 1.0 if side == "left" else 0.88)
        pen.limb(hip, knee, 0.052, leg)
        pen.limb(knee, ankle, 0.044, leg)
        pen.limb(ankle, ankle + np.array([sign * 0.03, 0.015]) * unit, 0.032, _SHOE)
    pen.limb(neck, head, 0.04, _shade(skin, 0.9))
    corners = [at[name] for name in ("left_shoulder", "right_shoulder", "right_hip", "left_hip")]
    pen.draw.polygon(np.ravel(corners).tolist(), fill=(*shirt, 255))
    for a, b in zip(corners, [*corners[1:], corners[0]]):
        pen.limb(a, b, 0.038, shirt)
    for side in ("left", "right"):
        pen.limb(at[f"{side}_elbow"], at[f"{side}_wrist"], 0.03, _shade(shirt, 0.74))
        pen.limb(at[f"{side}_shoulder"], at[f"{side}_elbow"], 0.036, _shade(shirt, 0.86))
        pen.dot(at[f"{side}_wrist"], 0.042, skin)
        pen.dot(at[f"{side}_ear"], 0.022, _shade(skin, 0.88))
    pen.dot(head - [0, 0.022 * unit], 0.102, puppet.hair)
    pen.dot(head - [0, -0.012 * unit], 0.09, skin)
    for side in ("left", "right"):
        pen.dot(at[f"{side}_eye"], 0.017, (30, 26, 30))
    pen.dot(at["nose"], 0.014, _shade(skin, 0.72))
    mouth, half = at["nose"] + [0, 0.036 * unit], np.array([0.025 * unit, 0])
    pen.line(mouth - half, mouth + half, 0.014, _MOUTH)
    return canvas
