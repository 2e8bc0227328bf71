"""A workdir belongs to one config."""

import json
import shutil

import jax.numpy as jnp
import pytest

from tests import processes
from univg_jax import workdir
from univg_jax.checkpoint import Checkpointer
from univg_jax.errors import UserError
from univg_jax.settings import Config
from univg_jax.training import optim


def config(**sections):
    """A config of a cosine run of ten steps, with some values that differ."""
    optim = dict(schedule="cosine", warmup=2, lr=0.1) | sections.pop("optim", {})
    train = dict(steps=10) | sections.pop("train", {})
    return Config.of(dict(seed=1, optim=optim, train=train) | sections)


def begin(folder, config, *, steps=()):
    """A run as it begins, or goes on: its config; then it has saved some steps."""
    config = workdir.resume(folder, config)
    workdir.claim_workdir(folder, config)
    with Checkpointer(folder) as checkpointer:
        for step in steps:
            checkpointer.save(step, {"params": {"a": jnp.ones(2)}}, {}, config.to_dict())
    return config


def test_a_probe_leaves_nothing_and_names_what_cannot_be_written(tmp_path):
    workdir.probe(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/\.probe\.\d+\.0 cannot be written: "):
        workdir.probe(tmp_path / "file")


PROBE = """
import sys
from tests.processes import join
join()
import jax
from univg_jax.errors import UserError
from univg_jax.workdir import probe
probe(sys.argv[1])
try:
    probe(f"{sys.argv[1]}/{jax.process_index()}", patience=1)
except UserError as error:
    print(error)
"""


@pytest.mark.xdist_group("multiprocess")
def test_processes_that_do_not_share_a_workdir_are_told_so(tmp_path):
    for index, lines in enumerate(processes.run([1, 1], str(tmp_path), program=("-c", PROBE))):
        said = f"is not shared: process {index} does not see what process {1 - index} writes"
        assert any(said in line for line in lines)
    assert all(not list((tmp_path / str(index)).iterdir()) for index in range(2))


def test_workdir_belongs_to_one_config(tmp_path):
    begin(tmp_path, config())
    begin(tmp_path, config(train=dict(steps=20)))  # a longer run is the same run
    before = (tmp_path / "config.json").read_text()
    assert json.loads(before)["train"]["steps"] == 20
    other = config(optim=dict(lr=0.2), seed=3)
    for claim in (workdir.resume, workdir.claim_workdir):
        with pytest.raises(UserError, match=r"optim\.lr is 0\.2, there 0\.1; seed is 3, there 1;"):
            claim(tmp_path, other)
    assert (tmp_path / "config.json").read_text() == before


def test_another_config_goes_on_where_that_is_declared(tmp_path):
    begin(tmp_path, config(), steps=[2])
    other = config(optim=dict(lr=0.2), seed=3)
    with pytest.raises(UserError, match=r"same: --allow_config_change=optim\.lr,seed$"):
        workdir.resume(tmp_path, other, allow=["seed"])
    for allow in (["optim", "seed"], ["optim.lr", "seed", "tasks"]):
        assert workdir.resume(tmp_path, other, allow=allow).seed == 3
    assert workdir.changes(tmp_path, other) == {
        "optim.lr": "optim.lr is 0.2, there 0.1",
        "seed": "seed is 3, there 1",
    }
    workdir.claim_workdir(tmp_path, other, allow=["optim", "seed"])
    assert workdir.resume(tmp_path, other).seed == 3, "from now on it is the run's own"
    with pytest.raises(UserError, match=r"no key 'optim\.lrr'; did you mean 'optim\.lr'"):
        workdir.resume(tmp_path, other, allow=["optim.lrr"])


def test_what_a_checkpoint_has_cannot_be_declared(tmp_path):
    begin(tmp_path, config(), steps=[2])
    other = config(model=dict(size="l"), seed=3)
    with pytest.raises(UserError, match=r"model\.size is 'l', there 'xl'; begin another run"):
        workdir.resume(tmp_path, other, allow=["model", "seed"])


def test_what_a_check_finds_writes_nothing(tmp_path):
    workdir.resume(tmp_path / "new", config())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("steps", [5, 20])
def test_the_end_of_the_cosine_does_not_move_with_the_last_step(tmp_path, steps, caplog):
    begun = begin(tmp_path, config())
    later = begin(tmp_path, config(train=dict(steps=steps)))
    rates = [
        [float(optim.make_schedule(c.optim, total_steps=c.train.steps)(t)) for t in range(25)]
        for c in (begun, later)
    ]
    assert rates[0] == rates[1]
    assert rates[0][10:] == [0.0] * 15
    assert ("the rate is zero from there to 20" in caplog.text) == (steps == 20)


def test_the_end_of_the_cosine_may_not_be_moved(tmp_path):
    begin(tmp_path, config())
    with pytest.raises(UserError, match=r"optim\.decay_steps is 20, there 10;"):
        workdir.resume(tmp_path, config(train=dict(steps=20), optim=dict(decay_steps=20)))
    with pytest.raises(UserError, match=r"optim\.decay_steps is 20, there 10;"):
        workdir.claim_workdir(tmp_path, config(train=dict(steps=20)))


def test_an_older_run_has_the_end_and_the_averages_that_it_had(tmp_path):
    """Configs from before these keys: the cosine ended at train.steps, and every average warmed."""
    stored = config(init_from=dict(path="gone", new=["face"])).to_dict()
    del stored["optim"]["decay_steps"], stored["optim"]["ema_fresh"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    later = begin(tmp_path, config(train=dict(steps=20), init_from=stored["init_from"]))
    assert (later.optim.decay_steps, later.optim.ema_fresh) == (10, (".*",))


def test_a_run_that_ends_within_its_warm_up_may_go_on_to_any_end(tmp_path):
    tried = begin(tmp_path, config(train=dict(steps=1)))
    assert tried.optim.decay_steps is None
    assert begin(tmp_path, config(train=dict(steps=30))).optim.decay_steps == 30
    with pytest.raises(UserError, match=r"decay_steps=2: expected more than optim\.warmup=2"):
        config(optim=dict(decay_steps=2))


def test_a_fork_keeps_the_end_of_the_run_that_it_continues(tmp_path):
    begin(tmp_path / "run", config(), steps=(4,))
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "4"):
        fork = config(train=dict(steps=20), init_from=dict(path=str(path), which="state"))
        assert workdir.resume(tmp_path / "fork", fork).optim.decay_steps == 10


def test_the_parent_may_change_once_there_are_checkpoints(tmp_path):
    first = config(init_from=dict(path="there", new=["face"]))
    begin(tmp_path, first)
    with pytest.raises(UserError, match=r"init_from\.new .*; init_from\.path is '', there 'there'"):
        begin(tmp_path, config())
    begin(tmp_path, first, steps=(4,))
    assert begin(tmp_path, config()).optim.ema_fresh == ("face",)


def test_a_run_past_its_last_step_is_refused_and_stays_as_it_is(tmp_path):
    begin(tmp_path, config(), steps=(4, 8))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"is at step 8, past train\.steps=6"):
        workdir.resume(tmp_path, config(train=dict(steps=6)))
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_lost_config_is_that_of_the_newest_checkpoint(tmp_path, content, caplog):
    begin(tmp_path, config(), steps=(2, 4))
    file = tmp_path / "config.json"
    before = file.read_text()
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match="belongs to another config: seed is 3, there 1"):
        begin(tmp_path, config(seed=3))
    begin(tmp_path, config())
    assert file.read_text() == before
    assert "config.json" in caplog.text
    assert "written again from checkpoint 4" in caplog.text


@pytest.mark.parametrize("content", ['{"optim": 3}', '{"optim": {"lrr": 1}}', '{"opt": {}}'])
def test_a_config_that_is_none_of_ours_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: .*opt"):
        workdir.resume(tmp_path, config())


def test_a_torn_config_without_checkpoints_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON.*use another workdir"):
        workdir.resume(tmp_path, config())


def test_what_is_no_checkpoint_is_ignored_by_name(tmp_path, caplog):
    begin(tmp_path, config(), steps=(2, 4))
    root = tmp_path / "checkpoints"
    (root / ".DS_Store").write_text("x")
    shutil.copytree(root / "4", root / "4 copy")
    shutil.copytree(root / "2", root / "2.bak")
    shutil.copytree(root / "2", root / "07")
    (root / "6").write_text("a file")
    (root / "9").mkdir()  # no commit
    assert workdir.newest_step(tmp_path) == 4
    begin(tmp_path, config(), steps=(6,))
    assert "no checkpoint, ignored: .DS_Store; 07; 2.bak; 4 copy" in caplog.text
    assert (root / "6.damaged").read_text() == "a file"
    assert workdir.newest_step(tmp_path) == 6
