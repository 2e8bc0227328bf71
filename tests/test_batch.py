"""The schema: its abstract form, its fake, and its place in JAX's trees."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers import fake_batch
from univg_jax.batch import Batch, BatchShape

SHAPE = BatchShape(height=8, width=12, num_tokens=5, face=4)


def test_a_fake_batch_has_the_spec():
    spec = SHAPE.spec(3)
    fake = fake_batch(shape=SHAPE, batch_size=3)
    assert fake.size == 3
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fake) == jax.tree.map(
        lambda x: (x.shape, x.dtype), spec
    )


def test_a_fake_batch_is_well_formed():
    fake = fake_batch(seed=4, shape=SHAPE, batch_size=3)
    assert not fake.source[~fake.has_source].any()
    assert fake.source[fake.has_source].any()
    assert fake.text_mask[:, :2].all()


def test_a_tree_of_anything_may_take_the_arrays_place():
    spec = SHAPE.spec(3)
    names = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.tree_util.keystr(path, simple=True), spec
    )
    assert names.target == "target"
    absent = (names.text, names.latents)  # nothing from a cache
    assert absent == (None, None)
    assert len(jax.tree.leaves(names)) == len(dataclasses.fields(Batch)) - len(absent)


def test_arrays_are_checked():
    fake = fake_batch(shape=SHAPE, batch_size=3)
    with pytest.raises(Exception, match="mask"):
        dataclasses.replace(fake, mask=np.zeros((3, 8, 8, 3), np.uint8))
