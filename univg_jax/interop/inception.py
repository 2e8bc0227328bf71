"""FID's Inception-v3 from the common PyTorch port of its weights (pytorch-fid, torch-fidelity)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.folder import StoredModel, loader, map_weights, open_model
from univg_jax.interop.tensors import PICKLES, PathLike
from univg_jax.models.inception import InceptionV3
from univg_jax.pretrained import local_path
from univg_jax.trees import named_leaves

TENSORS = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "bias": "bias",
}


def open_inception(path: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The network of a safetensors file, or of the only one in a folder.

    The file has the names of `pt_inception-2015-12-05`: `Conv2d_1a_3x3.conv.weight`, ...
    `fc.weight` [1008 2048]; that one is a pickle, to be converted by `read_pickle`. `dtype` is the
    compute dtype; FID is defined in float32. Raises what `open_model` raises, and UserError for a
    pickle and for a folder with several files.
    """
    file = _file(local_path(path))
    model = InceptionV3(dtype=dtype)
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    names = {}
    for leaf in named_leaves(abstract):
        *modules, kind = leaf.split("/")
        names[leaf] = ".".join([*modules, TENSORS[kind]])
    return open_model(
        file.parent,
        file.name,
        module=model,
        abstract=abstract,
        weights=map_weights(abstract, outer=names),
        ignored=r".*\.num_batches_tracked",
    )


load_inception = loader(open_inception)


def _file(path: Path) -> Path:
    """The only safetensors file that `path` is or has."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in files if file.suffix == ".safetensors"]
    pickles = [file for file in files if file.suffix in PICKLES]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{path} has several safetensors files ({', '.join(f.name for f in found)}): name one"
        )
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle; convert it once, without running what it asks for: "
            "safetensors.numpy.save_file(univg_jax.interop.pickles.read_pickle(FILE), "
            "'inception.safetensors')"
        )
    raise NotFoundError(f"{path}: expected a .safetensors file, or a folder with one")
