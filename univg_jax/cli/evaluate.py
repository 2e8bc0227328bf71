"""`univg evaluate`: a benchmark's numbers for a checkpoint, or for a folder of images."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.tasks import TASKS, find_task
from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import BENCHMARKS

if TYPE_CHECKING:
    from univg_jax.evaluation.benchmark import Benchmark
    from univg_jax.evaluation.official import Official
    from univg_jax.evaluation.public import PublicJob
    from univg_jax.evaluation.results import Done
    from univg_jax.evaluation.run import EmbeddedJob
    from univg_jax.evaluation.scorers import Scorers
    from univg_jax.settings import Config

OURS = "ours"  # --score_only without a folder: the images of --generate_only
SIDE_BY_SIDE = 4  # checkpoints of a followed run whose pictures its page shows, the newest


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_checkpoint(parser, required=False)
    parser.add_argument(
        "--follow",
        action="store_true",
        help="evaluate each checkpoint of the workdir DIR once, as training writes them, and end "
        "when it has ended: numbers in DIR/evaluations and TensorBoard; train.best keeps the best",
    )
    parser.add_argument(
        "--benchmark",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"what it is measured on, with settings of its own: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--data",
        type=flags.path,
        metavar="PATH",
        help="the benchmark's official files; of emoji_scenes by default the run's own data",
    )
    parser.add_argument(
        "--out",
        action=flags.Output,
        folder=True,
        required=True,
        metavar="DIR",
        help="a folder for this and other evaluations; what is finished is kept",
    )
    apart = parser.add_mutually_exclusive_group()
    apart.add_argument(
        "--generate_only",
        action="store_true",
        help="make the images, in the benchmark's official layout, and no numbers",
    )
    apart.add_argument(
        "--score_only",
        nargs="?",
        const=OURS,
        type=flags.path,
        metavar="DIR",
        help="score the images that --generate_only made, or those of DIR, whoever made them: then "
        "without --checkpoint",
    )
    parser.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a network or a server that a benchmark needs, such as clip=DIR; a line says which "
        "network, and where its weights are, if it is not given (docs/evaluation.md)",
    )
    parser.add_argument(
        "--without", default="", metavar="A,B", help="scorers to do without, and their numbers"
    )
    parser.add_argument(
        "--excerpt",
        action="store_true",
        help="the official files have fewer items than published, so numbers do not compare",
    )
    parser.add_argument(
        "--limit",
        action=flags.Number,
        least=1,
        metavar="N",
        help="only the first N items of a public benchmark",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="once with each value of guidance, image_guidance, or a key of `sampling` such as "
        "steps; several flags are combined",
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help=f"of emoji_scenes: {', '.join(TASKS)}, or their full names, such as editing; "
        "default: all that the run was trained on",
    )
    parser.add_argument(
        "--examples",
        action=flags.Number,
        least=1,
        default=64,
        metavar="N",
        help="of emoji_scenes: examples of each task; default: 64",
    )
    parser.add_argument(
        "--split",
        default="test",
        metavar="NAME",
        help="of emoji_scenes: split of the data; default: test",
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
    """Generates, scores, and prints the numbers."""
    from univg_jax.evaluation.benchmark import open_benchmark
    from univg_jax.evaluation.official import Official

    benchmark = open_benchmark(args.benchmark)
    is_public = isinstance(benchmark, Official)
    if args.checkpoint is None and (not is_public or args.score_only in (None, OURS)):
        raise UserError("--checkpoint is missing: only --score_only=DIR goes without one")
    if args.follow:
        _check_follow(args)
    from univg_jax.evaluation.sweep import combinations
    from univg_jax.pipeline import Pipeline, load_config
    from univg_jax.together import together

    choices = combinations(args.sweep)
    configure(args)
    # All that can be wrong is found before the model is loaded, and on all processes or on none.
    with together():
        job = _public_job(args, benchmark) if is_public else _embedded_job(args, benchmark)
    if args.checkpoint is None:
        done = job(None)
        _show(done)
        _write_page(args.out, [done])
        return
    if args.follow:
        from univg_jax.evaluation.follow import wait_for_run

        wait_for_run(args.checkpoint, say=_say)
    with together():
        config = load_config(args.checkpoint, **_options(args))
        for choice in choices:
            choice.check(config)
        (_check_public if is_public else _check_embedded)(job, config)
    if args.follow:
        _follow(args, benchmark.name, job)
        return
    pipeline = Pipeline.load(args.checkpoint, ema=not args.raw_params, **_options(args))
    done = []
    for choice in choices:
        done.append(job(choice.applied_to(pipeline)))
        _show(done[-1], title=str(choice))
    _write_page(args.out, done)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_config` takes beside the checkpoint."""
    return dict(sampling=flags.sampling(args), pretrained=args.pretrained)


