"""Two processes of four devices are one run.

Samples, numbers, checkpoints and files are those of one process with eight devices, or one. Real
processes through the command line, over TCP as on a pod; only the devices are virtual.
"""

import json
import pathlib
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.collate import Collator
from data_pipelines.mixture import Stream
from tests.marks import nightly
from tests.processes import run, running, wait_for
from univg_jax import Pipeline, assembly, checkpoint, configs
from univg_jax.batch import BatchShape
from univg_jax.cli.main import main
from univg_jax.workdir import list_steps
from univg_jax.writers import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("multiprocess")]

# one, no and another person's condition; all with two passes of guidance
TASKS = ("t2i", "ip", "id")
CONFIG = [
    "--config=experiments/emoji.py:preset=smoke,stage=3",
    *(f"--config.tasks.{name}.weight=0" for name in ("ie", "lg", "depth", "pose", "seg")),
    "--config.model.overrides.depth=1",
    # narrower weights are too small to be split over fsdp
    "--config.model.overrides.hidden_dim=128",
    "--config.train.steps=4",
    "--config.optim.warmup=1",
    "--config.train.log_every=1",
    "--config.train.save_every=2",
    "--config.train.eval_examples=8",
    "--config.train.sample_examples=2",
    "--config.sampling.steps=2",
]
SPLIT = ["--config.mesh.data=2", "--config.mesh.fsdp=4"]


