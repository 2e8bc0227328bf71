"""`univg plan`: will it fit, and how fast can it be, on a TPU that is not here."""

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from univg_jax import configs, runtime, tpu
from univg_jax.cli import flags
from univg_jax.errors import UserError, check_name
from univg_jax.files import write_whole
from univg_jax.planning import search
from univg_jax.planning.plan import Plan, Program, compile_plan
from univg_jax.planning.search import format_bytes
from univg_jax.planning.topology import open_topology

INCLUDE = ("encoders", "sampling", "evaluation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.epilog = (
        "Any key of the config can be set: --config.data.batch_size=256 "
        "--config.model.overrides.remat=full"
    )
    flags.add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        action="extend",
        type=lambda names: names.split(","),
        metavar="T[,T...]",
        help="v5p:4x4x4, v5e:16x16, v6e:16x16*2 (two slices), ...: one column each; "
        "may be repeated",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="slices of each topology; the same as *N behind it",
    )
    parser.add_argument(
        "--include",
        default="",
        metavar="A,B",
        help="encoders (as part of the train step, as a run has them without data.text_cache), "
        "sampling, evaluation",
    )
    parser.add_argument(
        "--max-batch", action="store_true", help="also search the largest batch that fits"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="rank mesh shapes and remat policies by their roofline"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a third of the compile time; memory and its traffic some percent off",
    )
    parser.add_argument("--json", metavar="FILE", help="everything, in bytes, FLOPs and seconds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compiles the config for each topology, prints tables, and writes them as JSON if asked."""
    jax.config.update("jax_platforms", "cpu")  # compiling needs no device
    # A program for another machine cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    include = [
        check_name(name, INCLUDE, what="name in --include:")
        for name in filter(None, args.include.split(","))
    ]
    if args.slices < 1:
        raise UserError(f"--slices={args.slices}: expected at least 1")
    names = [name if args.slices == 1 else f"{name}*{args.slices}" for name in args.topology]
    config = configs.load(args.config, args.overrides)
    runtime.configure_jax()
    topologies = [open_topology(name) for name in names]
    compile_ = functools.partial(
        compile_plan, with_encoders="encoders" in include, quick=args.quick
    )
    report: dict[str, Any] = {"config": config.to_dict()}
    if args.sweep:
        ranked = {t.name: search.sweep(config, t, compile_) for t in topologies}
        for name, plans in ranked.items():
            print_sweep(name, plans)
        report["sweep"] = {name: [p.to_json() for p in plans] for name, plans in ranked.items()}
    else:
        programs = ("train", *(name for name in include if name != "encoders"))
        bar = tqdm(topologies, desc="compile", unit="topology", leave=False)
        plans = [compile_(config, topology, programs=programs) for topology in bar]
        print_plans(plans)
        report["plans"] = [p.to_json() for p in plans]
    if args.max_batch:
        report["max_batch"] = {}
        for topology in topologies:
            largest = search.max_batch(config, topology, compile_)
            report["max_batch"][topology.name] = largest
            print(f"{topology.name}: the largest batch that fits is {largest}")
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1))


def print_plans(plans: list[Plan]) -> None:
    """Prints one column for each plan; all have the same config and programs."""
    title = f"{plans[0].config}, a step of one device"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.topology, justify="right")
    for name, cell in _PLAN_ROWS:
        table.add_row(name, *map(cell, plans))
    for i, program in enumerate(plans[0].programs):
        table.add_section()
        encoders = "with" if program.name != "train" or plans[0].encoders else "without"
        table.add_row(f"[bold]{program.name}[/bold], {encoders} encoders", *[""] * len(plans))
        for name, cell in _PROGRAM_ROWS:
            table.add_row(f"  {name}", *(cell(plan, plan.programs[i]) for plan in plans))
    _print(table, width=60 + 24 * len(plans))
    for plan in plans:
        for program in plan.programs:
            if not program.fits:
                print(search.advice(plan, program))
    print(f"Peaks: {tpu.SOURCE}.")


def print_sweep(topology: str, plans: list[Plan]) -> None:
    """Prints one row for each plan of a topology."""
    title = f"{plans[0].config} on {topology}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("data x fsdp x tensor", justify="right")
    table.add_column("remat")
    table.add_column("HBM", justify="right")
    table.add_column("roofline", justify="right")
    table.add_column("bound by")
    table.add_column("MFU at most", justify="right")
    table.add_column("received of ideal", justify="right")
    for plan in plans:
        program = plan.programs[0]
        values = ["does not fit", "", "", ""]
        if program.fits:
            mfu = f"{plan.mfu_bound(program):.1%}"
            values = [_seconds(program.roofline), program.bound, mfu, _of_ideal(program)]
        memory = f"{format_bytes(program.peak)} of {format_bytes(plan.chip.hbm)}"
        table.add_row(_mesh(plan), plan.model["remat"], memory, *values)
    _print(table, width=120)


