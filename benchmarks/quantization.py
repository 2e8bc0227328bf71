"""What fewer bits of the weights do to pictures: bfloat16, int8 as an export has it, and fp8.

    python benchmarks/quantization.py --checkpoint=runs/quickstart/stage3 [--seeds=8]

Every task of a trained model makes pictures of the same inputs and noise with the parameters as
they are, and rounded. fp8 is float8_e4m3fn with the scale that int8 has, one for each output of a
kernel; all else stays float32 in both. Prints the rounding error of the kernels relative to their
own size, and how far pictures differ, in levels of 255: the mean, and the most of any pixel.
"""

import argparse
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from univg_jax import Pipeline
from univg_jax.export import compare
from univg_jax.quantization import is_quantized, quantize, restore
from univg_jax.streaming import Tensor
from univg_jax.trees import map_named, named_leaves

Values = Float[np.ndarray, "..."]
FP8 = np.dtype(jnp.float8_e4m3fn)


def bf16(name: str, values: Values) -> Values:
    """As `univg export --dtype=bf16` rounds."""
    return values.astype(jnp.bfloat16).astype(np.float32)


def int8(name: str, values: Values) -> Values:
    """As `univg export --dtype=int8` rounds."""
    return restore(name, quantize(name, Tensor.of(values))).read()


def fp8(name: str, values: Values) -> Values:
    """The largest weight of each output becomes the largest number of e4m3."""
    if not is_quantized(name):
        return values
    largest = np.abs(values).max(axis=-2, keepdims=True)
    scale = np.maximum(largest / float(jnp.finfo(FP8).max), np.finfo(np.float32).tiny)
    return (values / scale).astype(FP8).astype(np.float32) * scale


def kernel_error(params: dict, rounded: dict) -> float:
    """The root mean square of what rounding changes, relative to that of the kernels."""
    before, after = named_leaves(params), named_leaves(rounded)
    kernels = [name for name in before if is_quantized(name)]
    change = sum(float(((after[n] - before[n]) ** 2).sum()) for n in kernels)
    return (change / sum(float((before[n] ** 2).sum()) for n in kernels)) ** 0.5


def measure(pipeline: Pipeline, *, seeds: int) -> None:
    """Prints the tables."""
    cases = [
        dataclasses.replace(case, seed=seed)
        for case in compare.make_cases(pipeline.tasks, resolution=pipeline.config.data.resolution)
        for seed in range(seeds)
    ]
    expected = compare.answer(pipeline, cases)
    found: dict[str, list[compare.Difference]] = {}

    def with_params(rounding: Callable[[str, Values], Values]) -> Pipeline:
        params = map_named(
            lambda name, x: jax.device_put(rounding(name, np.asarray(x)), x.sharding),
            pipeline.params,
        )
        return dataclasses.replace(pipeline, params=params)

    print("| weights | kernels' relative error | mean | most |\n|---|---|---|---|")
    for rounding in (bf16, int8, fp8):
        other = with_params(rounding)
        made = compare.answer(other, cases)
        found[rounding.__name__] = [
            compare.Difference.of(a, b) for a, b in zip(expected, made, strict=True)
        ]
        error, every = kernel_error(pipeline.params, other.params), found[rounding.__name__]
        print(
            f"| {rounding.__name__} | {error:.2%} | {np.mean([d.mean for d in every]):.2f} | "
            f"{max(d.most for d in every)} |"
        )
    print(f"\n| task: mean, most | {' | '.join(found)} |\n|---|---|---|---|")
    for task in pipeline.tasks:
        rows = [
            [d for d, case in zip(every, cases, strict=True) if case.task == task]
            for every in found.values()
        ]
        cells = [f"{np.mean([d.mean for d in r]):.2f}, {max(d.most for d in r)}" for r in rows]
        print(f"| {task} | {' | '.join(cells)} |")


def main() -> None:
    """Loads the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    measure(Pipeline.load(args.checkpoint), seeds=args.seeds)


if __name__ == "__main__":
    main()
