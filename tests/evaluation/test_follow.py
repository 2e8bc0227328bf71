"""A follower evaluates each checkpoint once, whatever ends it, the training or a checkpoint."""

import dataclasses
import json
import types

import pytest
from etils import epath

from tests import helpers, processes
from tests.test_writers import shown_events
from univg_jax import checksums
from univg_jax.errors import UserError
from univg_jax.evaluation import follow as module
from univg_jax.evaluation.results import Done
from univg_jax.lock import WorkdirLock
from univg_jax.retention import evaluations, read_evaluations


@dataclasses.dataclass(frozen=True)
class Model:
    """In place of a pipeline: it knows its step."""

    step: int
    params: object = "params"

    def at(self, path):
        return load(path)


def load(path):
    if not (path / checksums.FILE).exists():
        raise UserError("no sound checkpoint")
    return Model(int(path.name))


def save(workdir, *steps, finished=False):
    """Checkpoints, of a run that is then at its end or not."""
    for step in steps:
        folder = workdir / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / checksums.FILE).write_text("{}")
    config = helpers.tiny_config().to_dict()
    config["train"]["steps"] = max(steps)
    (workdir / "config.json").write_text(json.dumps(config))
    if finished:
        (workdir / "summary.json").write_text(json.dumps({"steps": max(steps)}))


def remove(workdir, step):
    (workdir / "checkpoints" / str(step) / checksums.FILE).unlink()
    (workdir / "checkpoints" / str(step)).rmdir()


class Follower:
    """What follows a workdir, and what it does."""

    def __init__(self, workdir, *, job=None, load=load, settings=None):
        self.said, self.evaluated, self.shown = [], [], []

        def count(model):
            self.evaluated.append(model.step)
            if job:
                job(model.step)
            numbers = {"overall": model.step / 10, "counting": float("nan")}
            return Done(folder="out", text="", numbers=numbers, primary="overall")

        self.run = lambda: module.follow(
            epath.Path(workdir),
            "geneval",
            load=load,
            job=count,
            settings={"limit": 8} if settings is None else settings,
            say=self.said.append,
            show=lambda step, done: self.shown.append(step),
        )


def rows(workdir):
    return read_evaluations(evaluations(workdir, "geneval"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.01)


def test_each_checkpoint_once_and_its_numbers(tmp_path):
    save(tmp_path, 2, 4, finished=True)
    (tmp_path / "checkpoints" / "6").mkdir()  # what has no checksums is not finished
    (tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    first = Follower(tmp_path)
    first.run()
    assert (first.evaluated, first.shown) == ([2, 4], [2, 4])
    assert [(row["step"], row["numbers"]) for row in rows(tmp_path)] == [
        (2, {"overall": 0.2, "counting": None}),
        (4, {"overall": 0.4, "counting": None}),
    ]
    again = Follower(tmp_path)
    again.run()
    assert again.evaluated == []
    assert "the training is finished" in again.said[-1]
    assert len(evaluations(tmp_path, "geneval").read_text().splitlines()) == 2
    folder = tmp_path / "tensorboard" / "geneval"
    assert [file for file in folder.iterdir() if "tfevents" not in file.name] == []
    assert sorted(event[:2] for event in shown_events(folder)) == [
        (2, "geneval/overall"),
        (4, "geneval/overall"),
    ]


def test_it_waits_for_the_run_and_then_for_its_checkpoints(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    changes = iter(
        [
            lambda: save(workdir, 2),
            lambda: save(workdir, 4),
            lambda: None,
            lambda: (workdir / "summary.json").write_text('{"steps": 4}'),
        ]
    )
    monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda _: next(changes)()))
    module.wait_for_run(workdir, say=(said := []).append)
    follower = Follower(workdir)
    follower.run()
    assert follower.evaluated == [2, 4]
    assert [*said, *follower.said] == [
        f"waiting for the first checkpoint in {workdir}, which does not exist yet",
        f"waiting for one after step 2 in {workdir}",
        f"waiting for one after step 4 in {workdir}",
        f"{workdir}: the training is finished, and its checkpoints are evaluated",
    ]


def test_a_kill_costs_the_evaluation_that_it_interrupts(tmp_path):
    save(tmp_path, 2, 4, 6, finished=True)

    def kill(step):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Follower(tmp_path, job=kill).run()
    assert [row["step"] for row in rows(tmp_path)] == [2]
    with evaluations(tmp_path, "geneval").open("a") as file:
        file.write('{"step": 4, "num')  # it was killed while it wrote
    again = Follower(tmp_path)
    again.run()
    assert again.evaluated == [4, 6]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6]


