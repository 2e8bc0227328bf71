"""A whole run of three stages of two steps each that tests share.

Files that use `root` are of the xdist group "pipeline", so that one worker makes it once.
"""

import pytest

from univg_jax import assembly, configs
from univg_jax.previews import make_preview

CONFIG = "experiments/emoji.py:preset=smoke,stage="
FAST = (
    "train.steps=2",
    "optim.warmup=1",
    "train.save_every=1",
    "train.eval_examples=8",
    "sampling.steps=2",
    "train.sample_examples=2",
)


def train(stage, root, *, init_from=""):
    """Trains one stage in its workdir."""
    config = configs.load(
        f"{CONFIG}{stage},init_from={init_from}", [f"data.dir={root / 'data'}", *FAST]
    )
    run = assembly.make_run(config, root / f"stage{stage}")
    run.train(preview=make_preview(run))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder with the workdirs stage1, stage2 and stage3, and their data."""
    root = tmp_path_factory.mktemp("run")
    train(1, root)
    train(2, root, init_from=root / "stage1")
    train(3, root, init_from=root / "stage2")
    return root
