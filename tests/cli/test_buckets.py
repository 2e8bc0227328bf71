"""`univg train` on pictures of several shapes, in buckets, stopped and continued."""

import json

import numpy as np
import pytest

from data_pipelines.build import write_dataset
from univg_jax.cli.main import main
from univg_jax.images import png_bytes
from univg_jax.writers import read_metrics

SHAPES = [(64, 32), (40, 30), (33, 66), (28, 60)]


def pictures(count: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    noise = [rng.integers(0, 256, (*SHAPES[k % 4], 3), dtype=np.uint8) for k in range(count)]
    return [dict(image=png_bytes(image), caption=f"picture {k}") for k, image in enumerate(noise)]


@pytest.mark.slow
def test_a_run_in_buckets_is_stopped_and_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    splits = dict(train=pictures(24, 0), validation=pictures(8, 1))
    write_dataset(tmp_path / "data" / "mine", splits)
    command = [
        "train",
        "--config=experiments/emoji.py:stage=1,preset=smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.dataset=own",
        f"--config.data.dir={tmp_path / 'data'}",
        "--config.tasks.t2i.sources=mine",
        "--config.data.buckets=((48,24),(24,48))",
        "--config.conditioning.fit_on={}",
        "--config.model.overrides.depth=1",
        "--config.optim.warmup=1",
        "--config.train.sample_examples=0",
        "--config.train.log_every=1",
        "--config.train.save_every=2",
    ]
    assert main([*command, "--config.train.steps=2"]) == 0
    assert main([*command, "--config.train.steps=4"]) == 0
    assert "48x24    50.00%          12 records ####" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    state = json.loads((tmp_path / "run/checkpoints/4/data/metadata").read_text())
    assert [bucket["shape"] for bucket in state["mixture"]["buckets"]] == [[48, 24], [24, 48]]
    assert state["next"] == 4 * 16
