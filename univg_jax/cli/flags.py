"""Flags that several commands share, and kinds of flags: numbers and paths, checked when read."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from univg_jax import fields, files
from univg_jax.errors import UserError
from univg_jax.settings import MAX_SEED

CONFIG_HELP = "Any key of the config can be set: --config.optim.lr=1e-4"


class Number(argparse.Action):
    """`action=Number, least=1`: a whole number in a range (`fields.Rule`), or a UserError.

    `kind=float` for any number.
    """

    def __init__(
        self, *args: Any, rule: fields.Rule | None = None, kind: type = int, **options: Any
    ) -> None:
        bounds = {name: options.pop(name) for name in ("least", "most") if name in options}
        super().__init__(*args, **options)
        self.rule, self.kind = rule or fields.Rule(**bounds), kind

    def __call__(self, _: object, args: argparse.Namespace, text: str, flag: str) -> None:
        value = fields.read(self.kind, fields.parse_literal(text), flag, self.rule)
        setattr(args, self.dest, value)


class Output(argparse.Action):
    """`action=Output, folder=True`: where a command writes, or a UserError if it cannot."""

    def __init__(
        self, *args: Any, folder: bool = False, suffixes: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.folder, self.suffixes = folder, suffixes

    def __call__(self, _: object, args: argparse.Namespace, text: str, flag: str) -> None:
        path = os.path.expanduser(text)
        files.check_output(path, flag=flag, folder=self.folder, suffixes=self.suffixes)
        setattr(args, self.dest, path)


def path(text: str) -> str:
    """The `type` of a path: the shell leaves ~ alone after an equals sign.

    Raises ArgumentTypeError for the address of what is neither a disk nor a bucket gs://.
    """
    try:
        files.check_address(text, where=text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return os.path.expanduser(text)


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--config`; `main` collects the `--config.key=value` overrides."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="CONFIG[:NAME=VALUE,...]",
        help="a Python file, the name of an experiment such as stage1_t2i, or a config.json",
    )
    parser.epilog = parser.epilog or CONFIG_HELP


def pair(text: str, *, flag: str) -> tuple[str, str]:
    """The name and the value of `NAME=VALUE`. Raises UserError for anything else."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{flag}={text}: expected NAME=VALUE")
    return name, value


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which model `Pipeline.load` loads."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        type=path,
        metavar="DIR",
        help="a workdir, DIR/checkpoints/STEP, or a folder that `univg export` wrote",
    )
    parser.add_argument(
        "--raw_params",
        action="store_true",
        help="the raw parameters instead of their average (EMA)",
    )
    parser.add_argument(
        "--pretrained",
        type=path,
        metavar="DIR",
        help="the folder of pretrained encoders; default: the run's config",
    )


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What `Pipeline.load` takes, and the seed of its pictures."""
    add_model(parser, required=required)
    parser.add_argument(
        "--steps",
        action=Number,
        least=1,
        metavar="N",
        help="steps of the solver; default: the run's config",
    )
    parser.add_argument(
        "--seed",
        action=Number,
        least=0,
        most=MAX_SEED,
        default=0,
        metavar="N",
        help="seed of the noise; default: 0",
    )


def add_address(parser: argparse._ActionsContainer, *, port: int) -> None:
    """Where a command that serves listens."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="default: 127.0.0.1, which only this machine reaches; 0.0.0.0 is all of its addresses",
    )
    parser.add_argument(
        "--port",
        action=Number,
        least=0,
        most=65535,
        default=port,
        metavar="N",
        help=f"default: {port}; 0: a free one",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """What `distributed.start` takes, for every command that can run as several processes."""
    group = parser.add_argument_group(
        "several processes", "The same command on each, on a disk that they share."
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="Cloud TPU, GKE, SLURM or Open MPI say who the others are; also UNIVG_DISTRIBUTED=1",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="otherwise: the host of process 0, and a free port there,",
    )
    group.add_argument(
        "--num_processes", action=Number, least=1, metavar="N", help="the number of processes,"
    )
    group.add_argument(
        "--process_id",
        action=Number,
        least=0,
        metavar="I",
        help="and the number of this one, from 0",
    )


def sampling(args: argparse.Namespace) -> dict[str, int]:
    """The sampling settings that flags replace, as `Pipeline.load` takes them."""
    return {} if args.steps is None else {"steps": args.steps}
