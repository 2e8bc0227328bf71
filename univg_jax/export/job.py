"""What is exported: which parameters of which run, and how."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from univg_jax import quantization
from univg_jax.pipeline import Pipeline, load_config
from univg_jax.settings import Config
from univg_jax.streaming import Tensor
from univg_jax.trained import Trained
from univg_jax.trees import map_named

DTYPES = {"bf16": np.dtype(jnp.bfloat16), "f32": np.dtype(np.float32)}
QUANTIZED = "int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """An export. `copy_encoders`: pretrained encoders are copied, not only named."""

    trained: Trained
    ema: bool = True
    dtype: str = "f32"  # a name of DTYPES, or QUANTIZED
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
        """The parameters in the dtype of the export, by their names, read as they are written.

        Quantized ones have scales beside them.
        """
        stored = self.trained.tensors(self.which)
        return {
            key: tensor
            for name, x in stored.items()
            for key, tensor in self._as_exported(name, x).items()
        }

    def _as_exported(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if self.dtype == QUANTIZED:
            return quantization.quantize(name, tensor.astype(DTYPES["f32"]))
        return {name: tensor.astype(DTYPES[self.dtype])}

    @property
    def num_bytes(self) -> int:
        """About the size of the parameters in the dtype of the export."""
        itemsize = 1 if self.dtype == QUANTIZED else DTYPES[self.dtype].itemsize
        return self.num_params * itemsize

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(tensor.size for tensor in self.trained.tensors(self.which).values())

    def pipeline(self) -> Pipeline:
        """The model as it is before the export, with float32 parameters."""
        return Pipeline.load(
            self.trained.path, step=self.trained.step, ema=self.ema, pretrained=self.pretrained
        )

    def rounded(self, params: PyTree) -> PyTree:
        """Float32 parameters with the values that the export has, in place of those of `params`.

        Each array is given up for its successor, so that there is never a second model.
        """

        def rounded(name: str, x: jax.Array) -> jax.Array:
            stored = self._as_exported(name, Tensor.of(np.asarray(x)))
            values = quantization.restore(name, stored).astype(np.dtype(x.dtype)).read()
            where = x.sharding
            x.delete()
            return jax.device_put(values, where)

        return params if self.dtype == "f32" else map_named(rounded, params)
