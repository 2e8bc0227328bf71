"""`univg report`: a page about the stages of a run and its evaluation, or about any evaluations."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from univg_jax.cli import flags
from univg_jax.cli.parser import Parser
from univg_jax.errors import NotFoundError, UserError

if TYPE_CHECKING:
    from etils import epath

PAGE = "report.html"


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--stages",
        metavar="DIR,DIR",
        help="workdirs, in order: for the page of a run; without them it has evaluations alone",
    )
    parser.add_argument(
        "--evaluation",
        required=True,
        metavar="DIR,DIR",
        help="the --out of `univg evaluate`, one of the folders in it, or the workdir of a run "
        "that was followed; several are shown side by side. With --stages only one, of which the "
        "newest of the last stage is shown",
    )
    parser.add_argument(
        "--out",
        required=True,
        action=flags.Output,
        folder=True,
        metavar="DIR",
        help="for report.html; with --stages also for report.json and samples.png",
    )
    run_ = "runs/quickstart"
    parser.add_example(
        f"--stages={run_}/stage1,{run_}/stage2,{run_}/stage3 --evaluation={run_}/evaluation "
        f"--out={run_}"
    )
    parser.add_example("--evaluation=runs/a/evaluation,runs/b/evaluation --out=runs/comparison")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the page; of a run also the same numbers as JSON, and a picture of examples."""
    from etils import epath

    out = epath.Path(args.out)
    if args.stages:
        left_out = _of_run(args, out)
    else:
        from univg_jax.evaluation.report import write_page

        if not (folders := _paths(args.evaluation)):
            raise UserError("--evaluation is empty: expected folders")
        left_out = write_page(out / PAGE, folders)
        print(f"wrote {out / PAGE}")
    if left_out:
        print(f"not shown: {', '.join(left_out)} (name one with --evaluation)")


def _of_run(args: argparse.Namespace, out: "epath.Path") -> Sequence[str]:
    """Writes the files about a run; returns the names of evaluations that are not shown."""
    from univg_jax import workdir
    from univg_jax.evaluation.report import Evaluation, write_report, write_sheet

    stages = _paths(args.stages)
    for stage in stages:
        if not workdir.is_run(stage):
            raise NotFoundError(f"no run in --stages={stage}{workdir.nearest_run(stage)}")
    evaluation = Evaluation.of(flags.path(args.evaluation), last_stage=stages[-1])
    page, numbers, sheet = (out / f for f in (PAGE, "report.json", "samples.png"))
    write_report(out, page, numbers, stages=stages, evaluation=evaluation)
    write_sheet(evaluation, sheet)
    print(f"wrote {page}, {numbers} and {sheet}, which show {evaluation.title}")
    return evaluation.others


def _paths(text: str) -> list[str]:
    return [flags.path(part) for part in text.split(",") if part]
