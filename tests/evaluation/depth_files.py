"""What the tests of depth benchmarks share: rendered files, and where official lists are."""

import os
import pathlib

import numpy as np
import pytest

from univg_jax import images

LISTS = pathlib.Path(os.environ.get("UNIVG_BENCHMARKS", ".")) / "depth"
needs_lists = pytest.mark.skipif(
    not os.environ.get("UNIVG_BENCHMARKS"), reason="official lists are not part of the project"
)


def scene(height, width, *, near, far, seed=0):
    """A picture, and a ramp of depths that both ends of a range are in."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    meters = np.linspace(far, near, height)[:, None] + np.linspace(0, near / 2, width)
    return picture, meters


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(images.png_bytes(pixels))


def read_by_hand(prediction, depth, valid, low, high):
    """AbsRel and delta1, of a solution of least squares by numpy."""
    p, g = prediction[valid], depth[valid]
    design = np.stack([p, np.ones_like(p)], axis=1)
    aligned = np.clip(design @ np.linalg.lstsq(design, g, rcond=None)[0], low, high)
    ratio = np.maximum(aligned / g, g / aligned)
    return np.mean(np.abs(aligned - g) / g), np.mean(ratio < 1.25)
