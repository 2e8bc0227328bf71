"""`univg sample`: one image from a checkpoint, for any task."""

import argparse

from data_pipelines.tasks import INPUTS, TASKS
from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.errors import UserError, check_name
from univg_jax.images import write_png
from univg_jax.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    flags.add_checkpoint(parser)
    parser.add_argument("--task", required=True, metavar="|".join(TASKS))
    parser.add_argument("--prompt", default="", help=_prompt_help())
    for name, shows in INPUTS.items():
        takers = [task.name for task in TASKS.values() if name in task.inputs]
        parser.add_argument(f"--{name}", metavar="FILE", help=f"{', '.join(takers)}: {shows}")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture to write")
    flags.add_processes(parser)
    parser.set_defaults(run=run)


def _prompt_help() -> str:
    """What each task's prompt says, the tasks with the same together."""
    says: dict[str, list[str]] = {}
    for task in TASKS.values():
        if task.prompt != "none":
            says.setdefault(task.prompt_says, []).append(task.name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in says.items())


def run(args: argparse.Namespace) -> None:
    """Checks the inputs, loads the model, and writes the picture."""
    import jax
    import numpy as np

    from univg_jax.pipeline import Pipeline, read_picture

    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out={args.out} should end in .png")
    pictures = {name: read_picture(getattr(args, name), f"--{name}") for name in INPUTS}
    # The inputs are checked before the model is loaded; any size does for that.
    task = TASKS[check_name(args.task, TASKS, what="task")]
    task.from_inputs(prompt=args.prompt, **pictures, resolution=64)
    configure(args)
    pipeline = Pipeline.load(
        args.checkpoint,
        ema=not args.raw_params,
        sampling=flags.sampling(args),
        pretrained=args.pretrained,
    )
    pipeline.check_task(args.task)
    with Bar(
        total=pipeline.config.sampling.steps,
        desc=f"sample {args.task}",
        unit="step",
        disable=jax.process_index() != 0,
    ) as bar:
        image = pipeline.run(
            args.task,
            prompt=args.prompt,
            **pictures,
            seed=args.seed,
            callback=lambda _: bar.update(),
        )
    if jax.process_index() == 0:
        write_png(args.out, np.asarray(image))
        size = f"{image.width}x{image.height}"
        settings = f"{args.task}, step {pipeline.step}, seed {args.seed}"
        print(f"wrote {args.out} ({size}, {settings})")
