"""A pipeline without a training."""

import dataclasses

import jax
import numpy as np

from data_pipelines.collate import Collator
from tests import helpers
from tests.evaluation import evaluation_cases as data
from univg_jax import sharding
from univg_jax.pipeline import Pipeline
from univg_jax.sampling import Generator
from univg_jax.settings import Config


def make_pipeline() -> Pipeline:
    """A model at its initialization, on all devices."""
    config = helpers.tiny_config().to_dict()
    config["data"] |= {"resolution": 16, "dataset": "", "dir": "nowhere"}
    config["sampling"]["steps"] = 1
    config = Config.of(config)
    conditioner, frozen = helpers.tiny_conditioner()
    generator = Generator(
        model=helpers.tiny_model(conditioner),
        conditioner=conditioner,
        sampler=config.sampling.sampler,
    )
    blank = Pipeline(
        config=config,
        params=None,
        frozen=frozen,
        mesh=sharding.make_mesh(data=-1),
        generator=generator,
        collator=Collator(tokenizer=data.tokenize, shape=helpers.SHAPE),
        path="run",
        step=7,
        digests={"weights": "abc", "text": "def"},
    )
    init = jax.jit(blank._init_params, out_shardings=sharding.replicated(blank.mesh))
    with jax.set_mesh(blank.mesh):
        return dataclasses.replace(blank, params=init(jax.random.key(1)))


def answering(pipeline: Pipeline) -> Pipeline:
    """The pipeline with parameters by which its images depend on all that they are made of."""
    shardings = jax.tree.map(lambda x: x.sharding, pipeline.params)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, pipeline.params))
    rng = np.random.default_rng(0)
    changed = [x + rng.normal(0, 0.1, x.shape).astype(x.dtype) for x in leaves]
    params = jax.device_put(jax.tree.unflatten(tree, changed), shardings)
    return dataclasses.replace(pipeline, params=params)
