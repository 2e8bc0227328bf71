"""`univg demo`: a page to try a checkpoint in a browser."""

import argparse

from univg_jax.cli import flags
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser

NUM_EXAMPLES = 4  # of each task


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_checkpoint(parser)
    flags.add_address(parser, port=7860)
    parser.add_argument(
        "--data",
        type=flags.path,
        metavar="DIR",
        help="where the data lies whose test split gives the examples; default: the run's config",
    )
    parser.add_example("--checkpoint=runs/quickstart/stage3")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Loads the model and the examples, and serves the page until it is ended."""
    from univg_jax.pipeline import Pipeline
    from univg_jax.serving import address, page
    from univg_jax.serving.examples import load_examples
    from univg_jax.serving.maker import Maker
    from univg_jax.serving.store import Store

    with address.open_socket(args.host, args.port) as listening:
        configure(args)
        pipeline = Pipeline.load(
            args.checkpoint,
            ema=not args.raw_params,
            sampling=flags.sampling(args),
            pretrained=args.pretrained,
        )
        store = Store()
        examples = load_examples(pipeline, store, num=NUM_EXAMPLES, data_dir=args.data or "")
        print(f"the page: {address.url_of(listening)} (Ctrl-C ends it)", flush=True)
        page.serve(
            Maker(pipeline, store),
            examples,
            listening=listening,
            title=f"{pipeline.config.name}, step {pipeline.step}",
            seed=args.seed,
        )
