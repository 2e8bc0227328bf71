"""An articulated figure facing the camera, with exact COCO-17 joints.

The figure is a tree of bones given by angles; its joints are computed first, in units of its own
height, then placed in the picture, and everything that is drawn is drawn from the joints. Left and
right are the figure's own: its left arm is on the viewer's right.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageDraw

from data_pipelines.datasets.emoji_scenes import captions
from data_pipelines.datasets.emoji_scenes.scene import GROUNDS, SKIES, background, cast_shadow
from data_pipelines.datasets.emoji_scenes.sprites import COLORS

JOINTS = (
    *(
        "nose",
        "left_eye",
        "right_eye",
        "left_ear",
        "right_ear",
        "left_shoulder",
        "right_shoulder",
        "left_elbow",
    ),
    *(
        "right_elbow",
        "left_wrist",
        "right_wrist",
        "left_hip",
        "right_hip",
        "left_knee",
        "right_knee",
    ),
    *("left_ankle", "right_ankle"),
)
SKINS = ((240, 188, 150), (214, 152, 110), (164, 106, 72), (112, 72, 50))
# clothes lost against a background
_CLASHES = {"grass": "green", "sand": "yellow", "blue": "blue", "pink": "pink"}
HAIRS = ((40, 30, 28), (120, 74, 42), (226, 180, 92), (178, 70, 34))

# Degrees from straight down, outwards: (upper arm, forearm) as ranges, of the left and the right
# arm.
_DOWN = ((8, 28), (0, 25))
_OUT = ((75, 100), (75, 105))
_UP = ((140, 168), (155, 185))
_WAVING = ((80, 110), (150, 185))
_ON_HIP = ((40, 55), (-50, -35))
POSES: dict[str, tuple] = {
    "": (_DOWN, _DOWN),
    "with arms out": (_OUT, _OUT),
    "with arms up": (_UP, _UP),
    "waving": (_WAVING, _DOWN),
    "with hands on hips": (_ON_HIP, _ON_HIP),
}


@dataclasses.dataclass(frozen=True)
class Puppet:
    """`joints` in [0, 1] of the picture, in the order of `JOINTS`; `scale` is the figure's height
    there.
    """

    joints: Float[np.ndarray, "17 2"]
    scale: float
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
        clothes = f"a person in {captions.with_article(self.shirt)} shirt and {self.pants} pants"
        return " ".join(filter(None, [clothes, self.pose, captions.setting(self.ground, self.sky)]))


@dataclasses.dataclass(frozen=True)
class RenderedPuppet:
    image: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]  # 1 where the figure is what is seen


def sample_puppet(rng: np.random.Generator) -> Puppet:
    """A random figure: pose, clothes, place and size; all of it inside the picture."""
    pose = str(rng.choice(list(POSES)))
    arms = POSES[pose] if rng.random() < 0.5 else POSES[pose][::-1]
    joint: dict[str, np.ndarray] = {}
    lean = np.deg2rad(rng.uniform(-7, 7))
    # from the middle of the hips
    joint["neck"] = np.array([np.sin(lean) * 0.3, -np.cos(lean) * 0.3])
    joint["head"] = joint["neck"] + 0.15 * np.array([np.sin(lean), -np.cos(lean)])
    across = np.array([np.cos(lean), np.sin(lean)])
    gaze = float(rng.uniform(-0.02, 0.02))
    joint["nose"] = joint["head"] + across * gaze + [0, 0.012]
    stance, lift = rng.uniform(4, 20, size=2), rng.random()
    for k, (own, sign) in enumerate((("left", 1), ("right", -1))):
        joint[f"{own}_eye"] = joint["head"] + across * (sign * 0.036 + gaze) - [0, 0.018]
        joint[f"{own}_ear"] = joint["head"] + across * sign * 0.098
        joint[f"{own}_shoulder"] = joint["neck"] + across * sign * 0.105 + [0, 0.02]
        joint[f"{own}_hip"] = np.array([sign * 0.062, 0.0])
        upper, fore = (np.deg2rad(rng.uniform(*bounds)) for bounds in arms[k])
        joint[f"{own}_elbow"] = joint[f"{own}_shoulder"] + 0.16 * np.array(
            [sign * np.sin(upper), np.cos(upper)]
        )
        joint[f"{own}_wrist"] = joint[f"{own}_elbow"] + 0.15 * np.array(
            [sign * np.sin(fore), np.cos(fore)]
        )
        thigh = shin = np.deg2rad(stance[k])
        # one knee raised sidewards
        if (lift < 0.15 and own == "left") or (lift > 0.85 and own == "right"):
            thigh, shin = np.deg2rad(rng.uniform(40, 65)), np.deg2rad(rng.uniform(-30, 0))
        joint[f"{own}_knee"] = joint[f"{own}_hip"] + 0.22 * np.array(
            [sign * np.sin(thigh), np.cos(thigh)]
        )
        joint[f"{own}_ankle"] = joint[f"{own}_knee"] + 0.21 * np.array(
            [sign * np.sin(shin), np.cos(shin)]
        )
    points = np.stack([joint[name] for name in JOINTS])
    # the crown, so that it stays inside too
    points = np.concatenate([points, joint["head"][None] - [0, 0.11]])
    low, high = points.min(0) - 0.05, points.max(0) + 0.05
    size = high - low
    scale = float(rng.uniform(0.78, 0.97) / size[1])
    scale = min(scale, 0.97 / size[0])
    free = 1 - scale * size
    offset = free * [rng.uniform(0.1, 0.9), rng.uniform(0.5, 1)] - scale * low
    points = points * scale + offset
    ground, sky = str(rng.choice(list(GROUNDS))), str(rng.choice(list(SKIES)))
    clothes = [color for color in COLORS if color not in (_CLASHES.get(ground), _CLASHES.get(sky))]
    shirt, pants = (str(color) for color in rng.choice(clothes, size=2, replace=False))
    return Puppet(
        joints=points[:17],
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


def render_puppet(puppet: Puppet, resolution: int) -> RenderedPuppet:
    """Draw the figure four times as large and average, over the plain background."""
    large = 4 * resolution
    canvas = Image.new("RGBA", (large, large), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    at = {name: tuple(point * large) for name, point in zip(JOINTS, puppet.joints)}
    unit = puppet.scale * large
    shirt, pants = COLORS[puppet.shirt], COLORS[puppet.pants]
    shoe = (70, 50, 44)

    def dot(center: tuple, radius: float, color: tuple) -> None:
        x, y, r = *center, radius * unit
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(*color, 255))

    def limb(a: tuple, b: tuple, radius: float, color: tuple) -> None:
        pen.line((a, b), fill=(*color, 255), width=max(1, round(2 * radius * unit)))
        dot(a, radius, color)
        dot(b, radius, color)

    def shade(color: tuple, factor: float) -> tuple:
        return tuple(round(c * factor) for c in color)

    def between(a: tuple, b: tuple, share: float) -> tuple:
        return tuple(p + (q - p) * share for p, q in zip(a, b))

    middle = between(at["left_ear"], at["right_ear"], 0.5)
    neck = between(at["left_shoulder"], at["right_shoulder"], 0.5)
    if puppet.long_hair:
        limb(middle, between(middle, neck, 0.75), 0.105, puppet.hair)
    for own in ("left", "right"):
        limb(
            at[f"{own}_hip"], at[f"{own}_knee"], 0.052, shade(pants, 1.0 if own == "left" else 0.88)
        )
        limb(
            at[f"{own}_knee"],
            at[f"{own}_ankle"],
            0.044,
            shade(pants, 1.0 if own == "left" else 0.88),
        )
        sign = 1 if own == "left" else -1
        foot = (at[f"{own}_ankle"][0] + sign * 0.03 * unit, at[f"{own}_ankle"][1] + 0.015 * unit)
        limb(at[f"{own}_ankle"], foot, 0.032, shoe)
    limb(neck, middle, 0.04, shade(puppet.skin, 0.9))
    corners = [at[name] for name in ("left_shoulder", "right_shoulder", "right_hip", "left_hip")]
    pen.polygon(corners, fill=(*shirt, 255))
    for a, b in zip(corners, [*corners[1:], corners[0]]):
        limb(a, b, 0.038, shirt)
    for own in ("left", "right"):
        sleeve = shade(shirt, 0.86)
        limb(at[f"{own}_elbow"], at[f"{own}_wrist"], 0.03, shade(shirt, 0.74))
        limb(at[f"{own}_shoulder"], at[f"{own}_elbow"], 0.036, sleeve)
        dot(at[f"{own}_wrist"], 0.042, puppet.skin)
        dot(at[f"{own}_ear"], 0.022, shade(puppet.skin, 0.88))
    crown = (middle[0], middle[1] - 0.022 * unit)
    dot(crown, 0.102, puppet.hair)
    dot((middle[0], middle[1] + 0.012 * unit), 0.09, puppet.skin)
    for own in ("left", "right"):
        dot(at[f"{own}_eye"], 0.017, (30, 26, 30))
    dot(at["nose"], 0.014, shade(puppet.skin, 0.72))
    mouth = (at["nose"][0], at["nose"][1] + 0.036 * unit)
    pen.line(
        ((mouth[0] - 0.025 * unit, mouth[1]), (mouth[0] + 0.025 * unit, mouth[1])),
        fill=(150, 50, 56, 255),
        width=max(1, round(0.014 * unit)),
    )

    # Premultiplied, so that averaging does not bring the transparent color to the outline.
    pixels = np.asarray(canvas, np.float32) / 255
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
