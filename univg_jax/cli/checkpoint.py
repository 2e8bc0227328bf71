"""`univg checkpoint`: list, verify and copy the checkpoints of a run."""

import argparse
import datetime
from typing import TYPE_CHECKING

from univg_jax.cli import flags
from univg_jax.cli.parser import Parser
from univg_jax.errors import UserError, shorten

if TYPE_CHECKING:
    from etils import epath


def add_arguments(parser: Parser) -> None:
    """The command's actions and their flags."""
    actions = parser.add_commands(dest="action")
    for name, summary, run in (
        ("list", "the steps of a run: when saved, how large, whether sound", list_),
        (
            "verify",
            "recompute the checksums of every step and of the encoders, or of an export; exit code "
            "1 for damage",
            verify,
        ),
        ("copy", "copy a sound step, its config and its encoders into another workdir", copy),
    ):
        description = summary[0].upper() + summary[1:] + "."
        action = actions.add_parser(name, help=summary, description=description)
        place = {
            "list": ", or a folder of workdirs",
            "verify": ", a step of it, or an export",
            "copy": "",
        }
        action.add_argument("dir", type=flags.path, metavar="DIR", help=f"a workdir{place[name]}")
        if name == "list":
            action.add_argument(
                "--quick",
                action="store_true",
                help="do not read the files, so do not say if they are sound",
            )
        if name == "copy":
            action.add_argument(
                "--step", action=flags.Number, least=0, metavar="N", help="default: the newest"
            )
            action.add_argument(
                "--out",
                required=True,
                action=flags.Output,
                folder=True,
                metavar="DIR",
                help="the other workdir",
            )
        more = " --out=copies/stage3" if name == "copy" else ""
        action.add_example(f"runs/quickstart{'' if name == 'list' else '/stage3'}{more}")
        action.set_defaults(run=run)


def list_(args: argparse.Namespace) -> None:
    """Prints the steps of a workdir, or of each one in a folder."""
    from etils import epath

    from univg_jax import workdir

    given = epath.Path(args.dir).expanduser()
    below = [] if workdir.is_run(given) else workdir.runs_below(given)
    for run in below:
        print(f"{run}:")
        _print_steps(run, quick=args.quick)
    if not below:
        _print_steps(given, quick=args.quick)


def _print_steps(run: "epath.Path", *, quick: bool) -> None:
    """A line for each step: number, time, size, state."""
    from univg_jax import checkpoint, checksums, workdir
    from univg_jax.files import format_bytes

    root = checkpoint.workdir_of(run) / workdir.CHECKPOINTS
    steps = workdir.steps_in(root)
    states = dict.fromkeys(steps, "not read")
    if not quick:
        reports = checkpoint.verify(root.parent)
        states = {r.step: f"damaged: {shorten(r.problems, 2)}" for r in reports if r.problems}
    print(f"{'step':>9}  {'saved':19}  {'size':>11}  state")
    for step in steps:
        folder = root / str(step)
        files = [folder / name for name in checksums.list_files(folder)]
        stats = [file.stat() for file in files if file.exists()]  # a link may lead nowhere
        saved = "-"
        if stats:
            newest = datetime.datetime.fromtimestamp(max(stat.mtime for stat in stats))
            saved = f"{newest:%Y-%m-%d %H:%M:%S}"
        size = format_bytes(sum(stat.length for stat in stats))
        state = states.get(step, "sound")
        print(f"{step:9}  {saved:19}  {size:>11}  {state}")


def verify(args: argparse.Namespace) -> None:
    """Prints what is wrong with each step and the encoders; raises UserError if anything is.

    So are files that no run wrote, though nothing reads them.
    """
    from univg_jax import checkpoint, encoders, workdir
    from univg_jax.trained import ExportedModel, open_trained

    if isinstance(exported := open_trained(args.dir), ExportedModel):
        print(f"export of step {exported.step}: sound, digest {exported.digest}")
        return
    found = {
        f"step {report.step}": (report.problems, report.additional)
        for report in checkpoint.verify(args.dir)
    }
    run = checkpoint.workdir_of(args.dir)
    damaged = encoders.find_problems(run)
    found["encoders"] = damaged, () if damaged else encoders.find_additional(run)
    foreign = workdir.foreign_names(run / workdir.CHECKPOINTS)
    for name, (problems, additional) in found.items():
        also = f"; additional files, which nothing reads: {shorten(additional)}"
        print(f"{name}: {'; '.join(problems) or 'sound'}{also if additional else ''}")
    if foreign:
        print(f"{workdir.CHECKPOINTS}: also what is no checkpoint: {shorten(foreign)}")
    bad = [name for name, (problems, _) in found.items() if problems]
    if bad:
        raise UserError(f"{args.dir} is damaged: {shorten(bad)}")
    if foreign or any(additional for _, additional in found.values()):
        raise UserError(f"{args.dir} is sound, but has files that no run wrote there")


def copy(args: argparse.Namespace) -> None:
    """Copies one step."""
    from univg_jax import checkpoint, encoders

    if damaged := encoders.find_problems(checkpoint.workdir_of(args.dir)):
        raise UserError(f"nothing copied: {shorten(damaged)}")
    step = checkpoint.copy(args.dir, args.step, args.out)
    print(f"copied step {step} to {args.out}, with its config and its encoders")
