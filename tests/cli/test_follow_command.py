"""`univg evaluate --follow` beside a real training: both are processes of their own."""

import collections
import json
import os
import signal
import types

import pytest

from tests.processes import running, wait_for
from tests.test_writers import shown_events
from univg_jax.cli.main import main
from univg_jax.evaluation import follow
from univg_jax.retention import evaluations, read_evaluations
from univg_jax.workdir import finished_steps

STEPS, KEEP = 6, 2
TRAIN = (
    "train",
    "--config=experiments/emoji.py:preset=smoke,stage=2",
    *(f"--config.tasks.{name}.weight=0" for name in ("t2i", "ie", "ip", "lg", "pose", "seg")),
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=1",
    f"--config.train.keep={KEEP}",
    "--config.train.best=emoji_scenes/depth/abs_rel:min",
    # All checkpoints are equally good, so the first one is the best.
    "--config.optim.lr=0",
    "--config.train.eval_examples=0",
    "--config.train.sample_examples=0",
    "--config.model.overrides.depth=1",
)
FOLLOW = ("evaluate", "--benchmark=emoji_scenes", "--tasks=depth", "--follow", "--raw_params")
FOLLOW += ("--examples=2", "--batch_size=8", "--steps=1")


@pytest.mark.slow
def test_a_follower_beside_a_training_is_killed_and_goes_on(tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    log = evaluations(workdir, "emoji_scenes")
    follower = (*FOLLOW, f"--checkpoint={workdir}", f"--out={out}")
    trainer = (*TRAIN, f"--workdir={workdir}", f"--config.data.dir={tmp_path / 'data'}")
    with running([1], *follower) as (first,):
        with running([1], *trainer) as (training,):
            # Its steps are faster than their evaluation. It is held until two are evaluated: then
            # the newest two, and two that wait, are all of the others.
            wait_for([first, training], lambda: 2 in finished_steps(workdir))
            training.popen.send_signal(signal.SIGSTOP)
            assert max(finished_steps(workdir)) <= 2 * KEEP
            wait_for([first, training], lambda: read_evaluations(log))
            first.popen.kill()
            with running([1], *follower) as (second,):
                wait_for([second, training], lambda: len(read_evaluations(log)) > 1)
                training.popen.send_signal(signal.SIGCONT)
                assert training.wait() == 0, training.log.read_text()
                assert second.wait() == 0, second.log.read_text()
                said = second.log.read_text()
        first.popen.wait()
        assert f"waiting for the first checkpoint in {workdir}, which does" in first.log.read_text()
    assert f"{workdir}: the training is finished, and its checkpoints are evaluated" in said
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert len({row["numbers"]["depth/abs_rel"] for row in rows}) == 1
    kept = finished_steps(workdir)
    assert {1, *range(STEPS - KEEP + 1, STEPS + 1)} <= set(kept)
    assert 2 not in kept
    folder = workdir / "tensorboard" / "emoji_scenes"
    shown = collections.Counter(event[:2] for event in shown_events(folder))
    for step in range(1, STEPS + 1):
        assert shown[step, "emoji_scenes/depth/abs_rel"] == 1
    assert set(shown.values()) == {1}
    page = (out / "report.html").read_text()
    assert "depth/abs_rel over step" in page


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM")]
)
def test_a_signal_ends_it_in_one_line(tmp_path, monkeypatch, capsys, number, line):
    sleep = types.SimpleNamespace(sleep=lambda seconds: os.kill(os.getpid(), number))
    monkeypatch.setattr(follow, "time", sleep)
    command = [*FOLLOW, f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 128 + number
    printed = capsys.readouterr()
    assert printed.err == f"univg evaluate: {line}\n"
    assert len(printed.out.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is written before there is a run"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sweep=steps=1,2"], "--follow takes no --sweep"),
        (["--generate_only"], "--follow takes no --generate_only"),
        (["--score_only"], "--follow takes no --score_only"),
        (["--checkpoint=run/checkpoints/4"], "--follow takes a workdir"),
        (["--benchmark=geneval"], "--data is missing"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_it_waits(tmp_path, capsys, more, message):
    command = [*FOLLOW, f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", *more]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_benchmark_that_does_not_exist_is_not_waited_for(tmp_path, capsys):
    command = ["train", "--config=experiments/emoji.py:preset=smoke", f"--workdir={tmp_path}"]
    assert main([*command, "--config.train.best=genval/overall"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown benchmark in train.best: 'genval'; did you mean 'geneval'?" in line
