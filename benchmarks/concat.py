"""Editing with the source image as channels, as in UniVG, against the source image as tokens: time,
memory, FLOPs.

    python benchmarks/concat.py

The same MM-DiT, text, times and solver. As channels, the model reads [noisy, source, mask], 33
channels a position, and has n image tokens. As tokens, it reads a latent of twice the height,
[noisy, mask] above [source, mask], and has 2 n; the velocity is the upper half. Attention goes over
the queries in blocks, as accelerators' kernels do, so that no [tokens x tokens] array lies in
memory. Steps and rounds are few: ratios, not seconds, carry over.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import best_seconds, use_huge_pages

from univg_jax import flow
from univg_jax.models.attention import xla_attention
from univg_jax.models.mmdit import MMDiT, make_mmdit
from univg_jax.sampling import Sampler, solve

LATENT, FACTOR, TOKENS = 16, 8, 32  # channels of a latent, pixels a position, text tokens
QUERIES = 256  # of a block


def blocked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """`xla_attention` in blocks of queries, of which the backward pass recomputes each."""
    b, n, heads, c = q.shape
    blocks = (
        jnp.pad(q, ((0, 0), (0, -n % QUERIES), (0, 0), (0, 0)))
        .reshape(b, -1, QUERIES, heads, c)
        .swapaxes(0, 1)
    )
    out = jax.lax.map(jax.checkpoint(lambda block: xla_attention(block, k, v, mask)), blocks)
    return out.swapaxes(0, 1).reshape(b, -1, heads, c)[:, :n]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How the source enters: the model and the latents that it reads."""

    model: MMDiT
    # noisy, source, mask -> the model's input
    join: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    rows: int  # of the model's input for one of the image


def ways(base: MMDiT) -> dict[str, Way]:
    def channels(x: jax.Array, source: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.concatenate([x, source, mask], axis=-1)

    def tokens(x: jax.Array, source: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.concatenate([y, mask], axis=-1) for y in (x, source)], axis=1)

    return {
        "channels": Way(model=base.clone(in_channels=2 * LATENT + 1), join=channels, rows=1),
        "tokens": Way(model=base.clone(in_channels=LATENT + 1), join=tokens, rows=2),
    }


def compiled(way: Way, *, side: int, steps: int, train: bool) -> tuple[Callable[[], None], int]:
    """Sampling in `steps` steps, or one gradient, of one image: a function that runs it, and its
    temporaries' bytes.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, source, mask = (
        normal(1, side, side, LATENT),
        normal(1, side, side, LATENT),
        jnp.ones((1, side, side, 1)),
    )
    text = dict(
        text_emb=normal(1, TOKENS, way.model.text_dim), pooled_emb=normal(1, way.model.pooled_dim)
    )
    init = jax.jit(
        lambda: way.model.init(jax.random.key(0), way.join(x, source, mask), **text, t=jnp.ones(1))
    )
    params = init()["params"]

    def velocity(params, x, t):
        return way.model.apply({"params": params}, way.join(x, source, mask), **text, t=t)[:, :side]

    def sample(params, x):
        return solve(lambda x, t: velocity(params, x, t[None]), x, Sampler(steps=steps))

    def gradient(params, x):
        def loss(params):
            return jnp.mean(
                flow.loss_at(
                    lambda x, t: velocity(params, x, t), source, noise=x, t=jnp.full(1, 0.5)
                )
            )

        return optax.tree.norm(jax.grad(loss)(params))

    program = jax.jit(gradient if train else sample).lower(params, x).compile()
    return lambda: jax.block_until_ready(
        program(params, x)
    ), program.memory_analysis().temp_size_in_bytes


def flops(way: Way, *, side: int, train: bool) -> float:
    return way.model.matmul_flops(
        height=way.rows * side, width=side, num_tokens=TOKENS, train=train
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="256,512,1024", help="pixels")
    parser.add_argument(
        "--train-sizes", default="256,512", help="pixels; a gradient takes three times as long"
    )
    parser.add_argument("--hidden-dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    use_huge_pages()

    fields = dict(text_dim=384, pooled_dim=384, attention=blocked_attention)
    both = ways(
        MMDiT(
            hidden_dim=args.hidden_dim, depth=args.depth, num_heads=args.hidden_dim // 64, **fields
        )
    )
    largest = ways(make_mmdit("xl"))
    print(
        "tokens / channels:             seconds          ratio  memory  FLOPs  FLOPs of a model of the paper's size"
    )
    results = []
    for train, sizes in ((False, args.sizes), (True, args.train_sizes)):
        for size in map(int, filter(None, sizes.split(","))):
            side = size // FACTOR
            programs = {
                n: compiled(way, side=side, steps=args.steps, train=train)
                for n, way in both.items()
            }
            best = best_seconds(
                {name: run for name, (run, _) in programs.items()}, rounds=args.rounds
            )
            memory = {name: temporaries for name, (_, temporaries) in programs.items()}
            work, paper = (
                {name: flops(way, side=side, train=train) for name, way in models.items()}
                for models in (both, largest)
            )
            ratios = [of["tokens"] / of["channels"] for of in (best, memory, work, paper)]
            what = f"{'gradient' if train else f'{args.steps} steps'} at {size} px"
            seconds = f"{best['tokens']:.2f} / {best['channels']:.2f}"
            print(
                f"{what:22s} {seconds:>16s} {ratios[0]:14.2f} {ratios[1]:7.2f} {ratios[2]:6.2f} {ratios[3]:6.2f}"
            )
            results.append(
                dict(pixels=size, train=train, seconds=best, temporaries=memory, ratios=ratios)
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
