"""A bar in a terminal; elsewhere a line a minute, whatever calls a bar to be drawn."""

import ast
import io
import os
import pathlib
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax import progress
from univg_jax.progress import LINE_SECONDS, Bar

ROOT = pathlib.Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets; tqdm's clock."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_terminal_has_a_bar_that_is_drawn_anew(clock):
    terminal = Terminal()
    for _ in Bar(range(5), "work", file=terminal, ncols=60):
        clock[0] += 1
    drawn = terminal.getvalue().split("\r")
    assert len(drawn) >= 5
    assert "100%|" in drawn[-1]


def test_a_terminal_without_a_size_has_a_bar_too():
    """A pseudo-terminal says 0 x 0 until somebody sets it."""
    program = "from univg_jax.progress import Bar; list(Bar(range(3), 'work'))"
    ours, theirs = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    subprocess.run([sys.executable, "-c", program], check=True, stderr=theirs, env=environment)
    os.close(theirs)
    assert b"work: 100%|" in os.read(ours, 10_000)
    os.close(ours)


@given(st.lists(st.floats(0, 200), min_size=1, max_size=60))
def test_elsewhere_a_line_a_minute_and_one_at_the_end(waits):
    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr("tqdm.std.time", lambda: now[0])
        log, times = io.StringIO(), []
        write = log.write
        log.write = lambda text: (times.append(now[0]), write(text))
        with Bar(total=len(waits), desc="work", file=log) as bar:
            for wait in waits:
                now[0] += wait
                bar.set_description("work")  # draws, too
                bar.update()
                bar.set_postfix(loss="1.0")
    text = log.getvalue()
    assert "\r" not in text
    assert all(re.match(r"work: .*\d+/\d+ \[.*\]$", line) for line in text.splitlines())
    *minutes, end = times
    assert end == now[0]
    gaps = [b - a for a, b in zip([0.0, *minutes], minutes, strict=False)]
    assert all(gap >= LINE_SECONDS for gap in gaps)
    # Nothing that takes so long goes unsaid.
    assert len(minutes) >= sum(wait >= 2 * LINE_SECONDS for wait in waits)


@pytest.mark.parametrize("length", [1, 3, 10_000])
def test_a_quick_loop_leaves_one_line(clock, length):
    log = io.StringIO()
    list(Bar(range(length), "work", file=log))
    (line,) = log.getvalue().splitlines()
    assert f"{length}/{length}" in line
    assert "|" not in line


def test_what_should_leave_nothing_leaves_nothing(clock):
    log = io.StringIO()
    list(Bar(range(3), "work", file=log, leave=False))
    with Bar(total=3, file=log, disable=True) as bar:
        bar.update()
    assert log.getvalue() == ""


def test_a_line_finds_room_beside_a_bar(clock):
    terminal = Terminal()
    with Bar(total=3, desc="work", file=terminal, ncols=40):
        progress.make_room()
        assert terminal.getvalue().endswith(" \r")
    log = io.StringIO()
    with Bar(total=3, desc="work", file=log):
        progress.make_room()
        assert log.getvalue() == ""


def test_all_bars_of_the_project_are_these():
    for folder in ("univg_jax", "data_pipelines", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "tqdm":
                    assert path.name == "progress.py", path
