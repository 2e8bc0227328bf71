"""Runs a script of an earlier tree under today's names: `run_case.py FILE [ARG]`.

The scripts (a folder named by UNIVG_CASES, not part of the package) have inputs that failed once.
"""

import importlib
import os
import runpy
import sys
import types

from data_pipelines import cache, mixture
from data_pipelines.collate import Collator
from univg_jax import images, workdir
from univg_jax.batch import BatchShape
from univg_jax.settings import Config
from univg_jax.training import optim


class OldStream(mixture.Stream):
    """`make_stream(config, tokenizer=..., sources=...)`, with its count of bad records."""

    def __init__(self, config, *, tokenizer, sources):
        config = Config.of(config)
        collator = Collator(tokenizer=tokenizer, shape=BatchShape.of(config.data))
        super().__init__(config, collator=collator, sources=sources)

    @property
    def quarantined(self) -> int:
        return self.counters()["quarantined"]


def make_schedule(options):
    """A schedule of a config's `optim` and `total_steps` in one mapping."""
    options = dict(options)
    steps = options.pop("total_steps")
    return optim.make_schedule(Config.of({"optim": options}).optim, total_steps=steps)


def claim_workdir(folder, config):
    """`workdir.claim_workdir` of a config that is not checked yet."""
    workdir.claim_workdir(folder, Config.of(config).to_dict())


def write_cache(folder, rows, **options):
    """All of a cache of prompts at once."""
    writer = cache.text_writer(folder, **options)
    for row in rows:
        writer.add(cache.text_key(row), row)
    writer.flush()
    return writer.finish()


def module(name, **attributes):
    """A module of the earlier tree."""
    made = types.ModuleType(name)
    made.__dict__.update(attributes)
    parent, _, last = name.rpartition(".")
    sys.modules[name] = made
    setattr(importlib.import_module(parent), last, made)


if __name__ == "__main__":
    mixture.make_stream = OldStream
    cache.write_cache = write_cache
    module("univg_jax.optim", make_schedule=make_schedule)
    module("univg_jax.checkpoint", claim_workdir=claim_workdir)
    module("univg_jax.cli.assembly", to_uint8=images.to_uint8)
    path, *arguments = sys.argv[1:]
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")
