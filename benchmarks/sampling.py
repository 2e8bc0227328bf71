"""Guided sampling, 50 Euler steps, against diffusers' `StableDiffusion3Pipeline`.

The same weights, noise, text embeddings and times, float32, latents out, on this CPU: a model 384
wide and 6 deep, with 256 image and 32 text tokens (256 px), guided by text. Runs alternate in one
process and the fastest of each counts. Prints the ratio of the times, how far apart the results
are, and what our sampler adds to its forward passes.

    python benchmarks/sampling.py
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import best_seconds, use_huge_pages

from univg_jax.interop.diffusers import save_transformer
from univg_jax.models.attention import cpu_attention
from univg_jax.models.mmdit import MMDiT
from univg_jax.sampling import guidance_weights, guided_velocity, solve
from univg_jax.settings import Guidance, Sampler

MODEL = MMDiT(
    hidden_dim=384,
    depth=6,
    num_heads=6,
    in_channels=16,
    out_channels=16,
    text_dim=384,
    pooled_dim=384,
    scan=False,
    attention=cpu_attention,
)
SIDE, TOKENS, SCALE, SHIFT = 32, 32, 4.5, 3.0


def prepare(batch: int) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """Parameters without zeros, noise, and conditions: the text's rows, then the null text's."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    conditions = dict(
        text_emb=normal(2 * batch, TOKENS, MODEL.text_dim),
        pooled_emb=normal(2 * batch, MODEL.pooled_dim),
    )
    noise = normal(batch, SIDE, SIDE, MODEL.in_channels)
    stacked, t = np.tile(noise, (2, 1, 1, 1)), np.ones(2 * batch, np.float32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), stacked, t=t, **conditions)
    params = jax.tree.map(lambda s: 0.03 * normal(*s.shape), shapes["params"])
    return params, noise, conditions


def ours(
    params: Any, noise: np.ndarray, conditions: dict[str, np.ndarray], *, steps: int
) -> tuple[Callable, Callable]:
    """The sampler, and as many forward passes one by one: functions that return their result."""
    # Theirs has all rows of one pass before the other's; ours has the passes of a row side by side.
    conditions = {
        k: v.reshape(2, -1, *v.shape[1:]).swapaxes(0, 1).reshape(v.shape)
        for k, v in conditions.items()
    }
    params, noise, conditions = jax.device_put((params, noise, conditions))

    def predict(params, conditions, x, t):
        return MODEL.apply({"params": params}, x, t=t, **conditions)

    @jax.jit
    def sample(params, conditions, noise):
        sampler = Sampler(solver="euler", steps=steps, shift=SHIFT)
        weights = jnp.asarray(guidance_weights(Guidance(text=SCALE)))
        return solve(
            guided_velocity(lambda x, t: predict(params, conditions, x, t), weights, sampler),
            noise,
            sampler,
        )

    forward = jax.jit(predict)
    stacked, t = jnp.tile(noise, (2, 1, 1, 1)), jnp.ones(2 * len(noise))

    def forwards() -> jax.Array:
        for _ in range(steps):
            result = forward(params, conditions, stacked, t)
        return jax.block_until_ready(result)

    return lambda: jax.block_until_ready(sample(params, conditions, noise)), forwards


def theirs(
    params: Any, noise: np.ndarray, conditions: dict[str, np.ndarray], *, steps: int, compiled: bool
) -> Callable[[], np.ndarray]:
    """Their pipeline on our weights, without text encoders and VAE.

    Calling the function returns latents, channels last.
    """
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        save_transformer(MODEL, params, folder)
        transformer = SD3Transformer2DModel.from_pretrained(folder).eval()
    kinds = ("text_encoder", "tokenizer")
    names = [f"{kind}{number}" for kind in kinds for number in ("", "_2", "_3")]
    absent = dict.fromkeys(["vae", *names])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer.compile()
    text, null = (
        dict(zip(("prompt_embeds", "pooled_prompt_embeds"), map(torch.tensor, rows), strict=True))
        for rows in zip(
            *(np.split(conditions[name], 2) for name in ("text_emb", "pooled_emb")), strict=True
        )
    )
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))

    def sample() -> np.ndarray:
        result = pipeline(
            **text,
            **{f"negative_{name}": value for name, value in null.items()},
            height=8 * SIDE,
            width=8 * SIDE,
            guidance_scale=SCALE,
            latents=latents,
            # the same times as ours, before the shift
            sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(),
            output_type="latent",
        )
        return result.images.numpy().transpose(0, 2, 3, 1)

    return sample


def main() -> None:
    """Measures, and prints times, ratios and differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--batch", type=int, default=1, help="images; each is two rows, with and without its text"
    )
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    use_huge_pages()

    inputs = prepare(args.batch)
    sample, forwards = ours(*inputs, steps=args.steps)
    runs = {"torch eager": theirs(*inputs, steps=args.steps, compiled=False)}
    if shutil.which(os.environ.get("CXX", "g++")):
        runs["torch compiled"] = theirs(*inputs, steps=args.steps, compiled=True)
    else:
        print("torch compiled: not measured, inductor needs a C++ compiler (set CXX)")
    runs |= {"ours": sample, "forward passes": forwards}

    want, got = runs["torch eager"](), np.asarray(sample())
    best = best_seconds(runs, rounds=args.rounds)
    fastest = min(seconds for name, seconds in best.items() if name.startswith("torch"))
    for name, seconds in best.items():
        eager = seconds / best["torch eager"]
        ratio = seconds / fastest
        print(f"{name:15s} {seconds:7.2f} s  {eager:.2f} x eager  {ratio:.2f} x fastest torch")
    overhead = best["ours"] / best["forward passes"] - 1
    difference = float(np.abs(got - want).max() / want.std())
    print(f"our sampler adds {overhead:+.1%} to its {args.steps} forward passes")
    print(f"ours and theirs differ by at most {difference:.1e} standard deviations")
    figures = dict(seconds=best, overhead=overhead, difference=difference)
    print(json.dumps(dict(steps=args.steps, batch=args.batch, **figures)))


if __name__ == "__main__":
    main()
