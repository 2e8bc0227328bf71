"""Which steps a trace is of; tests/training/test_loop.py has the trace itself."""

import jax
import jax.numpy as jnp
import pytest

from univg_jax.training.profiling import Trace, parse_steps


@pytest.mark.parametrize(
    ("text", "steps"), [("0:1", range(1)), ("10:15", range(10, 15)), ("99:100", range(99, 100))]
)
def test_steps(text, steps):
    assert parse_steps(text, total=100) == steps


@pytest.mark.parametrize(
    "text", ["", "5", ":", "5:", ":5", "5:5", "6:5", "-1:5", "1.5:3", "1:2:3", "a:b", "99:101"]
)
def test_nonsense(text):
    with pytest.raises(
        ValueError, match=rf"--profile={text}: expected START:STOP with 0 <= START < STOP <= 100"
    ):
        parse_steps(text, total=100)


def traced(trace, steps):
    with trace:
        for step in steps:
            if trace.is_due(step):
                trace.toggle()
            jax.block_until_ready(jnp.sin(jnp.ones(8)))


@pytest.mark.parametrize(
    ("asked", "run", "written"),
    [
        (range(2, 4), range(6), 1),
        (range(2, 4), range(3, 6), 1),  # resumed in the middle
        (range(2, 4), range(3), 1),  # failed in the middle
        (range(2, 4), range(4, 6), 0),  # resumed behind it
        (None, range(6), 0),
    ],
)
def test_a_run_that_has_steps_of_the_trace_writes_it_once(tmp_path, asked, run, written):
    traced(Trace(tmp_path / "profile", steps=asked), run)
    files = list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    assert len(files) == written
    assert all(file.stat().st_size for file in files)
