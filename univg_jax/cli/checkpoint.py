"""`univg checkpoint`: list, verify and copy the checkpoints of a run."""

import argparse

from univg_jax import checkpoint
from univg_jax.errors import NotFoundError, UserError
from univg_jax.workdir import list_steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary, run in (
        ("list", "the steps of a run", list_),
        ("verify", "recompute the checksums of every step", verify),
        ("copy", "copy a sound step and its config into another workdir", copy),
    ):
        description = summary.capitalize() + "."
        action = actions.add_parser(name, help=summary, description=description)
        step = " or a step of it" if name == "verify" else ""
        action.add_argument("dir", metavar="DIR", help=f"a workdir{step}")
        if name == "copy":
            action.add_argument("--step", type=int, help="default: the newest")
            action.add_argument("--out", required=True, metavar="DIR")
        action.set_defaults(run=run)


def list_(args: argparse.Namespace) -> None:
    """Prints the steps of a workdir."""
    steps = list_steps(args.dir)
    if not steps:
        raise NotFoundError(f"no checkpoint in {args.dir}: it has no steps")
    print("\n".join(map(str, steps)))


def verify(args: argparse.Namespace) -> None:
    """Prints what is wrong with each step; raises UserError if anything is."""
    reports = checkpoint.verify(args.dir)
    for report in reports:
        found = "; ".join(report.problems) if report.problems else "sound"
        print(f"step {report.step}: {found}")
    if any(report.problems for report in reports):
        raise UserError(f"{args.dir} has damaged checkpoints")


def copy(args: argparse.Namespace) -> None:
    """Copies one step."""
    step = checkpoint.copy(args.dir, args.step, args.out)
    print(f"copied step {step} to {args.out}")
