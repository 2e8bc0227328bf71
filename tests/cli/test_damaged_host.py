"""What goes wrong on one host alone ends all processes of a run, at once and in one line each.

Real processes through the command line, over TCP as on a pod.
"""

import shutil

import pytest

from data_pipelines.quarantine import read_quarantine
from tests.processes import run, running
from univg_jax.workdir import list_steps

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("multiprocess")]

CONFIG = [
    "--config=experiments/emoji.py:preset=smoke,stage=1",
    "--config.model.overrides.depth=1",
    "--config.train.steps=1000",
    "--config.train.eval_examples=0",
    "--config.train.sample_examples=0",
    "--config.train.save_every=1000",
]


def lines_of(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("univg train: error: ")]


def damage(folder, first: float, last: float) -> None:
    """Overwrites a part of every training shard, but not the headers of its blocks of 64 KiB."""
    for shard in folder.rglob("*train.array_record*"):
        data = bytearray(shard.read_bytes())
        start, end = int(first * len(data)), int(last * len(data))
        for place in range(start, end):
            if place % 2**16 >= 64:
                data[place] = 0
        shard.write_bytes(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged_host")
    flags = [f"--config.data.dir={root / 'sound'}", f"--workdir={root / 'first'}"]
    run([1], "train", *CONFIG, *flags, "--config.train.steps=1")
    return root


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_damage_on_one_host_ends_all_with_one_line_each(data, when):
    folder, workdir = data / when, data / f"run {when}"
    shutil.copytree(data / "sound", folder)
    damage(folder, *((0.0, 0.97) if when == "at the start" else (0.1, 0.4)))
    command = ["train", *CONFIG, f"--config.data.dir={folder}", f"--workdir={workdir}"]
    sound = f"--config.data.dir={data / 'sound'}"
    with running([1, 1], *command, first=[sound]) as processes:
        codes = [process.popen.wait(timeout=200) for process in processes]
        logs = [process.log.read_text() for process in processes]
    assert codes == [1, 1], "\n".join(logs)
    assert [len(lines_of(log)) for log in logs] == [1, 1], logs
    (others,), (own,) = (lines_of(log) for log in logs)
    assert "Traceback" not in "".join(logs)
    if when == "later":
        assert "scenes/train" in own
    assert "process 1 of 2 cannot go on" in others
    assert not workdir.exists() or not list_steps(workdir)
    if when == "later":
        rows = read_quarantine(workdir)
        assert {row["dataset"] for row in rows} == {"scenes/train"}
        assert all("array_record" in row["shard"] for row in rows)
        assert len({row["index"] for row in rows}) == len(rows)


@pytest.mark.parametrize("what", ["a build", "an encoder"])
def test_what_the_first_process_does_for_all_fails_on_all(data, what):
    """Others do not wait for a dataset or an encoder that never comes."""
    workdir, command = data / f"no {what}", ["train", *CONFIG]
    if what == "an encoder":
        workdir.mkdir()
        (workdir / "encoders").write_text("no folder")
    sound = f"--config.data.dir={data / 'sound'}"
    first = [f"--config.data.dir={data / 'first' / 'config.json' / 'data'}"]
    flags = [*command, sound, f"--workdir={workdir}"]
    with running([1, 1], *flags, first=first if what == "a build" else []) as processes:
        codes = [process.popen.wait(timeout=200) for process in processes]
        logs = [process.log.read_text() for process in processes]
    assert codes == [1, 1], "\n".join(logs)
    assert [len(lines_of(log)) for log in logs] == [1, 1], logs
    (own,), (others,) = (lines_of(log) for log in logs)
    assert "Traceback" not in "".join(logs)
    assert others.endswith(f"process 0 of 2 cannot go on: {own.partition('error: ')[2]}")
