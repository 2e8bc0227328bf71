"""The source image of an edit as channels, as in UniVG, against as tokens: time, memory, FLOPs.

    python benchmarks/concat.py

The same MM-DiT, text, times and solver. As channels, the model reads [noisy, source, mask], 33
channels a position, and has n image tokens. As tokens (`MMDiT.source`), it reads [noisy, mask]
above [source, mask], and has 2 n. Attention goes over the queries in blocks, as accelerators'
kernels do, so that no [tokens x tokens] array lies in memory. Steps and rounds are few: ratios, not
seconds, carry over.
"""

import argparse
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
from univg_jax.sampling import solve
from univg_jax.settings import Sampler

LATENT, FACTOR, TOKENS = 16, 8, 32  # channels of a latent, pixels a position, text tokens
QUERIES = 256  # in a block of attention


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


def both_sources(base: MMDiT) -> dict[str, MMDiT]:
    """The same model with the source as channels, and as tokens."""
    base = base.clone(in_channels=2 * LATENT + 1, out_channels=LATENT)
    return {source: base.clone(source=source) for source in ("channels", "tokens")}


def compiled(model: MMDiT, *, side: int, steps: int, train: bool) -> tuple[Callable[[], None], int]:
    """A function that samples one image or takes one gradient, and the bytes of its temporaries."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, source = normal(1, side, side, LATENT), normal(1, side, side, LATENT)
    text = dict(text_emb=normal(1, TOKENS, model.text_dim), pooled_emb=normal(1, model.pooled_dim))

    def read(x):
        return jnp.concatenate([x, source, jnp.ones((1, side, side, 1))], axis=-1)

    init = jax.jit(lambda: model.init(jax.random.key(0), read(x), **text, t=jnp.ones(1)))
    params = init()["params"]

    def velocity(params, x, t):
        return model.apply({"params": params}, read(x), **text, t=t)

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
    temporaries = program.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(program(params, x)), temporaries


def flops(model: MMDiT, *, side: int, train: bool) -> float:
    """The FLOPs of the matrix products of one forward pass, or of one gradient."""
    return model.matmul_flops(height=side, width=side, num_tokens=TOKENS, train=train)


def main() -> None:
    """Prints a table, and all figures as JSON."""
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

    heads = args.hidden_dim // 64
    model = MMDiT(
        hidden_dim=args.hidden_dim,
        depth=args.depth,
        num_heads=heads,
        text_dim=384,
        pooled_dim=384,
        attention=blocked_attention,
    )
    small, paper = both_sources(model), both_sources(make_mmdit("xl"))
    print(f"{'tokens / channels':39s} {'time':>14s}  memory  FLOPs  FLOPs at the paper's size")
    results = []
    for train, sizes in ((False, args.sizes), (True, args.train_sizes)):
        for size in map(int, filter(None, sizes.split(","))):
            side = size // FACTOR
            programs = {
                name: compiled(one, side=side, steps=args.steps, train=train)
                for name, one in small.items()
            }
            best = best_seconds(
                {name: run for name, (run, _) in programs.items()}, rounds=args.rounds
            )
            memory = {name: temporaries for name, (_, temporaries) in programs.items()}
            ours, papers = (
                {name: flops(one, side=side, train=train) for name, one in models.items()}
                for models in (small, paper)
            )
            ratios = [x["tokens"] / x["channels"] for x in (best, memory, ours, papers)]
            name = f"{'gradient' if train else f'{args.steps} steps'} at {size} px"
            seconds = f"{best['tokens']:.2f} / {best['channels']:.2f} s"
            time, *others = ratios
            print(f"{name:22s} {seconds:>16s} {time:14.2f} " + "".join(f"{x:8.2f}" for x in others))
            results.append(
                dict(pixels=size, train=train, seconds=best, temporaries=memory, ratios=ratios)
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
