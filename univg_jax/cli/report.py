"""`univg report`: one page about the stages of a run and its evaluation."""

import argparse
import json

from etils import epath

from univg_jax.evaluation.report import write_report, write_sheet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", required=True, metavar="DIR,DIR", help="the workdirs, in order")
    parser.add_argument(
        "--evaluation", required=True, metavar="DIR", help="what `univg evaluate` wrote"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="for report.html, report.json and samples.png"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    out, evaluation = epath.Path(args.out), epath.Path(args.evaluation)
    write_report(
        out,
        out / "report.html",
        out / "report.json",
        stages=args.stages.split(","),
        evaluation=evaluation,
    )
    write_sheet(
        json.loads((evaluation / "results.json").read_text()), evaluation, out / "samples.png"
    )
    print(f"wrote {out / 'report.html'}, {out / 'report.json'} and {out / 'samples.png'}")
