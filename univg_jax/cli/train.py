"""`univg train`: runs a config in a workdir, or continues it."""

import argparse
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines import mixture
from data_pipelines.tasks import TASKS
from univg_jax import assembly, checkpoint, sharding
from univg_jax.cli import launch
from univg_jax.cli.config import load_config
from univg_jax.cli.main import configure_jax
from univg_jax.interop.diffusers import open_transformer, transformer_folder
from univg_jax.sampling import Generator
from univg_jax.training import profiling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:NAME=VALUE,...]", help="an experiment"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where the run lives; continued if it has begun",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="trace the updates from step START to step STOP into DIR/profile",
    )
    parser.epilog = "Any key of the config can be set: --config.optim.lr=1e-4"
    launch.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    configure_jax(args)
    config = load_config(args.config, args.overrides)
    workdir = epath.Path(args.workdir)
    assembly.check_config(config)
    profile = (
        profiling.parse_steps(args.profile, total=config.train.steps) if args.profile else None
    )
    mesh = assembly.make_mesh(config)
    # The parent is looked at before anything is claimed.
    if folder := transformer_folder(config.init_from.path):
        open_transformer(folder)
    elif config.init_from.path:
        checkpoint.load_config(config.init_from.path)
    checkpoint.claim_workdir(workdir, config)
    if (workdir / "summary.json").exists() and max(
        checkpoint.list_steps(workdir), default=0
    ) == config.train.steps:
        if jax.process_index() == 0:
            print(f"{config.name}: all {config.train.steps} steps are done in {workdir}")
        return

    assembly.prepare_data(config)
    tokenizer = assembly.tokenizer(config)
    conditioner, frozen = assembly.prepare_encoders(config, workdir, mesh)
    model = assembly.make_model(config, conditioner)
    stream = mixture.make_stream(
        config,
        tokenizer=tokenizer,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    active = [name for name in TASKS if name in stream.shares]
    validation = {
        name: list(
            mixture.eval_batches(
                config,
                name,
                split="validation",
                num=config.train.eval_examples,
                batch_size=config.data.batch_size,
                tokenizer=tokenizer,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        for name in active
    }
    generator = Generator(model=model, conditioner=conditioner, sampler=assembly.sampler(config))
    train.train(
        config,
        workdir=workdir,
        stream=stream,
        model=model,
        conditioner=conditioner,
        frozen=frozen,
        task_names=list(TASKS),
        validation=validation,
        preview=previews(config, active, tokenizer, generator),
        mesh=mesh,
        profile=profile,
    )
    stream.close()


def previews(config: ConfigDict, active: list[str], tokenizer: Any, generator: Generator) -> Any:
    """Draws a grid a task of held-out examples: source (where the task has one), target and output
    in rows.
    """
    # Rows enough for every device; the noise of row i is the same at every interval.
    count = config.train.sample_examples
    size = -(-count // jax.device_count()) * jax.device_count()
    batches = {
        name: next(
            mixture.eval_batches(
                config,
                name,
                split="validation",
                num=count,
                batch_size=size,
                tokenizer=tokenizer,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        for name in active
    }

    def draw(params: Any, frozen: Any, folder: epath.Path) -> dict[str, np.ndarray]:
        grids, mesh = {}, jax.sharding.get_mesh()
        for name, batch in batches.items():
            passes = [
                sharding.shard_batch(p, mesh)
                for p in assembly.guided_passes(batch, config, name, tokenizer)
            ]
            images = generator(
                params, frozen, passes, weights=assembly.guidance(config, name), seed=config.seed
            )
            whole = jax.tree.map(sharding.all_gather_to_host, passes[0])
            sources = [whole.source] if whole.has_source.any() else []
            rows = *sources, whole.target, assembly.to_uint8(sharding.all_gather_to_host(images))
            # A mesh may hold the rows of processes in any order.
            order = [i for i in np.argsort(whole.sample_id) if whole.valid[i]]
            grids[name] = np.concatenate([np.concatenate(row[order], axis=1) for row in rows])
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for name, grid in grids.items():
                with (folder / f"{name}.png").open("wb") as file:
                    Image.fromarray(grid).save(file, format="PNG")
        return {f"samples/{name}": grid for name, grid in grids.items()}

    return draw
