"""LPIPS as a scorer: how different two pictures of one size look."""

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from univg_jax.errors import UserError
from univg_jax.evaluation.scorers.network import digest_of
from univg_jax.interop.lpips import load_lpips
from univg_jax.models.lpips import SMALLEST
from univg_jax.pretrained import local_path


class Lpips:
    """The distance by the network of a file, or of a backbone's file and its `heads`, in float32.

    `opened_with` has the network, alex or vgg as the file is, which a benchmark's setting has to
    name (`score_files.check_settings`). Raises what `load_lpips` raises.
    """

    def __init__(self, path: str, *, heads: str | None = None):
        files = [local_path(file) for file in (path, heads) if file is not None]
        module, self._params = load_lpips(files)
        self._network = module.network
        self.opened_with = {"lpips": module.network}
        self.digest = digest_of(files)
        self._apply = jax.jit(lambda p, a, b: module.apply({"params": p}, a, b))

    def __call__(self, a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> float:
        """0 for equal pictures, but for rounding. Each size of pictures is compiled once."""
        least, (height, width) = SMALLEST[self._network], a.shape[:2]
        if min(height, width) < least:
            raise UserError(
                f"pictures of {width} x {height}: LPIPS's {self._network} needs {least} a side"
            )
        (distance,) = np.asarray(self._apply(self._params, _pixels(a), _pixels(b)))
        return float(distance)


def _pixels(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "1 h w 3"]:
    return (image.astype(np.float32) / 127.5 - 1)[None]
