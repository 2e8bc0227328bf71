"""`univg plan --goodput`."""

import json

import pytest

from univg_jax.cli.main import main
from univg_jax.planning.goodput import Times, best_every, expected

HOUR = 3600.0
TIMES = Times(
    step=0.5, other=0.05, blocked=4.0, save=60.0, restore=90.0, compile=150.0, restart=240.0
)
ROWS = [
    {"step": 10, "seconds/start": 4.0, "seconds/compile": 20.0, "seconds/step": 5.0},
    {"step": 20, "seconds/step": 5.0, "seconds/data": 1.0, "seconds/save": 2.0},
]
COMMAND = ["plan", "--config=experiments/stage1_t2i.py:size=xl,res=512", "--topology=v5e-256"]


def test_the_command_says_how_often_to_save(tmp_path, capsys):
    out = tmp_path / "plan.json"
    given = "--goodput=step=0.5,other=0.05,blocked=4,save=60,restore=90,compile=150,restart=240"
    assert main([*COMMAND, "--topology=v5p:16x16x36", given, f"--json={out}"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())["goodput"]
    assert [row["chips"] for row in found] == [256, 9216]
    for row in found:
        pod = dict(chips=row["chips"], mtbf=50_000 * HOUR)
        assert row["save_every"] == best_every(TIMES, **pod)
        assert row["goodput"] == expected(TIMES, **pod, every=row["save_every"])
        assert f"{row['save_every']:,}" in printed
        (own,) = row["of_config"]
        assert own["goodput"] == expected(TIMES, **pod, every=own["save_every"]) < row["goodput"]


def test_what_was_measured_is_taken_and_may_be_overridden(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "plan.json"
    given = [f"--goodput=measured={metrics},save=30,restart=300,step=0.25", "--mtbf=1000"]
    assert main([*COMMAND, *given, f"--json={out}"]) == 0
    (row,) = json.loads(out.read_text())["goodput"]
    assert row["times"] == dict(
        step=0.25, other=0.05, blocked=2.0, save=30.0, restore=4.0, compile=20.0, restart=300.0
    )
    assert row["seconds_between_failures"] == 1000 * HOUR / 256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--goodput=step=0.5", "--goodput has no save: it must be given"),
        ("--goodput=stp=0.5", "unknown key of --goodput: 'stp'; did you mean 'step'?"),
        ("--goodput=step=-1,save=1,restore=1,restart=1", "--goodput.step=-1: expected"),
        ("--goodput=0.5", "--goodput=0.5: expected NAME=VALUE"),
        ("--goodput=measured=nowhere", "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(given, message, capsys):
    assert main([*COMMAND, given]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_what_is_compiled_does_not_go_with_it(capsys):
    given = "--goodput=step=1,save=1,restore=1,restart=1"
    assert main([*COMMAND, given, "--max-batch"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "univg plan: error: --goodput compiles nothing: leave out --max-batch"
