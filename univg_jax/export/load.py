"""Runs a model that `univg export --format=stablehlo` wrote; it lies beside its programs.

It needs jax, flatbuffers (with which jax.export reads a program), numpy and safetensors:

    model = Model("FOLDER")
    images = model.sample("t2i", tokens=[ids], text_mask=[mask], seeds=[7])  # uint8 [b h w 3]
    text = model.run("text", tokens=[ids], text_mask=[mask])  # any other program

README.md says how to get the ids of a prompt, and manifest.json what each program takes.
`python load.py t2i INPUTS.npz IMAGES.npy` makes the pictures of the arrays in a file; there may be
more such threes.
"""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
from jax import export
from safetensors import safe_open


class Model:
    """The programs and weights in a folder, read when they are first needed."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.program, self.weight = functools.cache(self.program), functools.cache(self.weight)

    def sample(self, task, size=None, **inputs):
        """Pictures, uint8 [b h w 3], of a size such as "512x512", by default the manifest's."""
        task = self.manifest["tasks"][task]
        name = f"{size or self.manifest['size']}/{task['program']}"
        made = self.run(name, **{**task["inputs"], **inputs})
        if not made["finite"].all():
            raise ValueError("a picture is not finite: an input or a weight is no number")
        return made["images"]

    def run(self, name, **inputs):
        """The outputs of a program, by name. A value stands for all rows if it has no rows."""
        program, arrays = self.manifest["programs"][name], []
        specs = program["inputs"]
        inputs = {key: s["default"] for key, s in specs.items() if "default" in s} | inputs
        if wrong := inputs.keys() ^ specs.keys():
            raise TypeError(f"{name}: missing or unknown inputs: {', '.join(sorted(wrong))}")
        rows = len(inputs[next(iter(specs))])
        for key, value in ((key, np.asarray(inputs[key])) for key in specs):
            dtype, shape = specs[key]["dtype"], specs[key]["shape"]
            shape = [{"b": rows, "s + 1": value.size}.get(size, size) for size in shape]
            if value.dtype.kind == "f" != np.dtype(dtype).kind or value.ndim > len(shape):
                raise TypeError(
                    f"{name}: {key} is {value.dtype} {value.shape}, not {dtype} {shape}"
                )
            arrays.append(np.broadcast_to(value.astype(dtype), shape))
        made = self.program(name)([self.weight(key) for key in program["weights"]], arrays)
        return dict(zip(program["outputs"], map(np.asarray, made)))

    def program(self, name):
        platform = jax.default_backend().replace("gpu", "cuda")
        file = self.folder / "programs" / f"{name}.{platform}"
        return jax.jit(export.deserialize(bytearray(file.read_bytes())).call)

    def weight(self, name):
        with safe_open(self.folder / self.manifest["weights"][name], framework="np") as file:
            return jax.device_put(file.get_tensor(name))


if __name__ == "__main__":
    model = Model(pathlib.Path(__file__).parent)
    for task, inputs, images in zip(*[iter(sys.argv[1:])] * 3):
        with np.load(inputs) as given:
            np.save(images, model.sample(task, **given))
