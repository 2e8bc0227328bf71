"""`univg report`: one page about the stages of a run and its evaluation."""

import argparse

from univg_jax.cli import flags
from univg_jax.cli.parser import Parser
from univg_jax.errors import NotFoundError


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    parser.add_argument("--stages", required=True, metavar="DIR,DIR", help="workdirs, in order")
    parser.add_argument(
        "--evaluation",
        required=True,
        type=flags.path,
        metavar="DIR",
        help="the --out of `univg evaluate`, of which the newest of the last stage is shown, or "
        "one of the folders in it",
    )
    parser.add_argument(
        "--out",
        required=True,
        action=flags.Output,
        folder=True,
        metavar="DIR",
        help="for report.html, report.json and samples.png",
    )
    run_ = "runs/quickstart"
    parser.add_example(
        f"--stages={run_}/stage1,{run_}/stage2,{run_}/stage3 --evaluation={run_}/evaluation "
        f"--out={run_}"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the page, the same numbers as JSON, and a picture of examples."""
    from etils import epath

    from univg_jax import workdir
    from univg_jax.evaluation.report import Evaluation, write_report, write_sheet

    out = epath.Path(args.out)
    stages = [flags.path(stage) for stage in args.stages.split(",")]
    for stage in stages:
        if not workdir.is_run(stage):
            raise NotFoundError(f"no run in --stages={stage}{workdir.nearest_run(stage)}")
    evaluation = Evaluation.of(args.evaluation, last_stage=stages[-1])
    page, numbers, sheet = (out / f for f in ("report.html", "report.json", "samples.png"))
    write_report(out, page, numbers, stages=stages, evaluation=evaluation)
    write_sheet(evaluation, sheet)
    print(f"wrote {page}, {numbers} and {sheet}, which show {evaluation.title}")
    if evaluation.others:
        print(f"not shown: {', '.join(evaluation.others)} (name one with --evaluation)")
