"""Damaged files of these datasets give one line, or entries that are left out by name."""

import functools
import pathlib

import numpy as np
import pytest

from data_pipelines.datasets import captions, dalle3, images, journeydb, osv5m, places365
from tests import native
from tests.native import captions as forms
from tests.native.damage import damage
from tests.native.reading import read
from univg_jax.errors import UserError

WRITERS = {name: (captions.DATASET, write) for name, write in forms.FORMS.items()} | {
    module.DATASET.name: (module.DATASET, functools.partial(native.write, module.DATASET.name))
    for module in (dalle3, images, journeydb, osv5m, places365)
}
MUTATIONS = 20  # of each: 300 in all


def failure(dataset, options) -> str:
    """What ends the build, if anything does. Whatever is no UserError is a bug."""
    try:
        (opened,) = dataset.open(dataset.make_options(options)).values()
        for split in opened.splits:
            read(dataset, options, split)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", WRITERS)
def test_damage_is_one_line_or_left_out(name, tmp_path):
    dataset, write = WRITERS[name]
    options = write(tmp_path)
    files = sorted(path for path in pathlib.Path(tmp_path).rglob("*") if path.is_file())
    rng = np.random.default_rng(len(name))
    for _ in range(MUTATIONS):
        path = files[int(rng.integers(len(files)))]
        whole = path.read_bytes()
        path.write_bytes(damage(whole, rng))
        assert "\n" not in failure(dataset, options)
        path.write_bytes(whole)
