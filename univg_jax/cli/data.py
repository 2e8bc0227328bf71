"""`univg data`: build datasets, look at what a config trains on, embed its prompts."""

import argparse

from univg_jax.cli import datasets, flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """The command's actions and their flags."""
    actions = parser.add_commands(dest="action")
    datasets.add_build(actions)
    datasets.add_list(actions)
    datasets.add_verify(actions)

    look = actions.add_parser(
        "inspect",
        help="show what a config trains on",
        description="Writes a page of examples of every task and source, as the model gets them, "
        "with histograms of the mixture, the buckets and the prompts, and the records that cannot "
        "be used. Prints a summary and what to look at before a run.",
    )
    flags.add_config(look)
    look.add_argument(
        "--out", required=True, action=flags.Output, metavar="FILE.html", help="the page"
    )
    look.add_argument(
        "--examples",
        action=flags.Number,
        least=1,
        default=4,
        metavar="N",
        help="examples of each task and source; default: 4",
    )
    look.add_example("--config=experiments/emoji.py:stage=3 --out=inspect.html")
    look.set_defaults(run=inspect_config)

    cache = actions.add_parser(
        "cache",
        help="encode a run's prompts and pictures beforehand",
        description="Encodes every prompt, or picture, of a run's first steps, its validation and "
        "its samples. With --config.data.text_cache=DIR the run then needs no text encoder, with "
        "--config.data.latent_cache=DIR the step encodes only sources that are drawn at random. "
        "A build that was killed goes on; on several processes each encodes its share.",
    )
    flags.add_config(cache)
    cache.add_argument(
        "--out",
        required=True,
        action=flags.Output,
        folder=True,
        metavar="DIR",
        help="the run's data.text_cache and data.latent_cache",
    )
    cache.add_argument(
        "--what",
        default="text",
        metavar="A,B",
        help="text (prompts), latents (of targets and sources), or both; default: text",
    )
    cache.add_argument(
        "--steps",
        action=flags.Number,
        least=1,
        metavar="N",
        help="steps of the run; default: all of train.steps",
    )
    cache.add_example("--config=experiments/emoji.py:stage=3 --out=data/prompts --steps=100")
    cache.add_example(
        "--config=experiments/emoji.py:stage=3 --out=data/cache --what=text,latents --steps=100"
    )
    flags.add_processes(cache)
    cache.set_defaults(run=cache_run)


def inspect_config(args: argparse.Namespace) -> None:
    """Writes a page of the rows that a config trains on."""
    from data_pipelines import inspect
    from univg_jax import assembly, configs

    configure(args)
    config = configs.load(args.config, args.overrides)
    assembly.check_config(config)
    assembly.prepare_data(config)
    collator = assembly.make_collator(config)
    found = inspect.write_inspection(
        config, args.out, collator=collator, num_examples=args.examples
    )
    print("\n".join(found.lines()))
    print(f"wrote {args.out}")


def cache_run(args: argparse.Namespace) -> None:
    """Encodes the prompts and pictures of a run."""
    import jax

    from univg_jax import configs, precompute

    configure(args)
    config = configs.load(args.config, args.overrides)
    what = list(dict.fromkeys(filter(None, args.what.split(","))))
    steps = args.steps or config.train.steps
    counts = precompute.cache_run(config, args.out, steps=steps, what=what)
    if jax.process_index() == 0:
        says = {"text": "the embeddings of {} prompts", "latents": "the latents of {} pictures"}
        held = " and ".join(says[name].format(count) for name, count in counts.items())
        print(f"{args.out} has {held}")
