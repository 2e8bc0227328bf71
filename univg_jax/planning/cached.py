"""What batches bring from a cache, as shapes: a plan needs no cache."""

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from univg_jax.batch import Batch, Latents
from univg_jax.conditioning import Conditioner

CACHED = ("text", "latents")


def with_cached(
    batch: Batch,
    cached: Sequence[str],
    *,
    conditioner: Conditioner,
    frozen: PyTree,
    draws_sources: bool,
) -> Batch:
    """A batch of shapes with the parts of CACHED that are `cached`, as `univg data cache` has them.

    `draws_sources`: the run draws sources at random, which are encoded in the step.
    """

    def add(frozen: PyTree, batch: Batch) -> Batch:
        found = {}
        if "text" in cached:
            found["text"] = conditioner.text.apply(
                {"params": frozen["text"]}, batch.tokens, batch.text_mask
            )
        if "latents" in cached:
            found["latents"] = Latents(
                target=conditioner.encode(frozen, batch.target),
                source=conditioner.encode(frozen, batch.source),
                source_missing=batch.has_source if draws_sources else None,
            )
        return dataclasses.replace(batch, **found)

    return jax.eval_shape(add, frozen, batch)
