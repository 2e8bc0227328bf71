"""A workdir in a bucket, on a real object store on this machine: what a run promises of a disk.

Real processes, as each reads once where the store is.
"""

import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from tests import object_store
from tests.faults import kill_loop
from tests.marks import nightly
from univg_jax.stored import read_item, saved_shapes
from univg_jax.workdir import CHECKPOINTS, list_steps

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("bucket")]

# Each program is given its folders. It waits less than a run would.
BEGIN = """
import sys
from univg_jax import files
files.RETRIES, files.MAX_DELAY = {retries}, 0.05
from etils import epath
from tests.faults.bit_flips import make_state
from univg_jax import checkpoint, lock, workdir
from univg_jax.errors import UserError
from univg_jax.settings import Train
from univg_jax.writers import JsonlWriter, read_metrics
run, local, back = sys.argv[1:]
"""
SAVE = """
workdir.probe(run)
config = {"seed": 1}
with lock.WorkdirLock(run), checkpoint.Checkpointer(run, Train(save_every=1, keep=2)) as saving:
    print(files.read_json(f"{run}/lock.json")["pid"], flush=True)
    writer = JsonlWriter(epath.Path(run) / "metrics.jsonl")
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 1 / step})
        writer.flush()
        saving.save(step, make_state(step), {"next": step}, config)
assert not epath.Path(f"{run}/lock.json").exists()
"""
READ = """
import jax, numpy as np
assert workdir.list_steps(run) == (2, 3)
assert [row["step"] for row in read_metrics(epath.Path(run) / "metrics.jsonl")] == [1, 2, 3]
assert checkpoint.copy(run, None, local) == checkpoint.copy(local, None, back) == 3
for folder in (run, local, back):
    for report in checkpoint.verify(folder):
        assert report.problems == report.additional == (), report
    restored = checkpoint.restore(folder, make_state(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.state, make_state(3)))
    assert restored.data_state == {"next": 3}
print("all is there")
"""
# A copy that was killed before it was whole is no step, and the next one replaces it.
AGAIN = """
step = epath.Path(back) / "checkpoints" / "3"
(step / checkpoint.COMMITTED).unlink()
assert workdir.list_steps(back) == ()
assert checkpoint.copy(local, None, back) == 3
assert workdir.list_steps(back) == (3,)
damaged = epath.Path(run) / "checkpoints" / "3" / "data" / "metadata"
files.write_whole(damaged, b"other")
(report, sound) = sorted(checkpoint.verify(run), key=lambda report: not report.problems)
assert report.problems == ("data/metadata is not what was written",), report
checkpoint.fall_back(run)
assert workdir.list_steps(run) == (2,)
print("and again")
"""
ON = """
try:
    with checkpoint.Checkpointer(run, Train(save_every=1, keep=None)) as saving:
        for step in range(1, 20):
            saving.check()
            saving.save(step, make_state(step), {"next": step}, {"seed": 1})
            saving.wait()
            print(step, flush=True)
except UserError as error:
    print(f"error: {error}")
"""


@pytest.fixture
def store():
    with object_store.running() as store:
        yield store


