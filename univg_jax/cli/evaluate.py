"""`univg evaluate`: a benchmark's metrics for a checkpoint, beside trivial answers."""

import argparse

from data_pipelines.tasks import TASKS, find_task
from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.evaluation.benchmarks import BENCHMARKS


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--benchmark", required=True, metavar="|".join(BENCHMARKS), help="what it is measured on"
    )
    parser.add_argument(
        "--data",
        type=flags.path,
        metavar="DIR",
        help="the benchmark's data; default: the run's own",
    )
    parser.add_argument(
        "--out",
        action=flags.Output,
        folder=True,
        required=True,
        metavar="DIR",
        help="a folder for this and other evaluations; finished tasks are kept",
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help=f"of {', '.join(TASKS)}, or their full names, such as editing; "
        "default: all that the run was trained on",
    )
    parser.add_argument(
        "--examples",
        action=flags.Number,
        least=1,
        default=64,
        metavar="N",
        help="examples of each task; default: 64",
    )
    parser.add_argument(
        "--split", default="test", metavar="NAME", help="split of the data; default: test"
    )
    parser.add_argument(
        "--batch_size",
        action=flags.Number,
        least=1,
        default=32,
        metavar="N",
        help="images at a time; default: 32",
    )
    flags.add_processes(parser)
    parser.add_example(
        "--checkpoint=runs/quickstart/stage3 --benchmark=emoji_scenes "
        "--out=runs/quickstart/evaluation"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Generates, scores, and prints the primary metric of each task."""
    import jax

    from univg_jax import assembly
    from univg_jax.evaluation.benchmark import open_benchmark
    from univg_jax.evaluation.run import evaluate, open_cases, with_data
    from univg_jax.evaluation.score import table
    from univg_jax.pipeline import Pipeline, load_config

    benchmark = open_benchmark(args.benchmark)
    tasks = [find_task(name).name for name in args.tasks.split(",")] if args.tasks else None
    configure(args)
    options = dict(sampling=flags.sampling(args), pretrained=args.pretrained)
    config = with_data(load_config(args.checkpoint, **options), args.data)
    # The data is looked at before the model is loaded; one case of each task does for that.
    one = dict(num=1, num_train=1, collator=assembly.make_collator(config))
    open_cases(config, benchmark, tasks=tasks, split=args.split, **one)
    pipeline = Pipeline.load(args.checkpoint, ema=not args.raw_params, **options)
    results = evaluate(
        pipeline,
        benchmark,
        out=args.out,
        data_dir=args.data,
        tasks=tasks,
        split=args.split,
        num_examples=args.examples,
        batch_size=args.batch_size,
        seed=args.seed,
        settings=dict(parameters="params" if args.raw_params else "ema"),
    )
    if jax.process_index() == 0:
        print(table(results.tasks))
