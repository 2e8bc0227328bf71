"""`univg <command>`: flags to config to library. Errors are one line, and the exit code is 0 only
when it is done.
"""

import argparse
import importlib
import logging as stdlib_logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import logging

from univg_jax.cli import launch

OWN_PACKAGES = ("univg_jax", "data_pipelines", "experiments")
COMMANDS = {
    "train": "run a config in a workdir, or continue it",
    "sample": "one image from a checkpoint, for any task",
    "evaluate": "a benchmark's metrics for a checkpoint",
    "report": "one page about the stages of a run and its evaluation",
    "plan": "compile a config for any TPU topology, without a TPU: memory, FLOPs, collectives, roofline",
    "data": "build datasets, look at what a config trains on",
    "checkpoint": "list, verify and copy checkpoints",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = _Parser(prog="univg", description="Train, sample and evaluate UniVG models.")
    parser.add_argument(
        "--verbose", action="store_true", help="log more, and show tracebacks of errors"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    argv = [a for a in argv if not a.startswith("--config.")]
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + "."
        )
        if name == asked:  # the others' modules, with JAX behind them, need not load
            importlib.import_module(f"univg_jax.cli.{name}").add_arguments(sub)
    args = parser.parse_args(argv)
    if overrides and not hasattr(args, "config"):
        parser.error(f"--config.{overrides[0]}: {args.command} takes no config")
    args.overrides = overrides

    logging.set_verbosity(logging.INFO)
    (
        logging.get_absl_logger().removeFilter
        if args.verbose
        else logging.get_absl_logger().addFilter
    )(_ours_or_grave)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(f"univg {args.command}: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        from univg_jax.training.preemption import Preempted

        if isinstance(error, Preempted):  # all processes, so they part with a goodbye
            print(f"univg {args.command}: {error}", file=sys.stderr)
            return 128 + signal.SIGTERM
        if _is_for_the_user(error) and not args.verbose:
            print(f"univg {args.command}: error: {error}", file=sys.stderr)
        elif launch.among_others():
            traceback.print_exc()
        else:
            raise
        code = 1
    else:
        return 0
    launch.leave(code)
    return code


def _ours_or_grave(record: Any) -> bool:
    """What this project says (where parameters come from, what is fitted), and warnings of all
    others.
    """
    packages = (
        os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep + p
        for p in OWN_PACKAGES
    )
    return record.levelno >= stdlib_logging.WARNING or record.pathname.startswith(tuple(packages))


def _is_for_the_user(error: Exception) -> bool:
    """Errors that our code raised about its input; the rest are bugs and deserve their traceback."""
    from univg_jax.training.loop import NonFiniteLossError

    if not isinstance(
        error,
        ValueError | FileNotFoundError | FileExistsError | ConnectionError | NonFiniteLossError,
    ):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return raised_in.split(".")[0] in (*OWN_PACKAGES, "univg_config")


def configure_jax(args: argparse.Namespace | None = None) -> None:
    """What every command that computes wants of JAX, before its first use; `args` may have the
    flags of `launch`.
    """
    import jax

    from univg_jax import compilation, tpu

    tpu.silence_if_absent()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    jax.config.update("jax_threefry_partitionable", True)
    compilation.enable_cache()
    if hasattr(args, "coordinator"):
        # The service takes SIGTERM for what `univg_jax.training.preemption` does with it; without, it ends a
        # process as ever.
        jax.config.update("jax_enable_preemption_service", args.command == "train")
        launch.start(args)