def run(store, *programs, folder, name="run", retries=8):
    """The lines that a program of these parts printed, and what it logged."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", BEGIN.format(retries=retries) + "".join(programs)),
            *(f"gs://{object_store.BUCKET}/{name}", str(folder / "local")),
            f"gs://{object_store.BUCKET}/{name}-back",
        ],
        env=os.environ | store.environment | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.nightly
def test_a_workdir_may_be_in_a_bucket(store, tmp_path):
    (_, *lines), log = run(store, SAVE, READ, AGAIN, folder=tmp_path)
    assert lines == ["all is there", "and again"]
    assert "sent again" not in log


def test_a_bucket_that_fails_now_and_then_costs_nothing_but_time(store, tmp_path):
    store.fails = lambda n, path: n % 9 == 0
    (_, *lines), log = run(store, SAVE, READ, folder=tmp_path)
    assert lines == ["all is there"]
    assert store.failures > 50
    assert "503 Service Unavailable: gs://bucket/run/" in log  # by gcsfs
    assert "/checkpoints: " in log  # by tensorstore
    assert "requests failed and were sent again" in log


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (503, "503 Service Unavailable"),
        *nightly((403, "Forbidden")),
    ],
)
def test_a_bucket_that_fails_for_good_ends_the_run_with_path_and_cause(
    store, tmp_path, status, says
):
    saved = []

    def fails(n, path):
        """All that is written after the second save."""
        saved.extend([path] if "checkpoints%2F3" in path or "checkpoints/3" in path else [])
        return bool(saved) and "upload" in path

    store.fails, store.status = fails, status
    lines, _ = run(store, ON, folder=tmp_path, retries=2)
    assert lines[:2] == ["1", "2"]
    (error,) = lines[2:]
    assert error.startswith("error: ")
    assert "gs://bucket/run/checkpoints" in error
    assert says in error
    store.fails = lambda n, path: False
    check = "print(workdir.list_steps(run), [r.problems for r in checkpoint.verify(run)])"
    assert run(store, check, folder=tmp_path)[0] == ["(1, 2) [(), ()]"]


@pytest.mark.nightly
def test_a_training_that_was_killed_goes_on_in_a_bucket(store, tmp_path):
    """With the parameters, the samples and the rows of one on a disk that nothing disturbed."""
    store.fails = lambda n, path: n % 50 == 0
    environment = os.environ | store.environment | {"PYTHONPATH": os.getcwd()}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

    def univg(*arguments, wait=True):
        process = subprocess.Popen(
            [sys.executable, "-m", "univg_jax", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not wait:
            return process
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output

    def train(workdir, **options):
        config = "--config=experiments/emoji.py:stage=1,preset=smoke"
        data = f"--config.data.dir={tmp_path / 'data'}"
        return univg("train", config, *kill_loop.CONFIG, data, f"--workdir={workdir}", **options)

    train(tmp_path / "disk")
    bucket = f"gs://{object_store.BUCKET}/run"
    stores, seen = store.fails, []

    def fails(n, path):
        """The process is killed while its second checkpoint is being written."""
        if not seen and "checkpoints%2F6%2F" in path:
            seen.append(path)
            process.kill()
        return stores(n, path)

    process = train(bucket, wait=False)
    store.fails = fails
    output, _ = process.communicate(timeout=600)
    assert process.returncode == -9, output
    output = train(bucket)
    assert "resumed gs://bucket/run at step 3" in output
    assert "sent again" in output
    listed = univg("checkpoint", "list", bucket)
    assert listed.count("sound") == len(list_steps(tmp_path / "disk"))
    univg("checkpoint", "verify", bucket)
    univg("checkpoint", "copy", bucket, f"--out={tmp_path / 'copy'}")
    (step,) = list_steps(tmp_path / "copy")
    folders = [epath.Path(tmp_path) / name / CHECKPOINTS / str(step) for name in ("disk", "copy")]
    for name in saved_shapes(folders[0], ""):
        ours, theirs = (kill_loop.read_array(folder, name) for folder in folders)
        assert ours.tobytes() == theirs.tobytes(), name
    assert read_item(folders[0], "data") == read_item(folders[1], "data")
    copied = fetch(store, "run", tmp_path / "files")
    assert kill_loop.rows(copied) == kill_loop.rows(tmp_path / "disk")
    assert kill_loop.shown(copied) == kill_loop.shown(tmp_path / "disk")
    pictures = [
        sorted(p.name for p in (run / "samples").rglob("*.png"))
        for run in (copied, tmp_path / "disk")
    ]
    assert pictures[0] == pictures[1] != []
    picture = tmp_path / "a.png"
    univg("sample", f"--checkpoint={bucket}", "--task=t2i", "--prompt=a fox", f"--out={picture}")
    assert picture.exists()


def fetch(store, name: str, folder: pathlib.Path) -> pathlib.Path:
    """The files of a folder of the bucket, on this disk."""
    from univg_jax.object_store import FileSystem

    store.fails = lambda n, path: False
    client = FileSystem(endpoint_url=store.url, token="anon", skip_instance_cache=True)
    root = f"{object_store.BUCKET}/{name}"
    for file in client.find(root):
        target = folder / file.removeprefix(f"{root}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(client.cat_file(file))
    return folder