def test_a_checkpoint_that_training_removes_is_left_out(tmp_path):
    save(tmp_path, 2, 4, 6, finished=True)

    def slow(path):
        if path.name == "2":
            remove(tmp_path, 2)
        return load(path)

    follower = Follower(tmp_path, load=slow, job=lambda step: step == 4 and remove(tmp_path, 4))
    follower.run()
    assert follower.evaluated == [4, 6]  # once it is loaded, it may go
    assert follower.said[0] == "step 2 was removed before it could be read: it is left out"
    assert [row["step"] for row in rows(tmp_path)] == [4, 6]


def test_what_fails_is_one_line_and_is_tried_again_only_by_another_follower(tmp_path):
    save(tmp_path, 2, 4, finished=True)

    def fail(step):
        if step == 2:
            raise UserError("no answer from the judge")

    first = Follower(tmp_path, job=fail)
    with pytest.raises(UserError, match="the evaluation of steps 2 failed; the same command"):
        first.run()
    assert first.evaluated == [2, 4]
    assert first.said == ["step 2 could not be evaluated: no answer from the judge"]
    assert rows(tmp_path)[0]["error"] == "no answer from the judge"
    again = Follower(tmp_path)
    again.run()
    assert again.evaluated == [2]
    assert [sorted(row["numbers"]) for row in rows(tmp_path)] == [["counting", "overall"]] * 2


def test_a_checkpoint_that_is_damaged_fails_alone(tmp_path):
    save(tmp_path, 2, 4, finished=True)

    def damaged(path):
        if path.name == "2":
            raise UserError("step 2 is damaged")
        return load(path)

    follower = Follower(tmp_path, load=damaged)
    with pytest.raises(UserError, match="of steps 2 failed"):
        follower.run()
    assert follower.evaluated == [4]
    assert follower.said == ["step 2 could not be evaluated: step 2 is damaged"]


def test_a_bug_keeps_its_traceback(tmp_path):
    save(tmp_path, 2, finished=True)

    def bug(step):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        Follower(tmp_path, job=bug).run()
    assert not rows(tmp_path)


def test_rows_of_other_settings_do_not_mix(tmp_path):
    save(tmp_path, 2, finished=True)
    Follower(tmp_path).run()
    other = Follower(tmp_path, settings={"limit": 16})
    with pytest.raises(UserError, match=r"other settings.*limit is 16, there 8.*: repeat"):
        other.run()
    assert other.evaluated == []


def test_one_follower_at_a_time(tmp_path, monkeypatch):
    save(tmp_path, 2, finished=True)
    with WorkdirLock(tmp_path / "tensorboard" / "geneval"):
        monkeypatch.setattr(WorkdirLock, "_is_ours", lambda self, found: False)
        with pytest.raises(UserError, match="geneval is in use by process"):
            Follower(tmp_path).run()


def test_a_follower_that_was_replaced_writes_no_row(tmp_path):
    save(tmp_path, 2, 4, finished=True)
    lock = tmp_path / "tensorboard" / "geneval" / "lock.json"
    other = dict(machine="another", pid=7, host="b", start="1", since="then", token="t")

    def job(step):
        if step == 4:
            lock.write_text(json.dumps(other))

    with pytest.raises(UserError, match=r"geneval was taken over by process 7 on b"):
        Follower(tmp_path, job=job).run()
    assert [row["step"] for row in rows(tmp_path)] == [2]
    assert json.loads(lock.read_text()) == other


SEVERAL = """
import sys
from tests import processes
processes.join()
import pathlib
import jax
from tests.evaluation.test_follow import Follower
from univg_jax.evaluation import follow

follow.POLL = 0.01
if jax.process_index() == 1:  # its disk is late
    follow.finished_steps = lambda workdir: ()
follower = Follower(pathlib.Path(sys.argv[1]))
follower.run()
print("evaluated", *follower.evaluated)
"""


def test_several_processes_evaluate_the_same_steps_in_the_same_order(tmp_path):
    save(tmp_path, 2, 4, 6, finished=True)
    for lines in processes.run([1, 1], str(tmp_path), program=("-c", SEVERAL)):
        assert "evaluated 2 4 6" in lines
    lines = evaluations(tmp_path, "geneval").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
