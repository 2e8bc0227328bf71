"""`univg checkpoint`: list, verify and copy the checkpoints of a run."""

import argparse

from univg_jax import checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary, run in (
        ("list", "the steps of a run", list_),
        ("verify", "recompute the checksums of every step", verify),
        ("copy", "copy a sound step and its config into another workdir", copy),
    ):
        action = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
        action.add_argument(
            "dir",
            metavar="DIR",
            help="a workdir" + (" or a step of it" if name == "verify" else ""),
        )
        if name == "copy":
            action.add_argument("--step", type=int, help="default: the newest")
            action.add_argument("--out", required=True, metavar="DIR")
        action.set_defaults(run=run)


def list_(args: argparse.Namespace) -> None:
    steps = checkpoint.list_steps(args.dir)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {args.dir}: it has no steps")
    print("\n".join(map(str, steps)))


def verify(args: argparse.Namespace) -> None:
    reports = checkpoint.verify(args.dir)
    for report in reports:
        print(
            f"step {report.step}: "
            + ("sound" if not report.problems else "; ".join(report.problems))
        )
    if any(report.problems for report in reports):
        raise ValueError(f"{args.dir} has damaged checkpoints")
    if not reports:
        raise FileNotFoundError(f"no checkpoint in {args.dir}: it has no steps")


def copy(args: argparse.Namespace) -> None:
    step = checkpoint.copy(args.dir, args.step, args.out)
    print(f"copied step {step} to {args.out}")
