"""What is exported: which parameters of which run, and how."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from univg_jax.pipeline import Pipeline, load_config
from univg_jax.settings import Config
from univg_jax.streaming import Tensor
from univg_jax.trained import Trained

DTYPES = {"bf16": np.dtype(jnp.bfloat16), "f32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """An export. `copy_encoders`: pretrained encoders are copied, not only named."""

    trained: Trained
    ema: bool = True
    dtype: str = "f32"  # a name of DTYPES
    max_file_bytes: int = 5 * 10**9
    copy_encoders: bool = False
    pretrained: str | None = None  # the folder of pretrained encoders, if not that of the config

    @property
    def which(self) -> str:
        """What is exported: "ema" or "params"."""
        return self.trained.which(ema=self.ema)

    @functools.cached_property
    def config(self) -> Config:
        """The run's config."""
        return load_config(self.trained.path, pretrained=self.pretrained)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters in the dtype of the export, by their names, read as they are written."""
        return {
            name: tensor.astype(DTYPES[self.dtype])
            for name, tensor in self.trained.tensors(self.which).items()
        }

    @property
    def num_bytes(self) -> int:
        """The size of the parameters in the dtype of the export."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(tensor.size for tensor in self.tensors.values())

    def pipeline(self) -> Pipeline:
        """The model as it is before the export, with float32 parameters."""
        return Pipeline.load(
            self.trained.path, step=self.trained.step, ema=self.ema, pretrained=self.pretrained
        )

    def rounded(self, params: PyTree) -> PyTree:
        """Float32 parameters with the values that the export has."""
        dtype = DTYPES[self.dtype]
        if dtype == np.float32:
            return params
        # Jitted, so that XLA on the mesh keeps every shard where it is.
        shardings = jax.tree.map(lambda x: x.sharding, params)
        round_all = jax.jit(
            lambda tree: jax.tree.map(lambda x: _through(x, dtype), tree), out_shardings=shardings
        )
        return round_all(params)


def _through(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """`x` rounded to a dtype of fewer bits."""
    info = jnp.finfo(dtype)
    # A cast there and back is no rounding to XLA, which may drop both.
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
