"""What the tests of depth benchmarks share: rendered files, and where official lists are."""

import os
import pathlib

import numpy as np
import pytest

from data_pipelines import renderings
from univg_jax import images
from univg_jax.evaluation import depth
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.score_files import score_images

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


def summary_of_truths(spec, source, out):
    """The numbers of a benchmark whose first picture has its true depth; the rest is missing."""
    bench = open_benchmark(spec)
    rows = bench.read(source, excerpt=True)
    (name,) = depth.image_files(rows[0])
    shown = renderings.render_depth(rows[0].case().depth.astype(np.float32))
    write_png(out / name, shown[::2, ::2])  # a picture of any size is of the whole photograph
    return score_images(bench, rows, out, {}).summary(bench, rows)
