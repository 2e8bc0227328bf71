"""`univg data`: build datasets, look at what a config trains on."""

import argparse

from data_pipelines import inspect
from univg_jax.cli import assembly
from univg_jax.cli.config import load_config
from univg_jax.names import known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build_ = actions.add_parser("build", help="native files to records", description="Native files to records.")
    build_.add_argument("--dataset", required=True, metavar="|".join(assembly.EMBEDDED))
    build_.add_argument("--out", required=True, metavar="DIR")
    build_.add_argument("--resolution", type=int, default=64, help="pixels a side")
    build_.add_argument("--num_scenes", type=int, default=10_000)
    build_.add_argument("--nouns", type=int, default=0, help="the first so many of the whitelist; 0: all")
    build_.add_argument("--seed", type=int, default=0)
    build_.set_defaults(run=build)

    look = actions.add_parser("inspect", help="a page of examples of every task", description="A page of examples.")
    look.add_argument("--config", required=True, metavar="FILE.py[:NAME=VALUE,...]")
    look.add_argument("--out", required=True, metavar="FILE.html")
    look.add_argument("--examples", type=int, default=8, help="a task")
    look.set_defaults(run=inspect_)


def build(args: argparse.Namespace) -> None:
    known(args.dataset, assembly.EMBEDDED, what="dataset")
    assembly.EMBEDDED[args.dataset].build(
        args.out,
        resolution=args.resolution,
        num_scenes=args.num_scenes,
        seed=args.seed,
        nouns=args.nouns or None,
    )
    print(f"{args.dataset} is in {args.out}")


def inspect_(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    assembly.check_config(config)
    assembly.prepare_data(config)
    inspect.write_inspection(config, args.out, tokenizer=assembly.tokenizer(config), num_examples=args.examples)
    print(f"wrote {args.out}")
