"""`univg plan`: will it fit, and how fast can it be, on a TPU that is not here."""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipelines.tasks import TASKS
from univg_jax import assembly, tpu
from univg_jax.cli.config import load_config
from univg_jax.cli.main import configure_jax
from univg_jax.encoders import abstract as abstract_encoders
from univg_jax.errors import check_name
from univg_jax.models.mmdit import REMAT, make_mmdit
from univg_jax.planning.plan import Plan, Program, Topology, compile_plan, open_topology
from univg_jax.sampling import Generator

GIB = 2**30
EXTRAS = ("encoders", "sampling", "evaluation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:NAME=VALUE,...]", help="an experiment"
    )
    parser.add_argument(
        "--topology",
        required=True,
        action="extend",
        type=lambda names: names.split(","),
        metavar="T[,T...]",
        help="v5p:4x4x4, v5e:16x16, v6e:16x16*2 (two slices), ...: one column each; may be repeated",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="of each topology; the same as *N behind it",
    )
    parser.add_argument(
        "--include",
        default="",
        metavar="A,B",
        help="encoders (as part of the train step, as a run has them without data.text_cache), sampling, evaluation",
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
    parser.epilog = "Any key of the config can be set: --config.data.batch_size=256 --config.model.overrides.remat=full"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")  # compiling needs no device
    # what is compiled for another machine cannot be read back
    jax.config.update("jax_enable_compilation_cache", False)
    include = [
        check_name(name, EXTRAS, what="part") for name in filter(None, args.include.split(","))
    ]
    if args.slices < 1:
        raise ValueError(f"--slices={args.slices}: expected at least 1")
    names = [name if args.slices == 1 else f"{name}*{args.slices}" for name in args.topology]
    config = load_config(args.config, args.overrides)
    configure_jax()
    topologies = [open_topology(name) for name in names]
    programs = ("train", *(name for name in include if name != "encoders"))
    report: dict[str, Any] = {"config": config.to_dict()}

    def compile_(
        topology: Topology, *overrides: str, programs: tuple[str, ...] = ("train",)
    ) -> Plan:
        varied = load_config(args.config, [*args.overrides, *overrides])
        return compile_for(
            varied, topology, programs=programs, encoders="encoders" in include, quick=args.quick
        )

    if args.sweep:
        ranked = {t.name: sweep(config, t, compile_) for t in topologies}
        for name, plans in ranked.items():
            print_sweep(name, plans)
        report["sweep"] = {name: [to_json(p) for p in plans] for name, plans in ranked.items()}
    else:
        bar = tqdm(topologies, desc="compile", unit="topology", leave=False)
        plans = [compile_(topology, programs=programs) for topology in bar]
        print_plans(plans)
        report["plans"] = [to_json(p) for p in plans]
    if args.max_batch:
        report["max_batch"] = {}
        for topology in topologies:
            largest = max_batch(config, topology, compile_)
            report["max_batch"][topology.name] = largest
            print(f"{topology.name}: the largest batch that fits is {largest}")
    if args.json:
        out = epath.Path(args.json)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1))


def compile_for(
    config: ConfigDict,
    topology: Topology,
    *,
    programs: tuple[str, ...] = ("train",),
    encoders: bool = False,
    quick: bool = False,
) -> Plan:
    """`compile_plan` of the parts that a run of `config` has."""
    conditioner, frozen = abstract_encoders(config.conditioning)
    model = assembly.make_model(config, conditioner)
    passes = max(len(assembly.guidance(config, task)) for task in config.tasks)
    return compile_plan(
        config,
        topology,
        conditioner=conditioner,
        frozen=frozen,
        generator=Generator(model=model, conditioner=conditioner, sampler=assembly.sampler(config)),
        passes=passes,
        task_names=list(TASKS),
        programs=programs,
        encoders=encoders,
        quick=quick,
    )


