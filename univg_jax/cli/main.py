"""`univg <command>`: flags to config to library. Errors are one line; exit code 0 means done."""

import argparse
import importlib
import logging as stdlib_logging
import os
import sys
import traceback
from collections.abc import Sequence

from absl import logging

from univg_jax import progress, version
from univg_jax.cli import signals
from univg_jax.cli.parser import Parser
from univg_jax.errors import UserError, quote

OWN_PACKAGES = ("univg_jax", "data_pipelines", "experiments")
COMMANDS = {
    "train": "run a config in a workdir, or continue it",
    "sample": "pictures from a checkpoint, for any task",
    "demo": "a page to try a checkpoint in a browser",
    "evaluate": "measure a checkpoint on a benchmark, beside answers that need no model",
    "export": "write a trained model in a format that other programs read",
    "report": "write one page about the stages of a run and its evaluation",
    "plan": "will it fit, and how fast can it be: compile a config for TPUs that are not here",
    "serve": "a checkpoint behind HTTP: all tasks, OpenAI's API, metrics",
    "config": "all settings of a config; without one, what every setting is",
    "data": "build datasets, look at what a config trains on, embed its prompts",
    "checkpoint": "list, verify and copy checkpoints",
}


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"univg {version.describe()}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 ended by SIGTERM; a training run has saved
    its step then.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
    except UserError as error:  # a flag's value
        print(f"univg {_command(argv)}: error: {error}", file=sys.stderr)
        return error.exit_code
    stdlib_logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.set_verbosity(logging.INFO)
    absl_logger = logging.get_absl_logger()
    (absl_logger.removeFilter if args.verbose else absl_logger.addFilter)(_is_ours_or_warning)
    try:
        with signals.ended_by_signals(waits=getattr(args, "waits", lambda: False)):
            if args.command:
                from univg_jax import tpu

                tpu.silence_if_absent()  # before JAX is first used, by whatever command
            args.run(args)
        return 0
    except KeyboardInterrupt as end:
        reason = str(end) or "interrupted"
        print(f"univg {args.command}: {reason}", file=sys.stderr)
        code = getattr(end, "exit_code", 130)
    except UserError as error:
        reason = str(error)
        if args.verbose:
            traceback.print_exc()
        else:
            prefix = "" if error.is_expected else "error: "
            print(f"univg {args.command}: {prefix}{error}", file=sys.stderr)
        code = error.exit_code
        if error.is_expected:  # all processes end alike, so JAX's ordinary shutdown works
            return code
    except Exception as error:  # a bug of ours, or another process is gone
        _suspect_others()
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        code = 1
    if "jax" in sys.modules:
        from univg_jax import distributed

        distributed.exit_now(code, reason)
    return code


def _suspect_others() -> None:
    """Where an error may come from another process's end, that one is named instead."""
    if "univg_jax.heartbeat" in sys.modules:
        from univg_jax import heartbeat

        if (watching := heartbeat.current()) is not None:
            watching.suspect()


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command line; `run` is the function that they ask for."""
    parser = Parser(prog="univg", description="Train, sample and evaluate UniVG models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="the version and the revision")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="with any command: log more, and show tracebacks of errors",
    )
    parser.epilog = "univg COMMAND --help says more of one."
    commands = parser.add_commands(dest="command")
    given = argv
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    verbose = [a for a in argv if a == "--verbose"]
    argv = [a for a in argv if not a.startswith("--config.") and a not in verbose]
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    asked = _command(argv)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        sub = commands.add_parser(name, help=summary, description=description)
        if name == asked:  # the others' modules need not load
            importlib.import_module(f"univg_jax.cli.{name}").add_arguments(sub)
    args, rest = parser.parse_known_args([*verbose, *argv])
    if rest:
        parser.error(_meant(rest[0], given))
    if overrides and not hasattr(args, "config"):
        parser.error(f"--config.{overrides[0]}: {args.command} takes no config")
    args.overrides = overrides
    return args


def _command(argv: Sequence[str]) -> str | None:
    return next((arg for arg in argv if not arg.startswith("-")), None)


def _meant(rest: str, argv: Sequence[str]) -> str:
    """What is said about an argument that no flag takes: probably a space is too many."""
    before = argv[argv.index(rest) - 1]
    if before.startswith("--config.") and "=" not in before:
        return f"{before} {rest}: write {before}={rest}"
    if "=" in rest and not rest.startswith("-"):
        return f"{rest} stands alone: arguments of a config follow it, --config=CONFIG:{rest}"
    return f"unexpected argument {quote(rest)}"


def _is_ours_or_warning(record: stdlib_logging.LogRecord) -> bool:
    """Keeps what this project logs (where parameters come from, what is fitted), and warnings.

    What is kept gets a line of its own beside the bars of a terminal.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    ours = tuple(os.path.join(root, package) for package in OWN_PACKAGES)
    kept = record.levelno >= stdlib_logging.WARNING or record.pathname.startswith(ours)
    if kept:
        progress.make_room()
    return kept


def configure(args: argparse.Namespace) -> None:
    """JAX as every command that computes wants it; joins the other processes if flags name them."""
    if getattr(args, "coordinator", None) or getattr(args, "distributed", False):
        # `heartbeat` has a line for a process that is missing. C++ has others, if JAX, which reads
        # this when it is imported, does not say otherwise.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    import jax

    from univg_jax import distributed, runtime

    runtime.configure_jax()
    if hasattr(args, "coordinator"):
        # It would take SIGTERM at once; `training.preemption` starts it.
        jax.config.update("jax_enable_preemption_service", False)
        distributed.start(
            distributed=args.distributed,
            coordinator=args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
        )
