"""A workdir belongs to one config."""

import json

import jax.numpy as jnp
import pytest

from univg_jax.checkpoint import Checkpointer
from univg_jax.workdir import claim_workdir


def test_workdir_belongs_to_one_config(tmp_path):
    config = dict(
        seed=1,
        train=dict(steps=10),
        optim=dict(lr=0.1, freeze=()),
        tasks=dict(t2i=dict(sources=("a",))),
    )
    claim_workdir(tmp_path / "run", config)
    claim_workdir(tmp_path / "run", config)
    config["train"]["steps"] = 20  # a longer run is the same run
    claim_workdir(tmp_path / "run", config)
    before = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(before)["train"]["steps"] == 20
    config["optim"]["lr"] = 0.2
    del config["seed"]
    with pytest.raises(
        ValueError, match=r"optim\.lr is 0\.2, there 0\.1; seed is 'absent', there 1$"
    ):
        claim_workdir(tmp_path / "run", config)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_workdir_without_a_readable_config_is_not_claimed(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"a": jnp.ones(2)}}, {}, {})
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json"):
        claim_workdir(tmp_path, {"seed": 1})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        claim_workdir(tmp_path, {"seed": 1})