def max_batch(config: ConfigDict, topology: Topology, compile_: Callable[..., Plan]) -> int:
    """The largest global batch that fits: where the line through two that do meets the memory, else
    by halves.
    """
    first = compile_(topology)
    unit = first.mesh["data"] * first.mesh["fsdp"] * config.optim.accumulate
    low, high, guess, by_line = 0, None, config.data.batch_size // unit, False
    programs: dict[int, Program] = {guess: first.programs[0]}
    bar = tqdm(desc=f"largest batch on {topology.name}", unit="plan", initial=1, leave=False)
    while high is None or high - low > 1:
        bar.set_postfix_str(f"{guess * unit}?")
        if guess not in programs:
            programs[guess] = compile_(topology, f"data.batch_size={guess * unit}").programs[0]
            bar.update()
        low, high = (guess, high) if programs[guess].fits else (low, guess)
        fitting = [
            (rows, program.peak) for rows, program in sorted(programs.items()) if program.fits
        ][-2:]
        # not twice in a row: memory is only nearly a line
        by_line = len(fitting) == 2 and not (by_line and high)
        if by_line:
            (a, peak), (b, larger) = fitting
            guess = int(a + (topology.chip.hbm - peak) * (b - a) / max(larger - peak, 1))
        else:
            guess = 2 * low if high is None else (low + high) // 2
        # by an eighth at least: near the limit the compiler saves memory, and the line would creep
        if high is None:
            guess = min(max(guess, low + max(low // 8, 1)), 4 * low)
        else:
            guess = min(max(guess, low + 1), max(high - 1, 1))
    bar.close()
    return low * unit


def sweep(config: ConfigDict, topology: Topology, compile_: Callable[..., Plan]) -> list[Plan]:
    """Mesh shapes x remat policies, the fastest by roofline first, then what does not fit.

    A policy that recomputes more may still be faster, where memory's traffic is the bound; only
    `offload`, whose transfers no roofline here knows, is left to where nothing else fits.
    """
    backbone = make_mmdit(config.model.size, **config.model.overrides)
    count = len(topology.devices) // topology.slices
    meshes = []
    for tensor in (1, 2):
        largest = math.gcd(count // tensor, backbone.hidden_dim)
        if count % tensor == 0 and backbone.num_heads % tensor == 0:
            meshes += [(largest >> i, tensor) for i in range(3) if largest % (1 << i) == 0]
    meshes = [m for m in meshes if config.data.batch_size % (count * topology.slices // m[1]) == 0]
    if not meshes:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} divides over no mesh of {topology.name}"
        )
    plans = []
    for fsdp, tensor in tqdm(meshes, desc=f"sweep {topology.name}", unit="mesh", leave=False):
        mesh = ("mesh.data=-1", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}")
        policies = tqdm(
            [name for name in REMAT if name != "offload"], desc="remat", unit="plan", leave=False
        )
        tried = [compile_(topology, *mesh, f"model.overrides.remat={name}") for name in policies]
        if not any(plan.fits for plan in tried):
            tried.append(compile_(topology, *mesh, "model.overrides.remat=offload"))
        plans += tried
    return sorted(plans, key=lambda p: (not p.fits, p.programs[0].roofline))


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan with what follows from it."""
    result = dataclasses.asdict(plan) | {"fits": plan.fits, "rows": plan.rows}
    for row, program in zip(result["programs"], plan.programs, strict=True):
        row |= {
            "fits": program.fits,
            "wire_bytes": program.wire_bytes,
            "roofline_seconds": program.roofline,
            "bound": program.bound,
            "intensity": program.intensity,
            "mfu_bound": plan.mfu_bound(program),
        }
        for shown, collective in zip(row["collectives"], program.collectives, strict=True):
            shown["wire_bytes"] = collective.wire_bytes
    return result


def print_plans(plans: list[Plan]) -> None:
    """One column a topology."""
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{plans[0].config}, a step of one device", title_justify="left"
    )
    table.add_column("")
    for plan in plans:
        table.add_column(plan.topology, justify="right")

    def row(name: str, cell: Callable[[Plan], str]) -> None:
        table.add_row(name, *map(cell, plans))

    row("device", lambda p: f"{p.chip.kind}, {p.chip.flops / 1e12:.0f} TFLOP/s")
    row(
        "  GB/s: HBM | ICI | DCN",
        lambda p: " | ".join(
            f"{b / 1e9:.4g}"
            for b in (p.chip.hbm_bandwidth, p.chip.ici_bandwidth, p.chip.dcn_bandwidth)
        ),
    )
    row("devices", lambda p: f"{p.devices}")
    row("mesh data x fsdp x tensor", lambda p: " x ".join(str(n) for n in p.mesh.values()))
    row(
        "remat, attention, dtype",
        lambda p: f"{p.model['remat']}, {p.model['attention']}, {p.model['dtype']}",
    )
    row("optimizer, first moment", lambda p: f"{p.optimizer['name']}, {p.optimizer['mu_dtype']}")
    row("parameters", lambda p: f"{p.parameters / 1e9:.3f} B")
    row("batch, rows a device", lambda p: f"{p.batch}, {p.rows:g}")
    row("whole on every device, over 4 MiB", lambda p: ", ".join(p.replicated) or "nothing")
    for i, program in enumerate(plans[0].programs):
        table.add_section()
        encoders = "with" if program.name != "train" or plans[0].encoders else "without"
        table.add_row(f"[bold]{program.name}[/bold], {encoders} encoders", *[""] * len(plans))
        _program_rows(row, i)
    console = Console(width=None if os.isatty(1) else 60 + 24 * len(plans))
    console.print(table)
    for plan in plans:
        for program in plan.programs:
            if not program.fits:
                print(advice(plan, program))
    print(f"Peaks: {tpu.SOURCE}.")


def _program_rows(row: Callable[..., None], i: int) -> None:
    def cell(show: Callable[[Plan, Program], str]) -> Callable[[Plan], str]:
        return lambda plan: show(plan, plan.programs[i]) if plan.programs[i].fits else "-"

    def collectives(plan: Plan, program: Program) -> str:
        kinds: dict[str, list] = {}  # bytes and number
        for c in program.collectives:
            total = kinds.setdefault(c.kind, [0.0, 0])
            total[0] += c.bytes
            total[1] += c.count
        large = [
            (kind, *total) for kind, total in kinds.items() if total[0] > 1e-3 * program.wire_bytes
        ]
        return (
            "\n".join(f"{kind} {_bytes(size)} ({count})" for kind, size, count in large) or "none"
        )

    row("  HBM: arguments", lambda p: _bytes(p.programs[i].arguments))
    row("  HBM: temporaries", lambda p: _bytes(p.programs[i].temporaries))
    row(
        "  HBM: all at once, of available",
        lambda p: (
            f"{'' if p.programs[i].fits else 'OVER: '}{_bytes(p.programs[i].peak)} of {_bytes(p.chip.hbm)}"
        ),
    )
    row("  model FLOPs", lambda p: f"{p.programs[i].model_flops:.4g}")
    row(
        "  compiled FLOPs, of model",
        cell(lambda p, g: f"{g.flops:.4g}, {g.flops / g.model_flops:.3f} x"),
    )
    row("  collectives: arrays (number)", cell(collectives))
    row(
        "  received, of the FSDP ideal",
        cell(lambda p, g: f"{_bytes(g.wire_bytes)}, {_of_ideal(g)}"),
    )
    row(
        "  HBM traffic, FLOPs a byte",
        cell(lambda p, g: f"{_bytes(g.memory_bytes)}, {g.intensity:.0f}"),
    )
    row(
        "  time: " + " | ".join(("compute", "HBM", "ICI", "DCN")),
        cell(lambda p, g: " | ".join(_seconds(s) for s in g.seconds.values())),
    )
    row("  roofline", cell(lambda p, g: f"{_seconds(g.roofline)} ({g.bound})"))
    row("  MFU at most", cell(lambda p, g: f"{p.mfu_bound(g):.1%}"))
    row("  compiled in", lambda p: f"{p.programs[i].compile_seconds:.0f} s")


def print_sweep(topology: str, plans: list[Plan]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{plans[0].config} on {topology}", title_justify="left"
    )
    for name in (
        "data x fsdp x tensor",
        "remat",
        "HBM",
        "roofline",
        "bound by",
        "MFU at most",
        "received of ideal",
    ):
        table.add_column(name, justify="left" if name in ("remat", "bound by") else "right")
    for plan in plans:
        g = plan.programs[0]
        values = ["does not fit", "", "", ""]
        if g.fits:
            values = [_seconds(g.roofline), g.bound, f"{plan.mfu_bound(g):.1%}", _of_ideal(g)]
        mesh = " x ".join(str(n) for n in plan.mesh.values())
        table.add_row(
            mesh, plan.model["remat"], f"{_bytes(g.peak)} of {_bytes(plan.chip.hbm)}", *values
        )
    Console(width=None if os.isatty(1) else 120).print(table)


def advice(plan: Plan, program: Program) -> str:
    """By how much it is over, and what would help, the cheapest first."""
    knobs = []
    if program.name == "train":
        stronger = [
            name
            for name in list(REMAT)[list(REMAT).index(plan.model["remat"]) + 1 :]
            if name != "offload"
        ]
        if stronger:
            knobs.append(f"--config.model.overrides.remat={stronger[0]}")
        if plan.rows > 1:
            knobs.append("--config.optim.accumulate=2 (or twice what it is)")
        if plan.mesh["data"] > 1:
            knobs.append("a larger --config.mesh.fsdp")
        if plan.optimizer["mu_dtype"] != "bfloat16":
            knobs.append("--config.optim.mu_dtype=bfloat16")
        if plan.optimizer["name"] != "adafactor":
            knobs.append("--config.optim.name=adafactor")
    else:
        knobs.append("fewer rows" if program.name == "evaluation" else "more devices")
    over = f"{plan.topology}: {program.name} is over the HBM by {_bytes(program.over)}"
    return f"{over}. What helps: {'; '.join(knobs)}."


def _of_ideal(program: Program) -> str:
    return (
        f"{program.wire_bytes / program.ideal_wire_bytes:.3f} x"
        if program.ideal_wire_bytes
        else "nothing to move"
    )


def _bytes(count: float | int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def _seconds(seconds: float | int) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
