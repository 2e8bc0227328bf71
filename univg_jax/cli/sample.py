"""`univg sample`: one image from a checkpoint, for any task."""

import argparse
import os

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from data_pipelines import mixture, records, transforms
from data_pipelines.tasks import PLACEHOLDER, TASKS, Example, blank_hole, find
from univg_jax import assembly
from univg_jax.cli import launch
from univg_jax.cli.main import configure_jax
from univg_jax.errors import check_name

# What each task takes beside the prompt, and whether it needs a prompt.
INPUTS = {
    "t2i": ((), True),
    "ie": (("image",), True),
    "ip": (("image", "mask"), False),
    "lg": (("image",), True),
    "depth": (("image",), False),
    "pose": (("image",), False),
    "seg": (("image",), True),
    "id": (("face",), True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a workdir, or DIR/checkpoints/STEP"
    )
    parser.add_argument("--task", required=True, metavar="|".join(TASKS))
    parser.add_argument(
        "--prompt",
        default="",
        help=f"without the task's tag; for id with {PLACEHOLDER} for the person",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="ie, ip, depth, pose, seg: the source; lg: a canvas of colored blocks",
    )
    parser.add_argument("--mask", metavar="FILE", help="ip: white where to generate")
    parser.add_argument("--face", metavar="FILE", help="id: a picture of the person")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the solver; default: the run's config")
    parser.add_argument(
        "--raw_params",
        action="store_true",
        help="the raw parameters instead of their average (EMA)",
    )
    parser.add_argument(
        "--pretrained",
        metavar="DIR",
        help="where pretrained encoders lie; default: the run's config",
    )
    parser.add_argument("--out", required=True, metavar="FILE.png")
    launch.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    find(args.task)
    _check_inputs(args)
    configure_jax(args)
    run = assembly.load_run(
        args.checkpoint,
        which="params" if args.raw_params else "ema",
        overrides={"steps": args.steps},
        pretrained=args.pretrained,
    )
    check_name(args.task, run.tasks, what=f"task of {args.checkpoint}:")
    example = make_example(args, run.config.data.resolution)
    row = mixture.Row(example=example, task=args.task, sample_id=0)
    data = run.config.data
    batch = mixture.collate(
        [row] * run.rows,
        tokenizer=run.tokenizer,
        resolution=data.resolution,
        num_tokens=data.num_tokens,
        face_resolution=data.face_resolution,
    )
    alone = jax.process_count() == 1
    with tqdm(
        total=run.config.sampling.steps, desc=f"sample {args.task}", unit="step", disable=not alone
    ) as bar:
        image = run.generate(batch, args.task, seed=args.seed, on_step=bar.update)[0]
    if jax.process_index() != 0:
        return
    if args.task == "ip":
        # what is kept is the input's own pixels
        image = np.where(example.mask > 0, image, example.source)
    out = epath.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:
        Image.fromarray(image).save(file, format="PNG")
    print(
        f"wrote {args.out} ({image.shape[1]}x{image.shape[0]}, {args.task}, step {run.step}, seed {args.seed})"
    )


def _check_inputs(args: argparse.Namespace) -> None:
    files, needs_prompt = INPUTS[args.task]
    if needs_prompt and not args.prompt.strip():
        raise ValueError(f"task {args.task} needs --prompt")
    if args.task == "id" and PLACEHOLDER not in args.prompt:
        raise ValueError(
            f"--prompt={args.prompt!r} has no {PLACEHOLDER}: task id puts the person there"
        )
    for name in ("image", "mask", "face"):
        path = getattr(args, name)
        if name in files and not path:
            raise ValueError(f"task {args.task} needs --{name}")
        if path and name not in files:
            raise ValueError(f"task {args.task} takes no --{name}")
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f"--{name}={path} does not exist")
    if not args.out.lower().endswith(".png"):
        raise ValueError(f"--out={args.out} should end in .png")


def make_example(args: argparse.Namespace, resolution: int) -> Example:
    """The files and the prompt as the input that the task was trained on."""
    blank = np.zeros((resolution, resolution, 3), np.uint8)
    source = _read(args.image, "image", resolution) if args.image else None
    face = _read(args.face, "face", resolution) if args.face else None
    mask = None
    if args.mask:
        painted = _read(args.mask, "mask", resolution)
        mask = (painted.mean(axis=-1, keepdims=True) > 127).astype(np.uint8)
        if not mask.any():
            raise ValueError(f"--mask={args.mask} has no white pixel: nothing to generate")
        source = blank_hole(source, mask)
    return Example(target=blank, source=source, mask=mask, text=args.prompt.strip(), face=face)


def _read(path: str, name: str, resolution: int) -> np.ndarray:
    with open(path, "rb") as file:
        try:
            image = records.decode({"image": file.read()})["image"]
        except ValueError as error:
            raise ValueError(f"--{name}={path}: {error}") from None
    return transforms.resize_and_crop({"image": image}, resolution=resolution)["image"]
