"""Flags that several commands share."""

import argparse

CONFIG_HELP = "Any key of the config can be set: --config.optim.lr=1e-4"


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--config`; `main` collects the `--config.key=value` overrides."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="CONFIG[:NAME=VALUE,...]",
        help="a Python file, the name of an experiment such as stage1_t2i, or a config.json",
    )
    parser.epilog = parser.epilog or CONFIG_HELP


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """What `Pipeline.load` takes."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a workdir, or DIR/checkpoints/STEP"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of the solver; default: the run's config"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the noise; default: 0"
    )
    parser.add_argument(
        "--raw_params",
        action="store_true",
        help="the raw parameters instead of their average (EMA)",
    )
    parser.add_argument(
        "--pretrained",
        metavar="DIR",
        help="the folder of pretrained encoders; default: the run's config",
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
    group.add_argument("--num_processes", type=int, metavar="N", help="the number of processes,")
    group.add_argument(
        "--process_id", type=int, metavar="I", help="and the number of this one, from 0"
    )


def sampling(args: argparse.Namespace) -> dict[str, int]:
    """The sampling settings that flags replace, as `Pipeline.load` takes them."""
    return {} if args.steps is None else {"steps": args.steps}
