"""A whole run of three stages of two steps each, through the command line, that tests share.

Files that use `root` are of the xdist group "pipeline", so that one worker makes it once.
"""

import pytest

from univg_jax.cli.main import main

CONFIG = "experiments/emoji.py:preset=smoke,stage="
FAST = [
    "--config.train.steps=2",
    "--config.optim.warmup=1",
    "--config.train.save_every=1",
    "--config.train.eval_examples=8",
    "--config.sampling.steps=2",
    "--config.train.sample_examples=2",
]


def train(stage, root, *more, init_from=""):
    """`univg train` of one stage; returns its exit code."""
    spec = f"{CONFIG}{stage}" + (f",init_from={init_from}" if init_from else "")
    data = f"--config.data.dir={root / 'data'}"
    workdir = f"--workdir={root / f'stage{stage}'}"
    return main(["train", f"--config={spec}", workdir, data, *FAST, *more])


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder with the workdirs stage1, stage2 and stage3, and their data."""
    root = tmp_path_factory.mktemp("run")
    assert train(1, root) == 0
    assert train(2, root, init_from=root / "stage1") == 0
    assert train(3, root, init_from=root / "stage2") == 0
    return root
