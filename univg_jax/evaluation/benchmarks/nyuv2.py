"""NYUv2 depth: 654 test pictures of rooms (Eigen's split), 480 x 640.

Depth counts between 1 mm and 10 m, without these ends, and in Eigen's crop. Lists name a picture
and its depth in each row: Marigold's `filename_list_test.txt` (labeled part, raw depth, a third
column of filled depth that does not count), or ZoeDepth's `nyudepthv2_test_files_with_gt.txt`
(a third column of focal lengths). Both have millimeters as 16-bit PNG. Without a list, `source` has
the same pictures as HDF5 files with `rgb` and `depth` (FastDepth's `val/official/*.h5`).
"""

import dataclasses
import io
import os

import numpy as np

from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, needs_extra
from univg_jax.evaluation import depth
from univg_jax.evaluation.depth import DepthCase, DepthCases, Row
from univg_jax.evaluation.official import Official
from univg_jax.fields import setting

NUM_IMAGES = 654
SHAPE = (480, 640)
LIMITS = (1e-3, 10.0)
CROP = np.s_[45:471, 41:601]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which pictures are asked for; a result stores the list's hash."""

    list_file: str = setting(
        "", "the list of pictures and depths; without one all .h5 files are read", is_path=True
    )


def open_cases(source: str | os.PathLike, list_file: str | os.PathLike = "") -> DepthCases:
    """The pictures of a list, whose files are in `source`: a folder, a zip or a tar.

    Raises UserError (NotFoundError) for a list or a source that is not there, or not as expected.
    """
    read = depth.open_files(source)
    if list_file:
        rows = depth.read_list(list_file, columns=2)
    else:
        rows = [(name,) for name in sorted(_names(source))]
        if not rows:
            raise NotFoundError(f"{source} has no .h5 files: expected these, or a list of files")

    def case(row: Row) -> DepthCase:
        if len(row) == 1:
            image, meters = _read_hdf5(read(row[0]))
        else:
            image = images.decode_rgb(read(row[0]))
            meters = depth.levels_of(read(row[1])) / 1000
        if meters.shape != SHAPE:
            raise UserError(f"its depth is {list(meters.shape)}: expected {list(SHAPE)}")
        valid = np.zeros(SHAPE, bool)
        valid[CROP] = depth.between(meters, LIMITS)[CROP]
        return depth.make_case(row, image, meters, valid, LIMITS)

    return DepthCases(rows, case)


def _names(source: str | os.PathLike) -> list[str]:
    from data_pipelines.native import coco

    return coco.open_store(os.fspath(source)).names((".h5",))


def _read_hdf5(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    with needs_extra("data", "reading NYUv2's HDF5 files"):
        import h5py
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            rgb, meters = file["rgb"][()], file["depth"][()]
    except Exception as error:  # HDF5's library raises many kinds for damaged files
        raise UserError(f"is not an HDF5 file of `rgb` and `depth`: {error}") from None
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[0] != 3:
        raise UserError(f"its rgb is {rgb.dtype} {list(rgb.shape)}: expected uint8 [3, h, w]")
    return np.moveaxis(rgb, 0, -1), meters.astype(float)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings. Raises NotFoundError for a list that is not there."""
    return depth.benchmark_of(
        "nyuv2",
        lambda path: open_cases(path, settings.list_file),
        counts=(NUM_IMAGES,),
        settings={"list": depth.list_digest(settings.list_file)},
        published=depth.published(marigold=(0.055, 0.964), dinov3=(0.043, 0.98)),
    )


BENCHMARK = benchmark()
