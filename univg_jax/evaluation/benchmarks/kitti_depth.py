"""KITTI depth: Eigen's test split, 652 of 697 pictures from a car with annotated depth.

Picture and depth are cut to the benchmark's 352 x 1216 (the bottom, the middle). Depth counts up to
80 m and in Eigen's region of the cut (arXiv 1406.2283, as published affine-invariant numbers have
it) or in Garg's (arXiv 1603.04992). The list is `eigen_test_files_with_gt.txt`, of `rgb depth
focal`; rows whose depth is None are left out. Depth is 16-bit PNG of 1/256 m, 0 where unknown.
"""

import dataclasses
import os

import numpy as np

from univg_jax.errors import UserError, check_name
from univg_jax.evaluation import depth
from univg_jax.evaluation.depth import DepthCase, DepthCases, Row
from univg_jax.evaluation.metrics import Mask
from univg_jax.evaluation.official import Official
from univg_jax.fields import setting

NUM_IMAGES = 652
SHAPE = (352, 1216)
LIMITS = (1e-5, 80.0)
LIST = "eigen_test_files_with_gt.txt"
REGIONS = {  # top, bottom, left, right, as fractions of the cut
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which pictures are asked for, and where depth counts; a result stores the list's hash."""

    list_file: str = setting(
        "", f"the list of pictures; by default {LIST} beside them", is_path=True
    )
    raw: str = setting("", "where the raw release is, if not with the depth", is_path=True)
    region: str = setting("eigen", "where depth counts in the cut", names=tuple(REGIONS))


def open_cases(
    source: str | os.PathLike,
    list_file: str | os.PathLike,
    *,
    raw: str | os.PathLike = "",
    region: str = "eigen",
) -> DepthCases:
    """The pictures of a list, whose files are where `univg data build --dataset=kitti` finds them.

    `source` has the annotated depth, and the raw release, too, unless `raw` says where that is. An
    archive of the files that the list names is read as it is. Raises UserError (NotFoundError) for
    what is not there, or not as expected.
    """
    from data_pipelines import records
    from data_pipelines.datasets import kitti

    inside = region_mask(region)
    values = {"source": source, "raw": raw, "test_list": list_file}
    options = kitti.DATASET.make_options({name: os.fspath(v) for name, v in values.items() if v})
    if os.path.isfile(options.source):
        native = kitti.Kitti(options, ("test",), options.source, (options.raw or options.source,))
    else:
        native = kitti.DATASET.open(options)["kitti"]
    rows = [pair for part in native.parts("test") for pair in part.pairs]

    def case(row: Row) -> DepthCase:
        record = records.decode(native.make(row))
        image, meters = cut(record["image"]), cut(record["depth"].astype(float))
        valid = depth.between(meters, LIMITS) & inside
        return depth.make_case(row, image, meters, valid, LIMITS)

    return DepthCases(rows, case)


def cut(pixels: np.ndarray) -> np.ndarray:
    """The benchmark's part [352 1216 ...] of a picture. Raises UserError if it is smaller."""
    (height, width), (h, w) = pixels.shape[:2], SHAPE
    if height < h or width < w:
        raise UserError(f"it has {width} x {height} pixels: expected {w} x {h} or more")
    top, left = height - h, (width - w) // 2
    return pixels[top : top + h, left : left + w]


def region_mask(name: str) -> Mask:
    """Where depth counts in the cut. Raises UserError for a name that is none of REGIONS."""
    top, bottom, left, right = REGIONS[check_name(name, REGIONS, what="region of KITTI")]
    (height, width), mask = SHAPE, np.zeros(SHAPE, bool)
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
    return mask


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings. Raises NotFoundError for a list that is not there."""

    def cases(path: str | os.PathLike) -> DepthCases:
        file = settings.list_file or os.path.join(path, LIST)
        return open_cases(path, file, raw=settings.raw, region=settings.region)

    return depth.benchmark_of(
        "kitti_depth",
        cases,
        counts=(NUM_IMAGES,),
        settings={"list": depth.list_digest(settings.list_file), "region": settings.region},
        published=depth.published(marigold=(0.099, 0.916), dinov3=(0.073, 0.967)),
    )


BENCHMARK = benchmark()