def train(workdir, *more):
    return (
        "train",
        *CONFIG,
        f"--config.data.dir={workdir.parent / 'data'}",
        f"--workdir={workdir}",
        *more,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Workdirs of one run of 4 steps on one device, on eight, and on two processes of four.

    `two` was killed after its step 2 was saved, and resumed.
    """
    root = tmp_path_factory.mktemp("multiprocess")
    run([1], *train(root / "one"))
    assert main([*train(root / "eight", *SPLIT)]) == 0

    with running([4, 4], *train(root / "two", *SPLIT)) as processes:
        wait_for(processes, (root / "two" / "checkpoints" / "2").exists)
        processes[0].popen.send_signal(signal.SIGKILL)
        assert processes[1].wait() != 0, "without its coordinator a process must not end well"
    assert list_steps(root / "two") == (2,)
    run([4, 4], *train(root / "two", *SPLIT))
    return root


@pytest.fixture(scope="module")
def moved(root):
    """`one_two` and `two_one` changed over at step 2.

    One of the two processes of `one_two` got a SIGTERM on the way, at the start.
    """
    for name, other in (("one", "one_two"), ("two", "two_one")):
        checkpoint.copy(root / name, 2, root / other)
    with running([4, 4], *train(root / "one_two", *SPLIT)) as processes:
        wait_for(processes, lambda: "process 1 of 2" in processes[1].log.read_text())
        processes[1].popen.send_signal(signal.SIGTERM)
        codes = [process.wait() for process in processes]
        logs = [process.log.read_text() for process in processes]
    assert codes == [128 + signal.SIGTERM] * 2, logs
    assert all("ended by SIGTERM" in log for log in logs), logs
    run([4, 4], *train(root / "one_two", *SPLIT))
    run([1], *train(root / "two_one"))
    return root


@pytest.fixture(params=["one", "two", *nightly("one_two", "two_one")])
def workdir(request, root):
    """One of the runs that are to be as `eight`."""
    if "_" in request.param:
        request.getfixturevalue("moved")
    return root / request.param


def measured(workdir):
    """The rows of a run that do not tell the time."""
    clocks = ("seconds/", "steps_per_second", "images_per_second", "time", "goodput")
    rows = [
        {k: v for k, v in row.items() if not k.startswith(clocks)}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]
    return {row["step"]: row for row in rows}


def test_the_same_samples(root, workdir):
    """As many of each task in every step, and the same position in the data at the end."""
    expected, found = measured(root / "eight"), measured(workdir)
    assert set(found) == (set(expected) if "_" not in workdir.name else {3, 4})
    for step, row in found.items():
        counts = {k: v for k, v in row.items() if k.startswith(("count/", "share/"))}
        assert counts == {
            k: v for k, v in expected[step].items() if k.startswith(("count/", "share/"))
        }
    position = [
        json.loads((folder / "checkpoints/4/data/metadata").read_text())
        for folder in (root / "eight", workdir)
    ]
    assert position[0] == position[1]
    assert position[0]["next"] == 4 * 16


def test_the_same_losses(root, workdir):
    # Sums over rows and devices in another order: float32 rounds each at 6e-8, and 7e-7 was the
    # largest difference.
    expected, found = measured(root / "eight"), measured(workdir)
    for step, row in found.items():
        assert row.keys() == expected[step].keys()
        assert {f"loss/{t}" for t in TASKS if f"count/{t}" in row} <= row.keys()
        for key, value in row.items():
            np.testing.assert_allclose(
                value, expected[step][key], rtol=5e-6, err_msg=f"step {step}, {key}"
            )
    assert {f"val/loss/{t}" for t in TASKS} <= found[4].keys()


@pytest.mark.parametrize("which", ["params", "ema", "opt_state"])
def test_the_same_state(root, workdir, which):
    """Whatever wrote them, a single process reads them."""
    expected, found = (
        jax.device_get(checkpoint.load_params(folder, which=which))
        for folder in (root / "eight", workdir)
    )
    # The same rounding, through the orthogonalization of Muon and the square root of Adam: updates
    # of 5e-3 a step differed by 1.2e-6 at most (6e-6 from trained parameters).
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("origin", "hops"),
    [
        # From two processes of four devices to one, and to four of two.
        ("two", [([1], ()), ([2, 2, 2, 2], SPLIT)]),
        # From eight devices to four in another mesh, and to one.
        ("eight", [([4], ("--config.mesh.fsdp=2", "--config.mesh.data=2")), ([1], ())]),
    ],
    ids=["processes", "devices"],
)
def test_a_run_that_moves_twice(root, origin, hops):
    """The third step is made elsewhere than the first two, and the fourth elsewhere again."""
    workdir = root / f"{origin}_moved"
    checkpoint.copy(root / origin, 2, workdir)
    for step, (devices, mesh) in enumerate(hops, start=3):
        run(devices, *train(workdir, *mesh, f"--config.train.steps={step}"))
    assert set(measured(workdir)) == {3, 4}
    test_the_same_samples(root, workdir)
    for step, row in measured(workdir).items():
        for key in (f"loss/{task}" for task in TASKS if f"count/{task}" in row):
            np.testing.assert_allclose(row[key], measured(root / "eight")[step][key], rtol=5e-6)
    for which in ("params", "ema", "opt_state"):
        test_the_same_state(root, workdir, which)


def test_the_runs_were_split(root):
    overview = (root / "two" / "parameters.txt").read_text()
    assert "fsdp" in overview
    assert "fsdp" not in (root / "one" / "parameters.txt").read_text()


def test_a_loaded_run_is_split_as_in_training(root):
    pipeline = Pipeline.load(root / "two")
    assert (pipeline.mesh.shape["data"], pipeline.mesh.shape["fsdp"]) == (2, 4)
    for params in (pipeline.params, pipeline.untrained(seed=0).params):
        kernel = params["backbone"]["last_block"]["image"]["mlp"]["in"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4


def assert_same_picture(a, b):
    """Float32 in another order may carry a value over the edge between two of the 256 levels."""
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
    assert np.abs(a - b).max() <= 1
    assert a.std() > 10  # and there is something to compare


@pytest.mark.parametrize("task", TASKS)
def test_the_same_previews(root, workdir, task):
    samples = pathlib.Path("samples", "0000004", f"{task}.png")
    assert_same_picture(root / "eight" / samples, workdir / samples)


def test_the_same_evaluation(root, tmp_path):
    command = [
        "evaluate",
        f"--checkpoint={root / 'two'}",
        "--benchmark=emoji_scenes",
        "--tasks=ip,id",
    ]
    command += ["--examples=6", "--batch_size=8"]  # the second process has rows that are padding
    outputs = {
        n: run(d, *command, f"--out={tmp_path / n}") for n, d in (("one", [1]), ("two", [4, 4]))
    }
    header = next(line for line in outputs["one"][0] if line.startswith("task "))
    assert header in outputs["two"][0]
    assert header not in outputs["two"][1], "only process 0 prints"
    paths = [next((tmp_path / n).glob("*/results.json")) for n in ("one", "two")]
    one, two = (json.loads(path.read_text()) for path in paths)
    assert one["settings"] == two["settings"]
    assert list(two["tasks"]) == ["ip", "id"]
    for name, task in two["tasks"].items():
        for system, metrics in task["systems"].items():
            for metric, found in metrics.items():
                expected = one["tasks"][name]["systems"][system][metric]
                assert found["count"] == expected["count"]
                # One level of 255 in a few pixels.
                np.testing.assert_allclose(
                    found["value"], expected["value"], rtol=1e-4, err_msg=f"{name} {metric}"
                )
    files = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*"))
        for n in ("one", "two")
    ]
    assert files[0] == files[1]
    for path in files[0]:
        if path.suffix == ".png":
            assert_same_picture(tmp_path / "one" / path, tmp_path / "two" / path)


def test_the_same_sample(root, tmp_path):
    face = next((root / "two" / "samples").rglob("id.png"))
    command = [
        "sample",
        f"--checkpoint={root / 'two'}",
        "--task=id",
        "--prompt=a portrait of <p>",
        f"--face={face}",
    ]
    for name, devices in (("one", [1]), ("two", [4, 4])):
        outputs = run(devices, *command, f"--out={tmp_path / name}.png")
        told = [
            any(line.startswith(f"wrote {tmp_path / name}.png") for line in lines)
            for lines in outputs
        ]
        assert told == [True] + [False] * (len(devices) - 1), "only process 0 prints"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "two.png"]
    assert_same_picture(tmp_path / "one.png", tmp_path / "two.png")


def first_batch(data, **processes):
    """The first training batch, or a process's rows of it."""
    config = configs.load("experiments/emoji.py:preset=smoke,stage=2", [f"data.dir={data}"])
    collator = Collator(tokenizer=assembly.make_tokenizer(config), shape=BatchShape.of(config.data))
    stream = Stream(config, collator=collator, **processes)
    batch = next(stream)
    stream.close()
    return batch


ROWS = """
import json, sys
from tests import processes
processes.join()
import jax, numpy as np
from tests.cli.test_multiprocess import first_batch
from univg_jax import sharding

batch = first_batch(
    sys.argv[1], process_index=jax.process_index(), process_count=jax.process_count()
)
devices = jax.devices()
orders = {"in order": devices, "interleaved": sorted(devices, key=lambda d: (d.id % 2048, d.id))}
found = []
for order in orders:
    for axes in ((8, 1, 1), (2, 4, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)):
        mesh = sharding.make_mesh(**dict(zip(sharding.AXES, axes)), devices=orders[order])
        placed = sharding.shard_batch(batch, mesh)
        assert placed.target.sharding == sharding.batch_sharding(mesh)
        # A computation may put its rows anywhere; each process still gets back its own.
        moved = jax.device_put(placed.target, sharding.replicated(mesh))
        np.testing.assert_array_equal(sharding.local_rows(moved, mesh), batch.target)
        np.testing.assert_array_equal(sharding.local_rows(placed.sample_id, mesh), batch.sample_id)
        ids = sharding.all_gather_to_host(placed.sample_id)
        sums = sharding.all_gather_to_host(placed.target).sum((1, 2, 3), dtype=int)
        found.append(dict(order=order, ids=ids.tolist(), sums=sums.tolist()))
print(json.dumps(found))
"""


def test_rows_come_from_every_process_on_every_mesh(root):
    """Also where devices of two processes share a row, or a mesh mixes the processes' devices."""
    whole = first_batch(root / "data")
    assert whole.sample_id.tolist() == list(range(16))
    sums = whole.target.sum((1, 2, 3), dtype=int).tolist()
    both = [
        json.loads(next(line for line in lines if line.startswith("[{")))
        for lines in run([4, 4], str(root / "data"), program=("-c", ROWS))
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 10
    for found in both[0]:
        assert sorted(zip(found["ids"], found["sums"])) == list(enumerate(sums))
        if found["order"] == "in order":
            assert found["ids"] == list(range(16))


def test_a_process_that_fails_ends_the_others(root, tmp_path):
    """It says why and exits, without waiting for the others: that would take five minutes."""
    command = train(root / "never")
    with running([1, 1], *command, first=("--config.optim.name=adam",)) as processes:
        codes = [process.popen.wait(timeout=200) for process in processes]
        assert codes[0] == 1
        assert codes[1] != 0
        assert "univg train: error: unknown optim.name 'adam'" in processes[0].log.read_text()
    assert not (root / "never").exists()
