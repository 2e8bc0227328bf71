"""What `Pipeline.load(tasks=...)` saves where no task has a face: memory, and time of each batch.

    python benchmarks/load_encoders.py

Records the encoders of a run in a temporary folder: MiniLM, a linear codec, and CLIP's ViT-L/14
with random weights as the face encoder. Two processes load them in bfloat16, all of them and
without the last, and encode the conditions of one row, again and again; the fastest time counts.
Prints the process's own memory (RssAnon) beyond what it had before, and the seconds.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from load_weights import own_memory

from univg_jax import encoders
from univg_jax.batch import BatchShape
from univg_jax.interop.folder import CONV, map_weights, write_params
from univg_jax.interop.transformers import CLIP_LAYER, CLIP_VISION
from univg_jax.models.clip import CLIPVision
from univg_jax.settings import Conditioning

SIDE = 64  # of the pictures, in pixels
CHOICES = {"all": (), "without faces": ("identity",)}


def conditioning(folder: Path) -> Conditioning:
    """The encoders of the run."""
    identity = {"kind": "clip", "dtype": "bfloat16"}
    return Conditioning(text="minilm", codec="linear", identity=identity, folder=str(folder))


def write_vision(folder: Path) -> None:
    """Writes CLIP's ViT-L/14 with random weights."""
    module, rng = CLIPVision(), np.random.default_rng(0)
    side, patch = module.image_size, module.patch_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
    prefix = "vision_model."
    weights = map_weights(
        params,
        outer={ours: prefix + theirs for ours, theirs in CLIP_VISION.items()}
        | {"projection": "visual_projection"},
        block=CLIP_LAYER,
        block_name=prefix + "encoder.layers.{}.",
    )
    kernel = "embed/patch_embed/kernel"
    shape = (module.hidden_dim, 3, patch, patch)
    weights[kernel] = dataclasses.replace(weights[kernel], shape=shape, axes=CONV)
    config = dict(
        model_type="clip_vision_model",
        image_size=side,
        patch_size=patch,
        hidden_size=module.hidden_dim,
        intermediate_size=module.mlp_dim,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        projection_dim=module.projection_dim,
        hidden_act=module.activation,
    )
    write_params(folder, "model.safetensors", params=params, weights=weights, config=config)


def measure(folder: Path, skip: tuple[str, ...]) -> dict[str, float]:
    """Megabytes of the loaded encoders, and seconds of the conditions of a row."""
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32)))
    before = own_memory()
    found = encoders.load(folder / "run", folder=str(folder), skip=skip)
    jax.block_until_ready(found.frozen)
    megabytes = (own_memory() - before) / 1e6
    batch = BatchShape(height=SIDE, width=SIDE, num_tokens=40, face=SIDE).spec(1)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    run = jax.jit(found.conditioner.conditions)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(run(found.frozen, batch))
        seconds.append(time.perf_counter() - begin)
    return {"megabytes": megabytes, "seconds": min(seconds[1:])}


def main() -> None:
    """Measures both, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, choice = args.measure
        print(json.dumps(measure(Path(folder), CHOICES[choice])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_vision(folder / "image_encoder")
        pictures = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)
        encoders.prepare(
            conditioning(folder),
            workdir=folder / "run",
            images=lambda: pictures,
            portraits=lambda: [],
        )
        print(f"{'encoders':16}{'MB':>8}{'ms a row':>10}")
        for choice in CHOICES:
            command = [sys.executable, __file__, "--measure", scratch, choice]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            print(f"{choice:16}{found['megabytes']:8.0f}{1000 * found['seconds']:10.1f}")


if __name__ == "__main__":
    main()
