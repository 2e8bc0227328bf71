"""One training step of our MM-DiT against diffusers' `SD3Transformer2DModel` on PyTorch eager: the same model,
AdamW, float32, on this CPU. Runs alternate in one process and the fastest of each counts, so that other load
on the machine hits both. Prints milliseconds, the ratio, and the share of the machine's measured matmul peak.

    python benchmarks/train_step.py                        # 384 wide, 256 image and 32 text tokens, batch 8
    python benchmarks/train_step.py --preset=quickstart --batch=16
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from univg_jax.models.mmdit import MMDiT

PRESETS = {
    "reference": dict(hidden_dim=384, depth=6, num_heads=6, side=32, tokens=32, batch=8),
    "quickstart": dict(hidden_dim=256, depth=6, num_heads=4, side=12, tokens=24, batch=16),
}
CHANNELS = dict(in_channels=33, out_channels=16, text_dim=384, pooled_dim=384)


def step_flops(model: MMDiT, *, side: int, tokens: int, batch: int) -> float:
    """Matmul FLOPs of one step: 2 per multiply-add, backward twice the forward.

    A block has 4 + 2 mlp_ratio maps of d x d for each token and 2 (n + m)^2 d of attention; its modulations,
    6 d^2 a stream, count once an example. The last block's text has keys and values only.
    """
    d, n, m = model.hidden_dim, (side // model.patch_size) ** 2, tokens
    per_token = (4 + 2 * model.mlp_ratio) * d * d
    block = (n + m) * per_token + 2 * (n + m) ** 2 * d + 12 * d * d
    last = n * per_token + m * 2 * d * d + 2 * n * (n + m) * d + 8 * d * d
    patch = model.patch_size**2 * (model.in_channels + model.out_channels)
    ends = n * patch * d + m * model.text_dim * d + (256 + model.pooled_dim + 4 * d) * d
    return 3 * 2 * batch * ((model.depth - 1) * block + last + ends)


def ours(model: MMDiT, *, side: int, tokens: int, batch: int) -> Callable[[], None]:
    """A function that runs one step and waits for it."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    inputs = (
        normal(batch, side, side, model.in_channels),
        normal(batch, tokens, model.text_dim),
        normal(batch, model.pooled_dim),
        jnp.asarray(rng.uniform(size=batch), jnp.float32),
    )
    target = normal(batch, side, side, model.out_channels)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    optimizer = optax.adamw(1e-4)

    def step(params, moments, inputs, target):
        def loss(p):
            return jnp.mean((model.apply({"params": p}, *inputs) - target) ** 2)

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = [params, optimizer.init(params)]

    def run() -> None:
        state[:] = jax.block_until_ready(compiled(*state, inputs, target))

    return run


def theirs(model: MMDiT, *, side: int, tokens: int, batch: int) -> Callable[[], None]:
    """The same step of diffusers' model on PyTorch eager."""
    import torch
    from diffusers import SD3Transformer2DModel

    torch.set_num_threads(os.cpu_count())
    network = SD3Transformer2DModel(
        sample_size=side,
        patch_size=model.patch_size,
        in_channels=model.in_channels,
        num_layers=model.depth,
        attention_head_dim=model.hidden_dim // model.num_heads,
        num_attention_heads=model.num_heads,
        joint_attention_dim=model.text_dim,
        caption_projection_dim=model.hidden_dim,
        pooled_projection_dim=model.pooled_dim,
        out_channels=model.out_channels,
        pos_embed_max_size=side,
        qk_norm=model.qk_norm,
    )
    inputs = dict(
        hidden_states=torch.randn(batch, model.in_channels, side, side),
        encoder_hidden_states=torch.randn(batch, tokens, model.text_dim),
        pooled_projections=torch.randn(batch, model.pooled_dim),
        timestep=1000 * torch.rand(batch),
    )
    target = torch.randn(batch, model.out_channels, side, side)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def run() -> None:
        optimizer.zero_grad()
        ((network(**inputs).sample - target) ** 2).mean().backward()
        optimizer.step()

    return run


def matmul(size: int = 2048) -> Callable[[], None]:
    """One large float32 matmul of `2 size^3` FLOPs."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="reference")
    parser.add_argument("--batch", type=int, help="overrides the preset's")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    preset = {**PRESETS[args.preset], **({"batch": args.batch} if args.batch else {})}
    shape = {name: preset.pop(name) for name in ("side", "tokens", "batch")}

    model = MMDiT(**preset, **CHANNELS)
    runs = {
        "torch eager": theirs(model, **shape),
        "ours, scanned": ours(model, **shape),
        "ours, unrolled": ours(model.clone(scan=False), **shape),
        "matmul": matmul(),
    }
    for run in runs.values():  # compiles, warms up
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)

    peak = 2 * 2048**3 / best.pop("matmul") / 1e9
    flops = step_flops(model, **shape) / 1e9
    for name, seconds in best.items():
        rate = flops / seconds
        ratio = seconds / best["torch eager"]
        print(
            f"{name:15s} {1e3 * seconds:8.1f} ms   {ratio:.2f} x torch   {rate:6.1f} GFLOP/s, {rate / peak:.0%} of peak"
        )
    print(
        json.dumps(dict(preset=args.preset, **shape, gflop=round(flops, 1), peak_gflops=round(peak, 1), seconds=best))
    )


if __name__ == "__main__":
    main()
