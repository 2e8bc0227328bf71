"""`univg plan`: will it fit, and how fast can it be, on a TPU that is not here."""

import argparse
import collections
import functools
import json
import os
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from univg_jax import configs, runtime, tpu
from univg_jax.cli import flags
from univg_jax.errors import UserError, check_name
from univg_jax.files import write_whole
from univg_jax.planning import search
from univg_jax.planning.plan import Plan, Program, compile_plan
from univg_jax.planning.search import format_bytes
from univg_jax.planning.topology import open_topology
from univg_jax.progress import Bar

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
        bar = Bar(topologies, desc="compile", unit="topology", leave=False)
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
    table = _table(f"{plans[0].config}, a step of one device")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.topology, justify="right")
    _add_rows(table, [_plan_cells(plan) for plan in plans])
    for i, program in enumerate(plans[0].programs):
        table.add_section()
        encoders = "with" if program.name != "train" or plans[0].encoders else "without"
        table.add_row(f"[bold]{program.name}[/bold], {encoders} encoders", *[""] * len(plans))
        _add_rows(table, [_program_cells(plan, plan.programs[i]) for plan in plans])
    _print(table, width=60 + 24 * len(plans))
    for plan in plans:
        for program in plan.programs:
            if not program.fits:
                print(search.advice(plan, program))
    print(f"Peaks: {tpu.SOURCE}.")


def print_sweep(topology: str, plans: list[Plan]) -> None:
    """Prints one row for each plan of a topology."""
    table = _table(f"{plans[0].config} on {topology}")
    for name in ("data x fsdp x tensor", "remat", "HBM", "roofline", "bound by", "MFU at most"):
        table.add_column(name, justify="left" if name in ("remat", "bound by") else "right")
    table.add_column("received of ideal", justify="right")
    for plan in plans:
        program = plan.programs[0]
        values = ["does not fit", "", "", ""]
        if program.fits:
            mfu = f"{plan.mfu_bound(program):.1%}"
            values = [_seconds(program.roofline), program.bound, mfu, _of_ideal(program)]
        table.add_row(_mesh(plan), plan.model["remat"], _memory(plan, program), *values)
    _print(table, width=120)


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")


def _add_rows(table: Table, columns: list[dict[str, str]]) -> None:
    """Adds one row for each name in the columns' cells, which are the same."""
    for name in columns[0]:
        table.add_row(name, *(cells[name] for cells in columns))


def _print(table: Table, *, width: int) -> None:
    # A terminal says its own width; a file would get 80 columns.
    Console(width=None if os.isatty(1) else width).print(table)


def _plan_cells(plan: Plan) -> dict[str, str]:
    """What is the same for all programs of a plan, by the name of its row."""
    chip, model = plan.chip, plan.model
    bandwidths = (chip.hbm_bandwidth, chip.ici_bandwidth, chip.dcn_bandwidth)
    return {
        "device": f"{chip.kind}, {chip.flops / 1e12:.0f} TFLOP/s",
        "  GB/s: HBM | ICI | DCN": " | ".join(f"{value / 1e9:.4g}" for value in bandwidths),
        "devices": f"{plan.devices}",
        "mesh data x fsdp x tensor": _mesh(plan),
        "remat, attention, dtype": f"{model['remat']}, {model['attention']}, {model['dtype']}",
        "optimizer, first moment": f"{plan.optimizer['name']}, {plan.optimizer['mu_dtype']}",
        "parameters": f"{plan.parameters / 1e9:.3f} B",
        "batch, rows a device": f"{plan.batch}, {plan.rows:g}",
        "whole on every device, over 4 MiB": ", ".join(plan.replicated) or "nothing",
    }


def _program_cells(plan: Plan, program: Program) -> dict[str, str]:
    """The figures of one program, by the name of its row."""
    over = "" if program.fits else "OVER: "
    received = f"{format_bytes(program.wire_bytes)}, {_of_ideal(program)}"
    counted = {
        "compiled FLOPs, of model": f"{program.flops:.4g}, "
        f"{program.flops / program.model_flops:.3f} x",
        "collectives: arrays (number)": _collectives(program),
        "received, of the FSDP ideal": received,
        "HBM traffic, FLOPs a byte": f"{format_bytes(program.memory_bytes)}, "
        f"{program.intensity:.0f}",
        "time: compute | HBM | ICI | DCN": " | ".join(map(_seconds, program.seconds.values())),
        "roofline": f"{_seconds(program.roofline)} ({program.bound})",
        "MFU at most": f"{plan.mfu_bound(program):.1%}",
    }
    cells = {
        "HBM: arguments": format_bytes(program.arguments),
        "HBM: temporaries": format_bytes(program.temporaries),
        "HBM: all at once, of available": f"{over}{_memory(plan, program)}",
        "model FLOPs": f"{program.model_flops:.4g}",
        # Nothing was counted of a program that does not fit.
        **(counted if program.fits else dict.fromkeys(counted, "-")),
        "compiled in": f"{program.compile_seconds:.0f} s",
    }
    return {f"  {name}": cell for name, cell in cells.items()}


def _mesh(plan: Plan) -> str:
    return " x ".join(str(n) for n in plan.mesh.values())


def _memory(plan: Plan, program: Program) -> str:
    return f"{format_bytes(program.peak)} of {format_bytes(plan.chip.hbm)}"


def _collectives(program: Program) -> str:
    """One line for each kind: bytes and number; kinds with next to no bytes are left out."""
    sizes, counts = collections.defaultdict(float), collections.Counter()
    for c in program.collectives:
        sizes[c.kind] += c.bytes
        counts[c.kind] += c.count
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
