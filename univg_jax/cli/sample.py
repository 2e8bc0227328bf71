"""`univg sample`: pictures from a checkpoint, for any task."""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines.tasks import INPUTS, TASKS, Example, Task, find_task
from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.errors import NotFoundError, UserError, check_name, quote
from univg_jax.fields import parse_literal
from univg_jax.files import check_output
from univg_jax.images import write_png
from univg_jax.progress import Bar
from univg_jax.settings import MAX_SEED, SOLVERS, Config

if TYPE_CHECKING:
    from univg_jax.inputs import Request


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_checkpoint(parser)
    parser.add_argument(
        "--task",
        required=True,
        metavar="|".join(TASKS),
        help="listed below; a full name, such as editing, will do",
    )
    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--prompt", default="", metavar="TEXT", help=_prompt_help())
    for name, shows in INPUTS.items():
        takers = [task.name for task in TASKS.values() if name in task.inputs]
        inputs.add_argument(
            f"--{name}", type=flags.path, metavar="FILE", help=f"{', '.join(takers)}: {shows}"
        )
    inputs.add_argument(
        "--box",
        action="append",
        metavar='"NAME=X0,Y0,X1,Y1"',
        help="lg: instead of --image, where something of the prompt stands, in fractions of the "
        "picture from its left top; one flag each",
    )
    inputs.add_argument(
        "--margins",
        metavar="N|L,T,R,B",
        help="ip: instead of --mask, outpainting by so many pixels on every side, or left, top, "
        "right, bottom",
    )
    inputs.add_argument(
        "--aspect", metavar="W:H", help="ip: the same, to the smallest picture of this aspect"
    )
    inputs.add_argument(
        "--size",
        metavar="WxH",
        help="t2i, id, and lg with --box: of the picture; ip: outpainting to this size; default: "
        "the run's square",
    )
    inputs.add_argument(
        "--prompts",
        type=flags.path,
        metavar="FILE",
        help="instead of --prompt: a text file, one prompt a line",
    )
    inputs.add_argument(
        "--example",
        action=flags.Number,
        least=0,
        metavar="N",
        help="instead of all these: the inputs of example N, from 0, of the task in the test split "
        "of the run's data; they and the true answer are written beside the picture",
    )
    inputs.add_argument(
        "--data",
        type=flags.path,
        metavar="DIR",
        help="where the data of --example lies; default: the run's config",
    )
    options = parser.add_argument_group("sampling", "By default what the run has.")
    options.add_argument(
        "--guidance",
        action=flags.Number,
        kind=float,
        least=0,
        metavar="X",
        help="scale of the text; not depth, pose",
    )
    options.add_argument(
        "--image_guidance",
        action=flags.Number,
        kind=float,
        least=0,
        metavar="X",
        help="scale of the image, where the task has one",
    )
    options.add_argument(
        "--negative_prompt",
        default="",
        metavar="TEXT",
        help="what guidance leads away from; default: from no text",
    )
    options.add_argument("--solver", metavar="|".join(SOLVERS), help="of the flow")
    outputs = parser.add_argument_group("pictures")
    outputs.add_argument(
        "--out",
        required=True,
        type=flags.path,
        metavar="FILE.png|DIR",
        help="the picture to write. Several need a folder, and are seed7.png with --num, 0003.png "
        "of line 3 with --prompts, 0003_seed7.png with both",
    )
    outputs.add_argument(
        "--num",
        action=flags.Number,
        least=1,
        metavar="N",
        help="pictures of each prompt, with seeds from --seed on; default: 1",
    )
    outputs.add_argument(
        "--batch_size",
        action=flags.Number,
        least=1,
        default=1,
        metavar="N",
        help="pictures made at a time, at least one a device; default: 1. More may be faster, and "
        "may round a pixel otherwise",
    )
    flags.add_processes(parser)
    parser.epilog = "\n".join(["tasks:", *map(_task_help, TASKS.values())])
    parser.add_example(
        "--checkpoint=runs/quickstart/stage3 --task=depth --example=0 --out=depth.png"
    )
    parser.set_defaults(run=run)


