"""One training step of our MM-DiT against diffusers' `SD3Transformer2DModel` on PyTorch.

Eager and compiled: the same model, AdamW, float32, on this CPU. Steps alternate in one process and
the fastest of each counts. Prints the share of what a large matmul of the same library reaches,
milliseconds, and their ratio to PyTorch's. `our products` are all matrix products of the unrolled
step, one by one and without all else.

    python benchmarks/train_step.py         # 384 wide, 256 image and 32 text tokens, batch 8
    python benchmarks/train_step.py --preset=quickstart --batch=16
    python benchmarks/train_step.py --parts # where the time of our unrolled step goes on one core

The shares come first because matmul libraries differ by machine: PyTorch's MKL takes a slow path on
AMD's processors. To measure PyTorch with a fast one, tell MKL that the processor is Intel's:

    echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' > intel.c
    gcc -shared -fPIC intel.c -o intel.so
    LD_PRELOAD=./intel.so python benchmarks/train_step.py
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import best_seconds, use_huge_pages

from univg_jax.models.attention import cpu_attention
from univg_jax.models.mmdit import MMDiT
from univg_jax.planning import hlo, parse, traffic

PRESETS = {
    "reference": dict(hidden_dim=384, depth=6, num_heads=6, side=32, tokens=32, batch=8),
    "quickstart": dict(hidden_dim=256, depth=6, num_heads=4, side=12, tokens=24, batch=16),
}
CHANNELS = dict(in_channels=33, out_channels=16, text_dim=384, pooled_dim=384)


def ours(
    model: MMDiT, *, side: int, tokens: int, batch: int
) -> tuple[Callable[[], None], parse.Module]:
    """A function that runs one step and waits for it, and the compiled step."""
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

    state = [params, optimizer.init(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, inputs, target).compile()

    def run() -> None:
        state[:] = jax.block_until_ready(compiled(*state, inputs, target))

    return run, parse.parse(compiled.as_text())


def time_by_part(run: Callable[[], None], module: parse.Module, *, steps: int) -> dict:
    """Milliseconds of a step on one core: (part of the model, is it a product) -> ms.

    On several cores a trace does not say who does what: a product is on the thread that began it,
    and not on those that help. "not traced" is what is left of the step.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # as in univg_jax/training/profiling.py; and it would cost time
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            for _ in range(steps):
                run()
            seconds = time.perf_counter() - start
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    keys = {}
    for one in module.executions:
        if not one.fused:
            name = one.instruction.name
            inside = [one.instruction]
            if called := one.instruction.called("calls"):
                inside += module.computations[called].values()
            is_product = any(instruction.opcode == "dot" for instruction in inside)
            keys[name] = traffic.part_of(one.instruction, one.computation), is_product
    found = collections.Counter()
    for event in (e for plane in planes for line in plane.lines for e in line.events):
        if event.name in keys and "hlo_op" in dict(event.stats):
            found[keys[event.name]] += event.duration_ns / steps / 1e6
    found["not traced", False] = 1e3 * seconds / steps - sum(found.values())
    return found


def print_parts(found: dict) -> None:
    """A row for each part of the model, the longest first."""
    total = sum(found.values())
    print(f"{'a step on one core, ms':25s}  products  all else  share")
    rows = {part: [found[part, True], found[part, False]] for part, _ in found}
    for part, row in sorted(rows.items(), key=lambda item: -sum(item[1])):
        print(f"{part:25s}  {row[0]:8.1f}  {row[1]:8.1f}  {sum(row) / total:5.0%}")
    products = sum(row[0] for row in rows.values())
    print(f"{'all':25s}  {products:8.1f}  {total - products:8.1f}")
    print(f"{'':25s}  {products / total:8.0%}  {1 - products / total:8.0%}")


