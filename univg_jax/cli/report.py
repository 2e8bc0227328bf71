"""`univg report`: one page about the stages of a run and its evaluation."""

import argparse

from etils import epath

from univg_jax.evaluation.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", required=True, metavar="DIR,DIR", help="the workdirs, in order")
    parser.add_argument("--evaluation", required=True, metavar="DIR", help="what `univg evaluate` wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="for report.html and report.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    out = epath.Path(args.out)
    write_report(
        out,
        out / "report.html",
        out / "report.json",
        stages=args.stages.split(","),
        evaluation=args.evaluation,
    )
    print(f"wrote {out / 'report.html'} and {out / 'report.json'}")
