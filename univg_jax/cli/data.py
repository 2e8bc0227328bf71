"""`univg data`: build datasets, look at what a config trains on, embed its prompts."""

import argparse
import dataclasses
import shlex

from data_pipelines.datasets import DATASETS
from univg_jax import fields
from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.errors import check_name


def add_arguments(parser: Parser) -> None:
    """The command's actions and their flags. A dataset's flags are the fields of its options."""
    actions = parser.add_commands(dest="action")
    build_ = actions.add_parser(
        "build",
        help="write the records of a dataset",
        description="Writes the records of a dataset. What is complete already stays as it is.",
    )
    build_.add_argument(
        "--dataset", required=True, metavar="|".join(DATASETS), help="one of those listed below"
    )
    build_.add_argument(
        "--out",
        required=True,
        action=flags.Output,
        folder=True,
        metavar="DIR",
        help="a config's data.dir",
    )
    added: set[str] = set()
    for dataset in DATASETS.values():
        group = build_.add_argument_group(dataset.name, dataset.summary)
        for field in dataclasses.fields(dataset.options):
            if field.name not in added:
                summary = f"{fields.rule_of(field).help} (default: {field.default})"
                group.add_argument(
                    f"--{field.name}",
                    action=flags.Number,
                    rule=fields.rule_of(field),
                    metavar="N",
                    help=summary,
                )
                added.add(field.name)
    build_.add_example("--dataset=emoji_scenes --resolution=64 --out=data/emoji_64px")
    build_.set_defaults(run=build)

    look = actions.add_parser(
        "inspect",
        help="show what a config trains on",
        description="Writes a page of examples of every task, as the model gets them.",
    )
    flags.add_config(look)
    look.add_argument(
        "--out", required=True, action=flags.Output, metavar="FILE.html", help="the page"
    )
    look.add_argument(
        "--examples",
        action=flags.Number,
        least=1,
        default=8,
        metavar="N",
        help="examples of each task; default: 8",
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


def build(args: argparse.Namespace) -> None:
    """Writes a dataset's records."""
    dataset = DATASETS[check_name(args.dataset, DATASETS, what="dataset")]
    every = {field.name for d in DATASETS.values() for field in dataclasses.fields(d.options)}
    given = {name: value for name in every if (value := getattr(args, name)) is not None}
    options = dataset.make_options(given)
    dataset.build(args.out, options)
    wanted = dict(dir=args.out, dataset=args.dataset)
    wanted |= {f"build.{name}": value for name, value in dataclasses.asdict(options).items()}
    config = shlex.join(f"--config.data.{name}={value}" for name, value in wanted.items())
    print(f"{args.dataset} is in {args.out}. To train on it: {config}")


def inspect_config(args: argparse.Namespace) -> None:
    """Writes a page of the rows that a config trains on."""
    from data_pipelines import inspect
    from univg_jax import assembly, configs

    configure(args)
    config = configs.load(args.config, args.overrides)
    assembly.check_config(config)
    assembly.prepare_data(config)
    collator = assembly.make_collator(config)
    inspect.write_inspection(config, args.out, collator=collator, num_examples=args.examples)
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
