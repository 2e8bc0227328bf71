"""`univg train`: runs a config in a workdir, or continues it."""

import argparse
import signal
import sys

from univg_jax.cli import flags, signals
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.errors import UserError, check_name
from univg_jax.evaluation.benchmarks import BENCHMARKS


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_config(parser)
    parser.add_argument(
        "--workdir",
        action=flags.Output,
        folder=True,
        required=True,
        metavar="DIR",
        help="folder of the run; a run that has begun is continued",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace the updates from step START to step STOP into DIR/profile",
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="set newest checkpoints that are damaged aside, and go on from the newest sound one",
    )
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="take the run from the process that trains it, which ends at its next step",
    )
    parser.add_argument(
        "--allow_config_change",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="KEY,...",
        help="keys or sections of the config, such as tasks.t2i.weight,data.batch_size, in which "
        "the run may go on with other values than it began with",
    )
    flags.add_processes(parser)
    parser.add_example(
        "--config=experiments/emoji.py:stage=1,preset=smoke --workdir=runs/smoke/stage1"
    )
    parser.set_defaults(run=run, waits=_is_saving)


def _is_saving() -> bool:
    """Whether a signal has to wait for steps that are saved first."""
    preemption = sys.modules.get("univg_jax.training.preemption")
    return preemption is not None and preemption.is_saving()


def run(args: argparse.Namespace) -> None:
    """Trains, unless the run has all its steps already."""
    import jax

    from univg_jax import assembly, configs
    from univg_jax.previews import make_preview
    from univg_jax.training import profiling
    from univg_jax.workdir import newest_step

    configure(args)
    config = configs.load(args.config, args.overrides)
    if best := config.train.best_number:
        check_name(best.benchmark, BENCHMARKS, what="benchmark in train.best:")
    profile = None
    if args.profile:
        profile = profiling.parse_steps(args.profile, total=config.train.steps)
        if (newest := newest_step(args.workdir)) >= profile.stop:
            raise UserError(f"--profile={args.profile}: {args.workdir} is at step {newest} already")
    allow = args.allow_config_change
    if not assembly.is_finished(config, args.workdir, allow_config_change=allow):
        run = assembly.make_run(
            config,
            args.workdir,
            fallback=args.fallback,
            takeover=args.takeover,
            allow_config_change=allow,
        )
        preview = make_preview(run) if config.train.sample_examples else None
        try:
            run.train(preview=preview, profile=profile)
        except KeyboardInterrupt as end:  # the second Ctrl-C
            print(f"univg train: {str(end) or 'interrupted'}", file=sys.stderr, flush=True)
            # An ordinary exit would wait for a checkpoint that is being written.
            signals.end_now(getattr(end, "exit_code", 128 + signal.SIGINT), str(end))
    if jax.process_index() == 0:
        print(f"{config.name}: all {config.train.steps} steps are done in {args.workdir}")
