"""`univg <command>`: flags to config to library. Errors are one line; exit code 0 means done."""

import argparse
import importlib
import logging as stdlib_logging
import os
import sys
import traceback
from collections.abc import Sequence

from absl import logging

from univg_jax.errors import UserError

OWN_PACKAGES = ("univg_jax", "data_pipelines", "experiments")
COMMANDS = {
    "train": "run a config in a workdir, or continue it",
    "sample": "one image from a checkpoint, for any task",
    "evaluate": "a benchmark's metrics for a checkpoint",
    "report": "one page about the stages of a run and its evaluation",
    "plan": "compile a config for any TPU topology, without a TPU: memory, FLOPs, roofline",
    "config": "all settings of a config; without one, what every setting is",
    "data": "build datasets, look at what a config trains on",
    "checkpoint": "list, verify and copy checkpoints",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 ended by SIGTERM with its step saved.
    """
    args = parse(list(sys.argv[1:] if argv is None else argv))
    logging.set_verbosity(logging.INFO)
    absl_logger = logging.get_absl_logger()
    (absl_logger.removeFilter if args.verbose else absl_logger.addFilter)(_is_ours_or_warning)
    try:
        args.run(args)
        return 0
    except KeyboardInterrupt:
        print(f"univg {args.command}: interrupted", file=sys.stderr)
        code = 130
    except UserError as error:
        if args.verbose:
            traceback.print_exc()
        else:
            prefix = "" if error.is_expected else "error: "
            print(f"univg {args.command}: {prefix}{error}", file=sys.stderr)
        code = error.exit_code
        if error.is_expected:  # all processes end alike, so JAX's ordinary shutdown works
            return code
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        need = "pip install 'univg_jax[gcs]'"
        print(f"univg {args.command}: error: gs:// paths need gcsfs: {need}", file=sys.stderr)
        code = 1
    except Exception:  # a bug of ours
        traceback.print_exc()
        code = 1
    if "jax" in sys.modules:
        from univg_jax import distributed

        distributed.exit_now(code)
    return code


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line; `run` is the function that they ask for."""
    parser = _Parser(prog="univg", description="Train, sample and evaluate UniVG models.")
    parser.add_argument(
        "--verbose", action="store_true", help="log more, and show tracebacks of errors"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    argv = [a for a in argv if not a.startswith("--config.")]
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        sub = commands.add_parser(name, help=summary, description=description)
        if name == asked:  # the others' modules, with JAX behind them, need not load
            importlib.import_module(f"univg_jax.cli.{name}").add_arguments(sub)
    args = parser.parse_args(argv)
    if overrides and not hasattr(args, "config"):
        parser.error(f"--config.{overrides[0]}: {args.command} takes no config")
    args.overrides = overrides
    return args


def _is_ours_or_warning(record: stdlib_logging.LogRecord) -> bool:
    """Keeps what this project logs (where parameters come from, what is fitted), and warnings."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    ours = tuple(os.path.join(root, package) for package in OWN_PACKAGES)
    return record.levelno >= stdlib_logging.WARNING or record.pathname.startswith(ours)


def configure(args: argparse.Namespace) -> None:
    """JAX as every command that computes wants it; joins the other processes if flags name them."""
    import jax

    from univg_jax import distributed, runtime

    runtime.configure_jax()
    if hasattr(args, "coordinator"):
        # The preemption service takes SIGTERM for `training.preemption`. Without it, SIGTERM ends
        # a process as usual.
        jax.config.update("jax_enable_preemption_service", args.command == "train")
        distributed.start(
            distributed=args.distributed,
            coordinator=args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
        )
