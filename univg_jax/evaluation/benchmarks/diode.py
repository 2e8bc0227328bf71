"""DIODE depth: the 771 validation pictures, indoors and outdoors, 768 x 1024.

Depth counts where the data's own mask says so; predictions are clipped to 0.6 to 350 m. The list is
Marigold's `diode_val_all_filename_list.txt` (or its parts for indoors and outdoors), of `rgb depth
mask` in each row; depth and mask are .npy files, in meters and 0 or 1.
"""

import dataclasses
import io
import os

import numpy as np

from univg_jax import images
from univg_jax.errors import UserError
from univg_jax.evaluation import depth
from univg_jax.evaluation.depth import DepthCase, DepthCases, Row
from univg_jax.evaluation.official import Official
from univg_jax.fields import setting

NUM_IMAGES = 771
PARTS = (325, 446)  # indoors, outdoors
LIST = "diode_val_all_filename_list.txt"
LIMITS = (0.6, 350.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which pictures are asked for; a result stores the list's hash."""

    list_file: str = setting(
        "", f"the list of pictures; by default {LIST} beside them", is_path=True
    )


def open_cases(source: str | os.PathLike, list_file: str | os.PathLike) -> DepthCases:
    """The pictures of a list, whose files are in `source`: a folder, a zip or a tar.

    Raises UserError (NotFoundError) for a list or a source that is not there, or not as expected.
    """
    read = depth.open_files(source)

    def case(row: Row) -> DepthCase:
        meters, mask = _plane(read(row[1]), "depth"), _plane(read(row[2]), "mask")
        # A depth that is none cannot count, whatever the mask says.
        known = np.isfinite(meters) & (meters > 0)
        meters = np.where(known, meters, 0)
        valid = (mask != 0) & known if mask.shape == known.shape else mask != 0
        return depth.make_case(row, images.decode_rgb(read(row[0])), meters, valid, LIMITS)

    return DepthCases(depth.read_list(list_file, columns=3), case)


def _plane(data: bytes, name: str) -> np.ndarray:
    """The numbers [h w] of an .npy file [h w] or [h w 1]."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"its {name} is no .npy file of numbers: {error}") from None
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise UserError(
            f"its {name} is {values.dtype} {list(values.shape)}: expected numbers [h, w]"
        )
    return values


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings. Raises NotFoundError for a list that is not there."""
    return depth.benchmark_of(
        "diode",
        lambda path: open_cases(path, settings.list_file or os.path.join(path, LIST)),
        counts=(NUM_IMAGES, *PARTS),
        settings={"list": depth.list_digest(settings.list_file)},
        published=depth.published(marigold=(0.308, 0.773), dinov3=(0.256, 0.822)),
    )


BENCHMARK = benchmark()
