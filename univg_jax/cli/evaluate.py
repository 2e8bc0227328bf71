"""`univg evaluate`: a benchmark's metrics for a checkpoint, beside an untrained model and trivial
answers.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.tasks import TASKS
from univg_jax import assembly
from univg_jax.batch import Batch
from univg_jax.cli import launch
from univg_jax.cli.main import configure_jax
from univg_jax.errors import check_name
from univg_jax.evaluation import runner

BENCHMARKS = ("emoji_scenes",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a workdir, or DIR/checkpoints/STEP"
    )
    parser.add_argument("--benchmark", required=True, metavar="|".join(BENCHMARKS))
    parser.add_argument(
        "--data", metavar="DIR", help="the benchmark's data; default: the run's own"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="for results.json and images; finished tasks are kept",
    )
    parser.add_argument("--tasks", metavar="A,B", help="default: all that the run was trained on")
    parser.add_argument("--examples", type=int, default=64, help="a task")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, help="of the solver; default: the run's config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--raw_params",
        action="store_true",
        help="the raw parameters instead of their average (EMA)",
    )
    parser.add_argument(
        "--pretrained",
        metavar="DIR",
        help="where pretrained encoders lie; default: the run's config",
    )
    launch.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_name(args.benchmark, BENCHMARKS, what="benchmark")
    configure_jax(args)
    which = "params" if args.raw_params else "ema"
    run = assembly.load_run(
        args.checkpoint, which=which, overrides={"steps": args.steps}, pretrained=args.pretrained
    )
    config = ConfigDict(run.config)
    if args.data:
        config.data.dir = args.data
    assembly.prepare_data(config)
    names = args.tasks.split(",") if args.tasks else list(run.tasks)
    task_of = list(TASKS)

    def generate(run: assembly.Run) -> Any:
        def images(batch: Batch) -> np.ndarray:
            return run.generate(batch, task_of[int(batch.task[0])], seed=args.seed)

        return images

    results = runner.evaluate_config(
        config,
        systems={
            "model": generate(run),
            "untrained": generate(untrained(run, seed=args.seed)),
            "codec": run.reconstruct,
        },
        conditioner=run.generator.conditioner,
        frozen=run.frozen,
        tokenizer=run.tokenizer,
        settings=dict(
            checkpoint=str(args.checkpoint),
            step=run.step,
            parameters=which,
            solver=run.config.sampling.solver,
            steps=run.config.sampling.steps,
            shift=run.config.sampling.shift,
            rescale=run.config.sampling.rescale,
            guidance={name: dict(scales) for name, scales in run.config.sampling.guidance.items()},
            seed=args.seed,
        ),
        out=args.out,
        task_names=names,
        split=args.split,
        num_examples=args.examples,
        batch_size=args.batch_size,
    )
    if jax.process_index() == 0:
        print(table(results))


def untrained(run: assembly.Run, *, seed: int) -> assembly.Run:
    """The same model at its initialization. Its output layer is zero, so one step of any solver is
    the whole flow.
    """
    generator = dataclasses.replace(
        run.generator, sampler=dataclasses.replace(run.generator.sampler, steps=1)
    )
    params = run.initial_params(seed=seed)
    return dataclasses.replace(run, params=params, generator=generator)


def table(results: dict[str, Any]) -> str:
    """The primary metric of each task in columns."""
    lines = [
        f"{'task':6} {'metric':20} {'model':>9} {'untrained':>9} {'trivial':>9} {'codec':>9}  verdict"
    ]
    for name, task in results["tasks"].items():
        values = [
            task["systems"][s][task["metric"]]["value"]
            for s in ("model", "untrained", "trivial", "codec")
        ]
        shown = " ".join(f"{'-' if v is None else f'{v:.4f}':>9}" for v in values)
        lost = [f"the {opponent} one" for opponent, won in task["beats"].items() if not won]
        verdict = "beats both" if not lost else "does not beat " + " nor ".join(lost)
        lines.append(f"{name:6} {task['metric']:20} {shown}  {verdict}")
    return "\n".join(lines)