def _print(table: Table, *, width: int) -> None:
    # A terminal says its own width; a file would get 80 columns.
    Console(width=None if os.isatty(1) else width).print(table)


def _bandwidths(plan: Plan) -> str:
    chip = plan.chip
    values = (chip.hbm_bandwidth, chip.ici_bandwidth, chip.dcn_bandwidth)
    return " | ".join(f"{value / 1e9:.4g}" for value in values)


def _mesh(plan: Plan) -> str:
    return " x ".join(str(n) for n in plan.mesh.values())


def _memory(plan: Plan, program: Program) -> str:
    over = "" if program.fits else "OVER: "
    return f"{over}{format_bytes(program.peak)} of {format_bytes(plan.chip.hbm)}"


def _collectives(_: Plan, program: Program) -> str:
    """One line for each kind: bytes and number; kinds with next to no bytes are left out."""
    sizes: dict[str, float] = {}
    counts: dict[str, int] = {}
    for c in program.collectives:
        sizes[c.kind] = sizes.get(c.kind, 0.0) + c.bytes
        counts[c.kind] = counts.get(c.kind, 0) + c.count
    lines = [
        f"{kind} {format_bytes(size)} ({counts[kind]})"
        for kind, size in sizes.items()
        if size > 1e-3 * program.wire_bytes
    ]
    return "\n".join(lines) or "none"


def _of_ideal(program: Program) -> str:
    if not program.ideal_wire_bytes:
        return "nothing to move"
    return f"{program.wire_bytes / program.ideal_wire_bytes:.3f} x"


def _seconds(seconds: float | int) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


_PlanCell = Callable[[Plan], str]
_ProgramCell = Callable[[Plan, Program], str]


def _if_fits(cell: _ProgramCell) -> _ProgramCell:
    """A cell of what is unknown of a program that does not fit."""
    return lambda plan, program: cell(plan, program) if program.fits else "-"


# Each row of the table of plans: its name, and what it shows of a plan.
_PLAN_ROWS: tuple[tuple[str, _PlanCell], ...] = (
    ("device", lambda p: f"{p.chip.kind}, {p.chip.flops / 1e12:.0f} TFLOP/s"),
    ("  GB/s: HBM | ICI | DCN", _bandwidths),
    ("devices", lambda p: f"{p.devices}"),
    ("mesh data x fsdp x tensor", _mesh),
    (
        "remat, attention, dtype",
        lambda p: f"{p.model['remat']}, {p.model['attention']}, {p.model['dtype']}",
    ),
    ("optimizer, first moment", lambda p: f"{p.optimizer['name']}, {p.optimizer['mu_dtype']}"),
    ("parameters", lambda p: f"{p.parameters / 1e9:.3f} B"),
    ("batch, rows a device", lambda p: f"{p.batch}, {p.rows:g}"),
    ("whole on every device, over 4 MiB", lambda p: ", ".join(p.replicated) or "nothing"),
)
_PROGRAM_ROWS: tuple[tuple[str, _ProgramCell], ...] = (
    ("HBM: arguments", lambda _, g: format_bytes(g.arguments)),
    ("HBM: temporaries", lambda _, g: format_bytes(g.temporaries)),
    ("HBM: all at once, of available", _memory),
    ("model FLOPs", lambda _, g: f"{g.model_flops:.4g}"),
    (
        "compiled FLOPs, of model",
        _if_fits(lambda _, g: f"{g.flops:.4g}, {g.flops / g.model_flops:.3f} x"),
    ),
    ("collectives: arrays (number)", _if_fits(_collectives)),
    (
        "received, of the FSDP ideal",
        _if_fits(lambda _, g: f"{format_bytes(g.wire_bytes)}, {_of_ideal(g)}"),
    ),
    (
        "HBM traffic, FLOPs a byte",
        _if_fits(lambda _, g: f"{format_bytes(g.memory_bytes)}, {g.intensity:.0f}"),
    ),
    (
        "time: compute | HBM | ICI | DCN",
        _if_fits(lambda _, g: " | ".join(_seconds(s) for s in g.seconds.values())),
    ),
    ("roofline", _if_fits(lambda _, g: f"{_seconds(g.roofline)} ({g.bound})")),
    ("MFU at most", _if_fits(lambda p, g: f"{p.mfu_bound(g):.1%}")),
    ("compiled in", lambda _, g: f"{g.compile_seconds:.0f} s"),
)
