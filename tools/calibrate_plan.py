"""Bounds of public runs, by the account of `univg plan`, beside their measured times.

    python -m tools.calibrate_plan           three minutes on 2 cores

Compiles each program of `univg_jax.planning.calibration.RUNS` for its topology, and writes
the table of docs/performance.md. Compiled text is kept in `--cache`: with it a changed account is
tried in seconds; remove it after a change of the programs.
Figures that have changed belong into `RUNS`, from which `univg plan` takes what to expect. A bound
above a measured time is a fault of the account, and ends with an error.
"""

import argparse
import dataclasses
import gzip
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tools.plans import insert_tables
from tools.public_models import Decoder, Flux, forward, train_step
from univg_jax import tpu
from univg_jax.files import write_whole
from univg_jax.planning import hlo
from univg_jax.planning.calibration import REACHED, RUNS, Run
from univg_jax.planning.plan import lower_bounds
from univg_jax.planning.topology import Topology, num_chips, open_topology
from univg_jax.progress import timed

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = 8192
# What the recipes set so that blocks of 2048 x 2048 scores fit on a chip (v6e).
ON_CHIP = {"xla_tpu_scoped_vmem_limit_kib": 98304}
QUICK = {"exec_time_optimization_effort": -1.0}

LLAMA_8B = Decoder(width=4096, depth=32, heads=32, kv_heads=8, mlp=14336, vocabulary=128256)
LLAMA_70B = Decoder(
    width=8192,
    depth=80,
    heads=64,
    kv_heads=8,
    mlp=28672,
    vocabulary=128256,
    offloaded=("decoder_layer_input", "query", "key", "value"),
)
MISTRAL_7B = dataclasses.replace(LLAMA_8B, vocabulary=32000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What to compile for a run, and how often the run calls it."""

    model: Decoder | Flux
    rows: int  # of the batch on each device
    call: Callable = train_step
    times: int = 1
    # Of the compiler's effort: products stay the same, but not what is kept on the chip.
    quick: bool = True

    def compile(self, topology: Topology) -> str:
        """The text of the compiled program."""
        rows = self.rows * len(topology.devices)
        options = tpu.COMPILER_OPTIONS["tpu"] | (QUICK if self.quick else {})
        if isinstance(self.model, Decoder):
            batch = {"tokens": jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32)}
            dtype, options = jnp.float32, options | ON_CHIP
        else:
            dtype = jnp.bfloat16
            batch = {
                name: jax.ShapeDtypeStruct((rows, *shape), dtype)
                for name, shape in self.model.inputs().items()
            }
        lowered = self.call(self.model, topology.devices, dtype=dtype, **batch)
        return lowered.compile(options).as_text()


# The programs of RUNS, in the same order.
PROGRAMS = (
    Program(model=LLAMA_8B, rows=4),
    Program(model=LLAMA_8B, rows=3),
    Program(model=MISTRAL_7B, rows=6),
    Program(model=LLAMA_70B, rows=5),
    Program(model=Flux(), rows=2),
    Program(model=Flux(), rows=1, call=forward, times=28, quick=False),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A run, and the times that bound it, by what bounds it, in seconds."""

    run: Run
    flops: float  # of products, without what matrix units cannot fill
    seconds: dict[str, float]

    @property
    def bound(self) -> float:
        """Seconds that the run takes at least."""
        return max(self.seconds.values())

    @property
    def reached(self) -> float:
        """The share of the measured time that the bound accounts for."""
        return self.bound / self.run.measured


def calibrate(run: Run, program: Program, cache: pathlib.Path) -> Result:
    """Compiles a run's program, unless `cache` has its text, and bounds its time."""
    topology = open_topology(run.topology)
    kept = cache / f"{run.topology.replace(':', '-')}_{run.name.replace(' ', '_')}.hlo.gz"
    if not kept.exists():
        with timed(f"compiling {run.name} for {run.topology}"):
            text = program.compile(topology)
        write_whole(kept, gzip.compress(text.encode(), mtime=0))
    text = gzip.decompress(kept.read_bytes()).decode()
    counts = hlo.count(text, unit=topology.chip.unit)
    seconds = lower_bounds(counts, topology, devices=len(topology.devices))
    return Result(
        run=run,
        flops=program.times * counts.flops,
        seconds={name: program.times * value for name, value in seconds.items()},
    )


def table(results: list[Result]) -> str:
    """One row for each run."""
    lines = [
        "| run | chips | FLOPs a chip | compute, HBM, ICI | bound | measured | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        run = result.run
        generation, _ = run.topology.split(":")
        parts = ", ".join(f"{result.seconds[n]:.2f}" for n in ("compute", "HBM", "ICI"))
        lines.append(
            f"| {run.name} | {num_chips(run.topology)} {generation} | {result.flops:.4g} "
            f"| {parts} s | {result.bound:.4g} s | {run.measured:.4g} s "
            f"| {'' if run.whole else '**'}{result.reached:.0%}{'' if run.whole else '**'} |"
        )
    sources = "\n".join(f"* {result.run.name}: {result.run.source}" for result in results)
    return "\n".join(lines) + f"\n\nMeasured by:\n\n{sources}\n"


def main() -> None:
    """Writes the table of docs/performance.md, and says what differs from `RUNS`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", default="runs/calibration", type=pathlib.Path, metavar="FOLDER")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    # A program for another machine cannot be read back from JAX's own cache.
    jax.config.update("jax_enable_compilation_cache", False)
    args.cache.mkdir(parents=True, exist_ok=True)
    results = [calibrate(*pair, args.cache) for pair in zip(RUNS, PROGRAMS, strict=True)]
    print(table(results))
    docs = ROOT / "docs" / "performance.md"
    made = insert_tables(docs.read_text(), {"calibration": table(results)}, by="calibrate_plan.py")
    write_whole(docs, made)
    for result in results:
        if not math.isclose(result.bound, result.run.bound, rel_tol=2e-3):
            print(f"RUNS has {result.run.bound} s for {result.run.name}: {result.bound:.4g} s")
    print(f"reached: {min(REACHED):.2f} to {max(REACHED):.2f} (RUNS)")
    if wrong := [result.run.name for result in results if result.reached > 1]:
        raise SystemExit(f"a bound above the measured time: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
