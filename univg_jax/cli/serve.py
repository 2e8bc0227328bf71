"""`univg serve`: a checkpoint behind HTTP."""

import argparse
import signal

from absl import logging

from univg_jax import fields
from univg_jax.cli import flags, signals
from univg_jax.cli.main import configure
from univg_jax.cli.parser import Parser
from univg_jax.errors import UserError, check_name, needs_extra, quote
from univg_jax.settings import SOLVERS


def add_arguments(parser: Parser) -> None:
    """The command's flags."""
    flags.add_model(parser)
    parser.add_argument(
        "--steps",
        metavar="N,N",
        help="steps of the solver that requests may ask for, the first where they do not; default: "
        "the run's config",
    )
    parser.add_argument(
        "--solvers",
        metavar=",".join(SOLVERS),
        help="likewise; each is compiled with each of --steps",
    )
    network = parser.add_argument_group("network")
    flags.add_address(network, port=8000)
    network.add_argument(
        "--api_keys",
        type=flags.path,
        metavar="FILE",
        help="keys, one a line, of which a request needs one; default: those of the environment's "
        "UNIVG_API_KEYS, with commas between them; without any, everybody may ask",
    )
    number = dict(action=flags.Number, metavar="N")
    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--max_batch",
        **number,
        least=1,
        most=1024,
        default=8,
        help="pictures made together; default: 8. Compiled are powers of two up to it",
    )
    batches.add_argument(
        "--max_wait_ms",
        **number,
        least=1,
        most=60_000,
        default=10,
        help="milliseconds that a batch waits to become full; default: 10",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max_queue",
        **number,
        least=1,
        most=100_000,
        default=64,
        help="pictures that wait or are being made; more get status 429; default: 64",
    )
    limits.add_argument(
        "--max_mib", **number, least=1, most=4096, default=32, help="MiB of a request; default: 32"
    )
    limits.add_argument(
        "--max_pixels",
        **number,
        least=1,
        most=2**27,
        default=2**24,
        help="pixels of a picture that is given or asked for; default: 16777216",
    )
    limits.add_argument(
        "--timeout_s",
        **number,
        least=1,
        most=86_400,
        default=300,
        help="seconds that a request may take; default: 300",
    )
    parser.add_example("--checkpoint=runs/quickstart/stage3")
    parser.set_defaults(run=run, waits=lambda: True)  # it finishes what it has begun


def run(args: argparse.Namespace) -> None:
    """Checks the flags, loads the model, and serves it until a signal."""
    with needs_extra("serve", "univg serve"):
        from univg_jax.serving import address, server

    steps = _steps(args.steps) if args.steps is not None else ()
    solvers = args.solvers.split(",") if args.solvers is not None else ()
    for solver in solvers:
        check_name(solver, SOLVERS, what="--solvers")
    keys = server.read_keys(args.api_keys)
    configure(args)
    from univg_jax.pipeline import Pipeline, load_config

    sampling = {}
    if steps:
        sampling["steps"] = steps[0]
    if solvers:
        sampling["solver"] = solvers[0]
    options = dict(sampling=sampling, pretrained=args.pretrained)
    load_config(args.checkpoint, **options)
    with address.open_socket(args.host, args.port) as listening:
        if not (keys or address.is_loopback(listening)):
            logging.warning("--host=%s: everybody who reaches it may ask: no --api_keys", args.host)
        pipeline = Pipeline.load(args.checkpoint, ema=not args.raw_params, **options)
        names = ("max_batch", "max_wait_ms", "max_queue", "max_mib", "max_pixels", "timeout_s")
        settings = server.Settings(
            **{name: getattr(args, name) for name in names},
            steps=steps,
            solvers=solvers,
            api_keys=keys,
        )
        url = address.url_of(listening)
        print(f"serving at {url}, compiling: see /ready and /docs", flush=True)
        server.log_as_json()
        try:
            server.Server(pipeline, settings).serve_on(listening)
        except signals.Ended as end:
            if end.exit_code != 128 + signal.SIGTERM:  # a server's usual end is no failure
                raise


def _steps(text: str) -> list[int]:
    rule = fields.Rule(least=1, most=10_000)
    found = [
        fields.read(int, fields.parse_literal(part), "--steps", rule) for part in text.split(",")
    ]
    if len(set(found)) < len(found):
        raise UserError(f"--steps={quote(text)}: a number is there twice")
    return found
