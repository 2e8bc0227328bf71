"""`univg export`: a trained model in a format that other programs read."""

import argparse
from typing import TYPE_CHECKING

from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.export.formats import FORMATS

if TYPE_CHECKING:
    from univg_jax.export.card import Measured


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_model(parser)
    parser.add_argument(
        "--step", action=flags.Number, least=0, metavar="N", help="default: the newest sound one"
    )
    parser.add_argument(
        "--format", required=True, metavar="|".join(FORMATS), help="see docs/export.md"
    )
    parser.add_argument(
        "--out",
        required=True,
        action=flags.Output,
        folder=True,
        metavar="DIR",
        help="the folder to write; it must not exist, and does not until the export is whole",
    )
    parser.add_argument(
        "--dtype",
        default="f32",
        metavar="f32|bf16|int8",
        help="of the parameters; default: f32. int8 (safetensors only) has a scale for each output "
        "of a kernel",
    )
    parser.add_argument(
        "--max_file_gb",
        action=flags.Number,
        least=1,
        default=5,
        metavar="N",
        help="the most GB (10^9 bytes) of a safetensors file; default: 5",
    )
    parser.add_argument(
        "--copy_encoders",
        action="store_true",
        help="copy pretrained encoders into the folder, instead of naming them by their digest; "
        "their licenses may not allow to pass them on",
    )
    parser.add_argument(
        "--evaluation",
        type=flags.path,
        metavar="DIR",
        help="the --out of `univg evaluate` of this checkpoint: its numbers go into the model card",
    )
    parser.add_example(
        "--checkpoint=runs/quickstart/stage3 --format=safetensors --out=exports/quickstart"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Writes the folder, and prints how its pictures compare with the checkpoint's."""
    from univg_jax.export.job import Job
    from univg_jax.export.run import check, export_model
    from univg_jax.trained import open_trained

    configure(args)
    job = Job(
        trained=open_trained(args.checkpoint, step=args.step),
        ema=not args.raw_params,
        dtype=args.dtype,
        max_file_bytes=args.max_file_gb * 10**9,
        copy_encoders=args.copy_encoders,
        pretrained=args.pretrained,
    )
    check(job, args.format, args.out)
    measured = _measured(args.evaluation, job.trained.digest) if args.evaluation else []
    done = export_model(job, args.format, args.out, evaluation=measured)
    for task, found in done.compared.items():
        rounding = done.rounding[task]
        by = f"; {args.dtype} itself changes it by {rounding.most}" if args.dtype != "f32" else ""
        print(f"{task}: the picture differs by {found.most} of 255 from the checkpoint's{by}")
    print(f"wrote {args.out} ({args.format}, {args.dtype}, step {job.trained.step}, {job.which})")


def _measured(folder: str, weights: str) -> "list[Measured]":
    """The numbers of an evaluation of these weights. Raises UserError if there are none."""
    from univg_jax.evaluation.report.find import find_of
    from univg_jax.export.card import Measured

    return [
        Measured(
            benchmark=card.benchmark,
            examples=card.items,
            numbers={name: x for name, x in card.numbers.items() if x is not None},
            primaries=card.primaries,
            date=card.provenance.get("date", ""),
            revision=card.provenance.get("revision", "unknown"),
        )
        for card in find_of(weights, folder)
    ]