def _prompt_help() -> str:
    """What each task's prompt says, the tasks with the same together."""
    says: dict[str, list[str]] = {}
    for task in TASKS.values():
        if task.prompt != "none":
            says.setdefault(task.prompt_says, []).append(task.name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in says.items())


def _task_help(task: Task) -> str:
    """A task's name, its title, and flags to try it with."""
    given = [f"--task={task.name}", *(f"--{name}=FILE" for name in task.inputs)]
    given += [f'--prompt="{task.prompt_example}"'] if task.prompt != "none" else []
    return f"  {task.name:7}{task.title}\n         {' '.join(given)}"


@dataclasses.dataclass(frozen=True)
class _Job:
    """One picture to make."""

    out: str
    line: int  # of the prompt, from 1; 0 for that of the command line
    seed: int


def run(args: argparse.Namespace) -> None:
    """Checks the inputs, loads the model, and writes the pictures as they are made."""
    import jax
    import numpy as np

    from univg_jax.inputs import Request, sampling_options
    from univg_jax.pipeline import Pipeline, load_config

    _check_numbers(args)
    task = find_task(args.task)
    prompts = read_prompts(args.prompts) if args.prompts else {0: args.prompt}
    jobs = _jobs(args, list(prompts))
    given = _inputs(args)
    configure(args)
    # All that can be wrong is found by the run's config, before the model is loaded.
    config = load_config(args.checkpoint, pretrained=args.pretrained)
    trained = [name for name, shares in config.tasks.items() if shares.weight > 0]
    check_name(task.name, trained, what=f"task of {args.checkpoint}:")
    names = ("guidance", "image_guidance", "steps", "solver", "negative_prompt")
    options = {name: getattr(args, name) for name in names}
    sampling_options(config, task.name, **options)
    if args.example is None:
        requests = _requests(task, prompts, given, config)
    else:
        example = _held_out(config, task.name, args.example, data_dir=args.data)
        requests = {0: Request.of_example(task.name, example)}
    loaded = Pipeline.load(
        args.checkpoint,
        tasks=[task.name],
        ema=not args.raw_params,
        pretrained=args.pretrained,
    )
    pipeline = loaded.with_options(task.name, **options)

    is_main = jax.process_index() == 0
    with Bar(desc=f"sample {task.name}", unit="step", disable=not is_main) as bar:

        def show(step: int, total: int) -> None:
            bar.total = total
            bar.update(step - bar.n)

        results = pipeline.answer(
            [requests[job.line] for job in jobs],
            seeds=[job.seed for job in jobs],
            negative_prompts=[args.negative_prompt] * len(jobs),
            batch_size=args.batch_size,
            callback=show,
        )
        for job, result in zip(jobs, results, strict=True):
            if is_main:
                write_png(job.out, np.asarray(result.image))
    if is_main:
        image = result.image
        about = f"{image.width}x{image.height}, {task.name}, step {pipeline.step}"
        seeds = f"seed {jobs[0].seed}" if args.num is None else f"seeds from {jobs[0].seed}"
        count = args.out if len(jobs) == 1 else f"{len(jobs)} pictures to {args.out}"
        print(f"wrote {count} ({about}, {seeds})")
        if args.example is not None:
            _write_example(requests[0].example, beside=jobs[0].out)


def _check_numbers(args: argparse.Namespace) -> None:
    if args.seed + (args.num or 1) - 1 > MAX_SEED:
        raise UserError(f"--seed={args.seed}: expected seeds up to {MAX_SEED}")
    names = ("prompt", *INPUTS, "box", "margins", "aspect", "size")
    given = [name for name in names if getattr(args, name)]
    if args.prompts is not None and args.prompt:
        raise UserError("--prompts and --prompt: give one or the other")
    if args.example is not None and (given or args.prompts):
        flag = (given or ["prompts"])[0]
        raise UserError(f"--example takes its inputs from the data: leave out --{flag}")
    if args.data is not None and args.example is None:
        raise UserError("--data says where the data of --example lies: give both")