def _check_follow(args: argparse.Namespace) -> None:
    """Raises UserError for what does not go with --follow."""
    for name in ("sweep", "generate_only", "score_only"):
        if getattr(args, name):
            raise UserError(f"--follow takes no --{name}: it evaluates every checkpoint whole")
    if os.path.basename(os.path.dirname(os.path.abspath(args.checkpoint))) == "checkpoints":
        raise UserError(f"--follow takes a workdir, but {args.checkpoint} is one checkpoint")


# What the numbers of a followed run depend on, beside the checkpoints and the scorers.
COMPARED = (
    "benchmark",
    "data",
    "steps",
    "seed",
    "raw_params",
    "without",
    "excerpt",
    "limit",
    "tasks",
)
COMPARED += ("examples", "split")


def _follow(args: argparse.Namespace, name: str, job: "PublicJob | EmbeddedJob") -> None:
    from univg_jax.evaluation.follow import follow
    from univg_jax.evaluation.scorers import scorer_digests
    from univg_jax.pipeline import Pipeline

    settings = {key: getattr(args, key) for key in COMPARED}
    shown: list[Done] = []

    def show(step: int, done: "Done") -> None:
        _show(done, title=f"step {step}")
        shown.append(done)
        _write_page(args.out, shown[-SIDE_BY_SIDE:], log=args.checkpoint)

    follow(
        args.checkpoint,
        name,
        load=lambda path: Pipeline.load(path, ema=not args.raw_params, **_options(args)),
        job=job,
        settings={**settings, "scorers": scorer_digests(getattr(job, "scorers", {}))},
        say=_say,
        show=show,
    )


def _say(*lines: str) -> None:
    """Prints lines at once, once for all processes."""
    import jax

    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def _show(done: "Done", *, title: str = "") -> None:
    _say(*filter(None, [title, done.text, f"in {done.folder}"]))


def _write_page(out: str, done: Sequence["Done"], *, log: str | None = None) -> None:
    """Writes report.html about what has numbers, and about the run that has the workdir `log`."""
    import jax
    from etils import epath

    from univg_jax.evaluation.report import write_page

    folders = [each.folder for each in done if each.numbers]
    if folders and jax.process_index() == 0:
        page = epath.Path(out) / "report.html"
        write_page(page, [*folders, *filter(None, [log])])
        _say(f"all of it is on the page {page}")


def _public_job(args: argparse.Namespace, benchmark: "Official") -> "PublicJob":
    from univg_jax.evaluation.public import PublicJob
    from univg_jax.evaluation.score_files import check_scorers

    if args.data is None:
        raise UserError(f"--data is missing: the official files of {benchmark.name}")
    without = tuple(filter(None, args.without.split(",")))
    scorers: Scorers = {}
    if not args.generate_only:
        specs = dict(flags.pair(text, flag="--scorer") for text in args.scorer)
        check_scorers(benchmark, specs, without=without)
        if specs:
            from univg_jax.evaluation.scorers.opening import open_scorers

            scorers = open_scorers(specs, answers=os.path.join(args.out, "answers"))
    return PublicJob(
        benchmark=benchmark,
        rows=benchmark.read(args.data, excerpt=args.excerpt),
        scorers=scorers,
        without=without,
        limit=args.limit,
        **_both(args),
    )


def _embedded_job(args: argparse.Namespace, benchmark: "Benchmark") -> "EmbeddedJob":
    from univg_jax.evaluation.run import EmbeddedJob

    for name in ("scorer", "without", "limit", "excerpt"):
        if getattr(args, name):
            raise UserError(f"{benchmark.name} takes no --{name}: it has all that it needs")
    return EmbeddedJob(
        benchmark=benchmark,
        data_dir=args.data,
        tasks=tuple(find_task(name).name for name in args.tasks.split(",")) if args.tasks else None,
        split=args.split,
        num_examples=args.examples,
        **_both(args),
    )


def _both(args: argparse.Namespace) -> dict[str, Any]:
    """What both kinds of jobs take."""
    return dict(
        out=args.out,
        only="generate" if args.generate_only else "score" if args.score_only else None,
        images=None if args.score_only == OURS else args.score_only,
        batch_size=args.batch_size,
        seed=args.seed,
        settings=dict(parameters="params" if args.raw_params else "ema"),
    )


def _check_public(job: "PublicJob", config: "Config") -> None:
    from univg_jax.evaluation.public import check_tasks
    from univg_jax.pipeline import trained_tasks

    check_tasks(job.benchmark, job.rows, trained_tasks(config))


def _check_embedded(job: "EmbeddedJob", config: "Config") -> None:
    from univg_jax import assembly
    from univg_jax.evaluation.run import open_cases, with_data

    config = with_data(config, job.data_dir)
    # One case of each task shows whether the data serves.
    one = dict(num=1, num_train=1, collator=assembly.make_collator(config))
    open_cases(config, job.benchmark, tasks=job.tasks, split=job.split, **one)
