"""The tables that `univg plan` prints."""

import collections
import itertools
import os
import statistics
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from univg_jax.files import format_bytes
from univg_jax.planning import calibration, search
from univg_jax.planning.plan import Plan, Program
from univg_jax.planning.traffic import CAUSES
from univg_jax.tpu import GIB, SOURCE


def print_plans(plans: list[Plan]) -> None:
    """Prints one column for each plan; all have the same config and programs."""
    table = _table(f"{plans[0].config}, a step of one device")
    table.add_column("")
    for plan in plans:
        whose = f"\ncached {', '.join(plan.cached)}" if plan.cached else ""
        table.add_column(plan.topology + whose, justify="right")
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
    for before, after in itertools.pairwise(plans):
        if after.cached:
            print(_savings(before, after))
    print(f"Peaks: {SOURCE}.")
    reached = calibration.REACHED
    print(
        f"Expect: the roofline over {statistics.median(reached):.0%}, the median of what "
        f"{calibration.SOURCE} reach of theirs: {min(reached):.0%} to {max(reached):.0%}."
    )


def print_traffic(plan: Plan) -> None:
    """Prints what each program of a plan moves to and from HBM: a row for each part."""
    for program in plan.programs:
        if not program.fits:
            continue
        table = _table(f"{plan.config} on {plan.topology}, {program.name}: HBM traffic")
        table.add_column("")
        sizes: dict[str, dict[str, float]] = collections.defaultdict(dict)
        for one in program.traffic:
            sizes[one.part][one.cause] = one.bytes
        rows = dict(sorted(sizes.items(), key=lambda item: -sum(item[1].values())))
        whole = {c: sum(row.get(c, 0.0) for row in rows.values()) for c in CAUSES}
        for name in ("GiB", "time", "share", *sorted(CAUSES, key=lambda c: -whole[c])):
            table.add_column(name, justify="right")
        for part, row in [*rows.items(), ("all", whole)]:
            size = sum(row.values())
            if part == "all":
                table.add_section()
            elif size < 1e-5 * program.memory_bytes:  # scalars
                continue
            table.add_row(
                part,
                f"{size / GIB:.3f}",
                _seconds(size / plan.chip.hbm_bandwidth),
                f"{size / program.memory_bytes:.1%}",
                *(f"{row.get(c.header, 0.0) / GIB:.3f}" for c in table.columns[4:]),
            )
        _print(table, width=120)


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


def print_goodput(found: list[dict[str, Any]]) -> None:
    """Prints a row for each topology of `plan.goodput`."""
    table = _table("the share of its time in which a run trains")
    names = ("", "chips", "a failure every", "best save_every", "goodput", "lost by a failure")
    own = [f"goodput, every {one['save_every']:,} steps" for one in found[0]["of_config"]]
    for name in (*names, *own):
        table.add_column(name, justify="right" if name else "left")
    for row in found:
        times, every = row["times"], row["save_every"]
        steps = every * (times["step"] + times["other"])
        recovery = sum(times[name] for name in ("restart", "restore", "compile"))
        table.add_row(
            row["topology"],
            f"{row['chips']:,}",
            f"{row['seconds_between_failures'] / 3600:,.1f} h",
            f"{every:,}",
            f"{row['goodput']:.2%}",
            f"{(steps / 2 + times['save'] + recovery) / 60:,.0f} min",
            *(f"{one['goodput']:.2%}" for one in row["of_config"]),
        )
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
        "pictures": _pictures(plan),
        "whole on every device, over 4 MiB": ", ".join(plan.replicated) or "nothing",
    }


def _program_cells(plan: Plan, program: Program) -> dict[str, str]:
    """The figures of one program, by the name of its row."""
    over = "" if program.fits else "OVER: "
    received = f"{format_bytes(program.wire_bytes)}, {_of_ideal(program)}"
    counted = {
        "compiled FLOPs, of model": f"{program.flops:.4g}, "
        f"{program.flops / program.model_flops:.3f} x",
        "matrix units filled": f"{program.flops / program.unit_flops:.1%}",
        "collectives: arrays (number)": _collectives(program),
        "received, of the FSDP ideal": received,
        "HBM traffic, FLOPs a byte": f"{format_bytes(program.memory_bytes)}, "
        f"{program.intensity:.0f}",
        "time: compute | HBM | ICI | DCN": " | ".join(map(_seconds, program.seconds.values())),
        "roofline": f"{_seconds(program.roofline)} ({program.bound})",
        "MFU at most": f"{plan.mfu_bound(program):.1%}",
        "expect, from to": _expected(program),
        "MFU to expect": f"{plan.expected_mfu(program):.1%}",
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


def _savings(before: Plan, after: Plan) -> str:
    """What a cache saves in a training step: `after` has it."""
    old, new = before.programs[0], after.programs[0]
    held = f"{format_bytes(old.peak)} of HBM to {format_bytes(new.peak)}"
    counted = ""
    if old.fits and new.fits:
        less = 1 - new.flops / old.flops
        counted = f"{old.flops:.4g} FLOPs to {new.flops:.4g} ({less:.1%} less), "
        counted += f"{_seconds(old.roofline)} to {_seconds(new.roofline)} at least, "
    parts = " and ".join(after.cached)
    return f"{after.topology}: cached {parts} take a step from {counted}{held}"


def _pictures(plan: Plan) -> str:
    height, width = plan.picture
    others = f", the largest of {plan.buckets} buckets" if plan.buckets > 1 else ""
    return f"{height}x{width} px{others}"


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


def _expected(program: Program) -> str:
    time = program.expected
    return f"{_seconds(time.seconds)}, {_seconds(time.least)} to {_seconds(time.most)}"


def _seconds(seconds: float | int) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
