"""The cache of compiled programs: on by default, read by the next process, same numbers."""

import os
import re
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from univg_jax import checkpoint, runtime
from univg_jax.writers import read_metrics

TURN_ON = "import jax; from univg_jax import runtime; runtime.enable_cache()\n"
TURN_ON += "print(jax.config.jax_compilation_cache_dir)"


def run(*arguments, home, **environment):
    """Runs Python with another home and no cache of the environment's."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | environment
    return subprocess.run(
        [sys.executable, *arguments],
        env=env | {"HOME": str(home)},
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_next_process_finds_what_the_first_compiled_and_trains_to_the_same_numbers(tmp_path):
    cache = tmp_path / "home" / ".cache" / "univg_jax" / "xla"

    def train(name):
        """The hits and misses of a run."""
        settings = {
            "data.dir": tmp_path / "data",
            "train.steps": 2,
            "train.eval_examples": 8,
            "train.sample_examples": 2,
            "optim.warmup": 1,
            "sampling.steps": 2,
        }
        # Compiled without optimization, as in all tests, some programs are quicker than the
        # threshold.
        stderr = run(
            *("-m", "univg_jax", "train", "--config=experiments/emoji.py:preset=smoke,stage=1"),
            f"--workdir={tmp_path / name}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
            home=tmp_path / "home",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        ).stderr
        ((folder, hits, misses),) = re.findall(
            r"INFO.*compilation cache (\S+): (\d+) hits, (\d+) misses", stderr
        )
        assert folder == str(cache)
        return int(hits), int(misses)

    _, misses = train("first")
    programs = {path.name.split("-")[0] for path in cache.iterdir()}
    assert {"jit_init", "jit_update", "jit_validate", "jit_generate"} <= programs
    assert misses >= 4
    hits, misses = train("second")
    assert hits >= 4
    assert misses == 0
    first, second = (
        read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("first", "second")
    )
    for name in ("loss", "grad_norm", "param_norm", "val/loss/t2i"):
        assert first[name] == second[name], name
    for which in ("params", "ema", "opt_state"):
        first, second = (
            checkpoint.load_params(tmp_path / name, which=which) for name in ("first", "second")
        )
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


def test_the_environment_names_another_folder_or_none(tmp_path):
    for folder in (str(tmp_path / "elsewhere"), ""):
        done = run("-c", TURN_ON, home=tmp_path, JAX_COMPILATION_CACHE_DIR=folder)
        assert done.stdout.strip() == folder
    assert not (tmp_path / ".cache").exists()


def test_a_home_that_cannot_be_written_is_a_warning(tmp_path):
    home = tmp_path / "file"
    home.write_text("")
    done = run("-c", TURN_ON, home=home)
    assert done.stdout.strip() == ""
    assert "no compilation cache" in done.stderr


def test_tests_have_a_cache_of_their_own():
    runtime.enable_cache()
    assert jax.config.jax_compilation_cache_dir.startswith(tempfile.gettempdir())
