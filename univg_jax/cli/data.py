"""`univg data`: build datasets, look at what a config trains on, embed its prompts."""

import argparse

import jax
import jax.numpy as jnp
from etils import epath

from data_pipelines import cache, inspect
from univg_jax import assembly, encoders
from univg_jax.cli.config import load_config
from univg_jax.cli.main import configure_jax
from univg_jax.errors import check_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build_ = actions.add_parser(
        "build", help="native files to records", description="Native files to records."
    )
    build_.add_argument("--dataset", required=True, metavar="|".join(assembly.EMBEDDED))
    build_.add_argument("--out", required=True, metavar="DIR")
    build_.add_argument("--resolution", type=int, default=64, help="pixels a side")
    build_.add_argument("--num_scenes", type=int, default=10_000)
    build_.add_argument(
        "--nouns", type=int, default=0, help="the first so many of the whitelist; 0: all"
    )
    build_.add_argument("--seed", type=int, default=0)
    build_.set_defaults(run=build)

    look = actions.add_parser(
        "inspect", help="a page of examples of every task", description="A page of examples."
    )
    look.add_argument("--config", required=True, metavar="FILE.py[:NAME=VALUE,...]")
    look.add_argument("--out", required=True, metavar="FILE.html")
    look.add_argument("--examples", type=int, default=8, help="a task")
    look.set_defaults(run=inspect_)

    cache_ = actions.add_parser(
        "cache",
        help="the embeddings of a run's prompts, for data.text_cache",
        description="Embeds every prompt of a run's first steps, its validation and its samples; with "
        "--config.data.text_cache=DIR the run then needs no text encoder.",
    )
    cache_.add_argument("--config", required=True, metavar="FILE.py[:NAME=VALUE,...]")
    cache_.add_argument("--out", required=True, metavar="DIR")
    cache_.add_argument("--steps", type=int, help="of the run; default: all of train.steps")
    cache_.set_defaults(run=cache_prompts)


def build(args: argparse.Namespace) -> None:
    check_name(args.dataset, assembly.EMBEDDED, what="dataset")
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
    inspect.write_inspection(
        config, args.out, tokenizer=assembly.tokenizer(config), num_examples=args.examples
    )
    print(f"wrote {args.out}")


def cache_prompts(args: argparse.Namespace) -> None:
    configure_jax()
    config = load_config(args.config, [*args.overrides, "data.text_cache="])
    assembly.check_config(config)
    if (epath.Path(args.out) / cache.RECORD).exists():
        raise FileExistsError(f"{args.out} has a cache; choose another folder or delete it")
    assembly.prepare_data(config)
    mesh = assembly.make_mesh(config)
    jax.set_mesh(mesh)
    module, params = encoders.load_text(config.conditioning, mesh=mesh)
    embed = jax.jit(lambda params, tokens, mask: module.apply({"params": params}, tokens, mask))
    count = cache.write_cache(
        args.out,
        cache.prompts(config, assembly.tokenizer(config), steps=args.steps or config.train.steps),
        embed=lambda tokens, mask: jax.device_get(
            embed(params, jnp.asarray(tokens), jnp.asarray(mask))
        ),
        identity=encoders.text_identity(config.conditioning, num_tokens=config.data.num_tokens),
    )
    print(f"{args.out} has the embeddings of {count} prompts")