def read_prompts(path: str) -> dict[int, str]:
    """The prompts of a text file by the number of their line, from 1; blank lines are none.

    Raises UserError for a file that is not there, is not UTF-8, or has no prompt.
    """
    if not os.path.isfile(path):
        kind = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise NotFoundError(f"--prompts={path} {kind}")
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"--prompts={path} is not text in UTF-8: see line {line}") from None
    prompts = {number: text for number, line in enumerate(lines, 1) if (text := line.strip())}
    if not prompts:
        raise UserError(f"--prompts={path} has no prompt")
    return prompts


def _jobs(args: argparse.Namespace, lines: Sequence[int]) -> list[_Job]:
    """A picture for each prompt and seed. Raises UserError where it cannot be written."""
    seeds = range(args.seed, args.seed + (args.num or 1))
    if args.num is None and args.prompts is None:
        check_output(args.out, flag="--out", suffixes=[".png"])
        return [_Job(args.out, lines[0], args.seed)]
    if args.out.lower().endswith(".png"):
        raise UserError(f"--out={args.out}: --num and --prompts need a folder, not a file")
    check_output(args.out, flag="--out", folder=True)
    jobs = []
    for line, seed in itertools.product(lines, seeds):
        names = [*([f"{line:04d}"] if line else []), *([f"seed{seed}"] if args.num else [])]
        jobs.append(_Job(os.path.join(args.out, f"{'_'.join(names)}.png"), line, seed))
    return jobs


def _inputs(args: argparse.Namespace) -> dict[str, Any]:
    """What `make_request` takes beside the prompt. Raises UserError for what cannot be read."""
    from univg_jax.inputs import read_input

    pictures = {name: read_input(name, getattr(args, name), label=f"--{name}") for name in INPUTS}
    boxes = [_box(text) for text in args.box] if args.box else None
    margins = args.margins and parse_literal(args.margins)
    size = args.size and _size(args.size)
    return {**pictures, "boxes": boxes, "margins": margins, "aspect": args.aspect, "size": size}


def _box(text: str) -> tuple[str, list[float]]:
    name, _, corners = text.rpartition("=")
    try:
        return name, [float(x) for x in corners.split(",")]
    except ValueError:
        raise UserError(f"--box={text}: expected NAME=X0,Y0,X1,Y1") from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UserError(f"--size={text}: expected WIDTHxHEIGHT, such as 1024x768")
    return int(width), int(height)


def _requests(
    task: Task, prompts: Mapping[int, str], given: Mapping[str, Any], config: Config
) -> dict[int, "Request"]:
    """What each prompt asks for, by its line. Raises UserError as `make_request` does."""
    from univg_jax.inputs import make_request

    requests = {}
    for line, prompt in prompts.items():
        try:
            requests[line] = make_request(task.name, prompt=prompt, **given, data=config.data)
        except UserError as error:
            where = f"line {line} of --prompts: " if line else ""
            raise type(error)(f"{where}{error}") from None
    return requests


def _held_out(config: Config, task: str, index: int, *, data_dir: str | None) -> Example:
    """Example `index` of a task in the test split of the run's data, or of that in `data_dir`."""
    from data_pipelines.held_out import HeldOut
    from univg_jax import assembly

    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    assembly.prepare_data(config)
    held_out = HeldOut(
        config, task, split="test", num=index + 1, collator=assembly.make_collator(config)
    )
    if len(held_out) <= index:
        raise UserError(f"--example={index}: the test split has {len(held_out)} of task {task!r}")
    return held_out.row(index).example


def _write_example(example: Example, *, beside: str) -> None:
    """Writes an example's inputs and true answer beside its picture, and prints its prompt."""
    pictures = {"source": example.source, "face": example.face, "target": example.target}
    for name, pixels in pictures.items():
        if pixels is not None:
            path = f"{beside.removesuffix('.png')}_{name}.png"
            write_png(path, pixels)
            print(f"wrote {path}")
    if example.text:
        print(f"its prompt is {quote(example.text)}")