def print_memory(run: Callable[[], None], *, steps: int) -> None:
    """What the memory of a step costs: XLA asks for all of it anew, and the system clears it."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = 1e3 * (after.ru_stime - before.ru_stime) / steps
    user = 1e3 * (after.ru_utime - before.ru_utime) / steps
    faults = (after.ru_minflt - before.ru_minflt) / steps
    print(f"CPU time of a step: {user:.0f} ms, and {kernel:.0f} in the kernel; ", end="")
    print(f"{faults:.0f} page faults; at most {after.ru_maxrss >> 10} MiB")


def products_alone(products: Iterable[hlo.Product]) -> Callable[[], None]:
    """A function that computes products of these shapes, one after the other."""
    alone = []
    for shape, times in collections.Counter(products).items():
        count, rows, depth, columns = map(int, dataclasses.astuple(shape))
        x, y = jnp.ones((count, rows, depth)), jnp.ones((count, depth, columns))
        alone.append((jax.jit(jnp.matmul), x, y, times))

    def run() -> None:
        for product, x, y, times in alone:
            for _ in range(times):
                product(x, y).block_until_ready()

    return run


def theirs(
    model: MMDiT, *, side: int, tokens: int, batch: int, compiled: bool
) -> Callable[[], None]:
    """The same step of diffusers' model on PyTorch."""
    import torch
    from diffusers import SD3Transformer2DModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
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

    def loss() -> torch.Tensor:
        return ((network(**inputs).sample - target) ** 2).mean()

    if compiled:
        loss = torch.compile(loss)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


MATMUL = 2048  # rows and columns of the large product


def our_matmul() -> Callable[[], None]:
    """JAX's product of two large matrices."""
    a = jnp.ones((MATMUL, MATMUL))
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, a))


def their_matmul() -> Callable[[], None]:
    """PyTorch's."""
    import torch

    a = torch.ones(MATMUL, MATMUL)
    return lambda: torch.matmul(a, a)


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="reference")
    parser.add_argument("--batch", type=int, help="overrides the preset's")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--parts", action="store_true", help="our unrolled step alone, on one core, by a trace"
    )
    args = parser.parse_args()
    if args.parts:  # before JAX begins its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    use_huge_pages()
    preset = {**PRESETS[args.preset], **({"batch": args.batch} if args.batch else {})}
    shape = {name: preset.pop(name) for name in ("side", "tokens", "batch")}

    model = MMDiT(**preset, **CHANNELS, attention=cpu_attention)
    unrolled, compiled = ours(model.clone(scan=False), **shape)
    sizes = dict(height=shape["side"], width=shape["side"], num_tokens=shape["tokens"])
    gigaflops = shape["batch"] * model.matmul_flops(**sizes, train=True) / 1e9
    if args.parts:
        matmul = our_matmul()
        best = best_seconds({"step": unrolled, "matmul": matmul}, rounds=args.rounds)
        print_parts(time_by_part(unrolled, compiled, steps=args.rounds))
        print_memory(unrolled, steps=args.rounds)
        rate, peak = gigaflops / best["step"], 2 * MATMUL**3 / best["matmul"] / 1e9
        print(f"{rate:.0f} GFLOP/s, {rate / peak:.0%} of our matmul's {peak:.0f}")
        return
    steps = {"torch eager": theirs(model, **shape, compiled=False)}
    if shutil.which(os.environ.get("CXX", "g++")):
        steps["torch compiled"] = theirs(model, **shape, compiled=True)
    else:
        print("torch compiled: not measured, inductor needs a C++ compiler (set CXX)")
    steps["ours, scanned"], _ = ours(model.clone(scan=True), **shape)
    steps["ours, unrolled"] = unrolled
    steps["our products"] = products_alone(hlo.products(compiled))
    matmuls = {"torch matmul": their_matmul(), "our matmul": our_matmul()}
    best = best_seconds({**steps, **matmuls}, rounds=args.rounds)

    peak = {name.split()[0]: 2 * MATMUL**3 / best[name] / 1e9 for name in matmuls}
    eager = best["torch eager"]
    fastest = min(best[name] for name in steps if name.startswith("torch"))
    print(f"GLIBC_TUNABLES={os.environ['GLIBC_TUNABLES']}, for both")
    print(f"matmul of {MATMUL}: torch {peak['torch']:.0f} GFLOP/s, ours {peak['our']:.0f}")
    print(f"{'':15s} of own matmul  GFLOP/s        ms  x eager  x fastest torch")
    for name in steps:
        rate = gigaflops / best[name]
        share = rate / peak["torch" if name.startswith("torch") else "our"]
        ratios = f"{best[name] / eager:7.2f}  {best[name] / fastest:15.2f}"
        print(f"{name:15s} {share:13.0%}  {rate:7.0f}  {1e3 * best[name]:8.1f}  {ratios}")
    figures = dict(gflop=round(gigaflops, 1), peak_gflops=peak, seconds=best)
    print(json.dumps(dict(preset=args.preset, **shape, **figures)))


if __name__ == "__main__":
    main()
