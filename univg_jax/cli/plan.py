"""`univg plan`: will it fit, and how fast can it be, on a TPU that is not here."""

import argparse
import dataclasses
import functools
import json
from typing import Any

from etils import epath

from experiments import pods
from univg_jax import fields
from univg_jax.buckets import standard
from univg_jax.cli import flags
from univg_jax.cli.parser import Parser
from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.files import write_whole
from univg_jax.progress import timed
from univg_jax.settings import Config

INCLUDE = ("encoders", "sampling", "evaluation")


def add_arguments(parser: Parser) -> None:
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
        help="v5p:4x4x4, v5e:16x16, v6e:16x16*2 (two slices), ..., or a pod by its name, such as "
        "v5e-256: one column each; may be repeated",
    )
    parser.add_argument(
        "--slices",
        action=flags.Number,
        least=1,
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
        "--cached",
        default="",
        metavar="A,B",
        help="text, latents: the step with encoders beside the one that has these from a cache "
        "(univg data cache), and what that saves; no cache need be there",
    )
    parser.add_argument(
        "--buckets",
        action="store_true",
        help="plan the largest bucket of data.buckets, or of the standard ones of data.resolution "
        "where it has none; a config in buckets is planned so anyway",
    )
    parser.add_argument(
        "--max-batch", action="store_true", help="also search the largest batch that fits"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="rank mesh shapes and remat policies by their roofline"
    )
    parser.add_argument(
        "--traffic",
        action="store_true",
        help="also what moves to and from HBM, by part of the step and by cause",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a third of the compile time; HBM traffic comes out up to half too high, more where "
        "arrays nearly fit on the chip, and memory some percent off",
    )
    parser.add_argument(
        "--goodput",
        metavar="NAME=S,...",
        help="instead: which share of its time the run trains, and the best train.save_every, if "
        "these parts take so many seconds: step, other, blocked, save, restore, compile, restart; "
        "measured=DIR/metrics.jsonl has those of a run but save and restart",
    )
    parser.add_argument(
        "--mtbf",
        action=flags.Number,
        kind=float,
        rule=fields.Rule(above=0),
        default=50_000.0,
        metavar="HOURS",
        help="mean time between failures of one chip (default: 50000, as Llama 3 met on 16,384 "
        "GPUs)",
    )
    parser.add_argument(
        "--json",
        action=flags.Output,
        metavar="FILE",
        help="everything, in bytes, FLOPs and seconds",
    )
    parser.add_example("--config=experiments/stage1_t2i.py:size=xl,res=512 --topology=v5e-256")
    parser.add_example(
        "--config=experiments/stage1_t2i.py:size=xl,res=512 --topology=v5e-256 "
        "--goodput=step=0.3,blocked=2,save=60,restore=60,compile=180,restart=300"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compiles the config for each topology, prints tables, and writes them as JSON if asked."""
    import jax

    from univg_jax import configs, runtime
    from univg_jax.cli import plan_tables
    from univg_jax.planning import search
    from univg_jax.planning.cached import CACHED
    from univg_jax.planning.plan import compile_plan
    from univg_jax.planning.topology import open_topology

    jax.config.update("jax_platforms", "cpu")  # compiling needs no device
    # A program for another machine cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    include = [
        check_name(name, INCLUDE, what="name in --include:")
        for name in filter(None, args.include.split(","))
    ]
    cached = [
        check_name(name, CACHED, what="name in --cached:")
        for name in filter(None, args.cached.split(","))
    ]
    names = [topology_name(name) for name in args.topology]
    names = [name if args.slices == 1 else f"{name}*{args.slices}" for name in names]
    config = configs.load(args.config, args.overrides)
    if args.goodput:
        compiled = ("include", "cached", "buckets", "max_batch", "sweep", "traffic", "quick")
        if given := [name.replace("_", "-") for name in compiled if getattr(args, name)]:
            raise UserError(f"--goodput compiles nothing: leave out --{given[0]}")
        found = [
            goodput(args.goodput, name, mtbf=3600 * args.mtbf, config=config) for name in names
        ]
        plan_tables.print_goodput(found)
        if args.json:
            report = {"config": config.to_dict(), "goodput": found}
            write_whole(args.json, json.dumps(report, indent=1))
        return
    if args.buckets and not config.data.buckets:
        data = dataclasses.replace(config.data, buckets=standard(config.data.resolution))
        config = dataclasses.replace(config, data=data)
    runtime.configure_jax()
    topologies = [open_topology(name) for name in names]
    compile_ = functools.partial(
        compile_plan,
        with_encoders="encoders" in include or bool(cached),
        cached=cached,
        quick=args.quick,
    )
    report: dict[str, Any] = {"config": config.to_dict()}
    if args.sweep:
        ranked = {t.name: search.sweep(config, t, compile_) for t in topologies}
        for name, plans in ranked.items():
            plan_tables.print_sweep(name, plans)
        report["sweep"] = {name: [p.to_json() for p in plans] for name, plans in ranked.items()}
    else:
        programs = ("train", *(name for name in include if name != "encoders"))
        plans = []
        for topology in topologies:
            for parts in [[], cached] if cached else [[]]:
                whose = f" from cached {', '.join(parts)}" if parts else ""
                with timed(f"compiling for {topology.name}{whose}"):
                    plans.append(compile_(config, topology, programs=programs, cached=parts))
        plan_tables.print_plans(plans)
        if args.traffic:
            for plan in plans:
                plan_tables.print_traffic(plan)
        report["plans"] = [p.to_json() for p in plans]
    if args.max_batch:
        report["max_batch"] = {}
        for topology in topologies:
            largest = search.max_batch(config, topology, compile_)
            report["max_batch"][topology.name] = largest
            print(f"{topology.name}: the largest batch that fits is {largest}")
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1))


def goodput(given: str, topology: str, *, mtbf: float, config: Config) -> dict[str, Any]:
    """What `--goodput` says of a topology, as JSON. Raises UserError."""
    from univg_jax.planning.goodput import Times, best_every, expected, measured
    from univg_jax.planning.topology import num_chips
    from univg_jax.writers import read_metrics

    values: dict[str, Any] = dict(flags.pair(text, flag="--goodput") for text in given.split(","))
    if file := values.pop("measured", None):
        if not epath.Path(file).exists():
            raise NotFoundError(f"--goodput: {file} does not exist")
        values = measured(read_metrics(epath.Path(file))) | values
    values = {name: fields.parse_literal(str(value)) for name, value in values.items()}
    times = fields.make(Times, values, "--goodput")
    chips = num_chips(topology)
    pod = dict(chips=chips, mtbf=mtbf)
    best = best_every(times, **pod)
    return {
        "topology": topology,
        "chips": chips,
        "seconds_between_failures": mtbf / chips,
        "times": dataclasses.asdict(times),
        "save_every": best,
        "goodput": expected(times, **pod, every=best),
        "of_config": [
            {"save_every": every, "goodput": expected(times, **pod, every=every)}
            for every in [config.train.save_every]
            if every is not None
        ],
    }


def topology_name(name: str) -> str:
    """`GENERATION:AxB` of a topology, which may be given as a pod's name: `v5e-256`, `v5e-256*2`.

    Raises UserError for a pod that is not in `pods.TOPOLOGIES`.
    """
    shape, *slices = name.split("*", maxsplit=1)
    if ":" not in shape:
        pod = check_name(shape, pods.TOPOLOGIES, what="pod (else GENERATION:AxB, as v5e:16x16)")
        shape = pods.TOPOLOGIES[pod]
    return "*".join([shape, *slices])
