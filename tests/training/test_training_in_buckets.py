"""A run in two buckets: one program each, exact resume, the same on any devices."""

import jax
import numpy as np
import pytest
from jax import monitoring

from data_pipelines.collate import Collator
from data_pipelines.held_out import HeldOut, HeldOutBatches
from data_pipelines.mixture import Stream
from data_pipelines.sources import MemorySource
from tests import helpers
from tests.data_pipelines.toy import tokenize
from univg_jax import sharding, writers
from univg_jax.settings import Config

pytestmark = pytest.mark.xdist_group("buckets")  # one worker makes the uninterrupted run

SHAPES = ((24, 8), (16, 16))


def make_records(seed: int) -> list[dict]:
    """Pictures of many shapes; ie's sources are their negatives."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(8, 40, (24, 2))
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [dict(image=image, source=255 - image, caption="a", instruction="b") for image in images]


def config():
    made = helpers.tiny_config()
    made.tasks.ie.sources = ("scenes",)
    made.data.update(dict(buckets=SHAPES, resolution=16, num_tokens=6, face_resolution=16))
    made.data.update(dict(read_threads=1, prefetch=1))
    return made


COLLATOR = Collator(tokenizer=tokenize, shape=helpers.SHAPE)


class Killed(Exception):
    pass


class OurStream(Stream):
    """The run's stream, which ends with `Killed` after some batches."""

    left = 100

    def __next__(self):
        if not self.left:
            raise Killed
        self.left -= 1
        return super().__next__()


def run(workdir, *, devices: int = 8, after: int = 100):
    """The state and the shapes of the stream, after training in `workdir`."""
    made = Config.of(config())
    sources = dict(scenes=MemorySource("scenes", make_records(0)))
    stream = OurStream(made, collator=COLLATOR, sources=sources)
    stream.left = after
    held_out = dict(scenes=MemorySource("scenes", make_records(1)))
    validation = {
        task: HeldOutBatches(
            HeldOut(
                made,
                task,
                split="validation",
                collator=COLLATOR,
                sources=held_out,
                shapes=stream.shapes,
            ),
            batch_size=8,
            collator=COLLATOR,
        )
        for task in helpers.TASKS
    }
    axes = dict(data=devices, fsdp=1, devices=jax.devices()[:devices])
    try:
        state = helpers.train_tiny(
            config(), workdir, stream=stream, validation=validation, mesh=sharding.make_mesh(**axes)
        )
    finally:
        stream.close()
    return jax.device_get(state)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its folder and its state."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(workdir)


def rows(workdir):
    return writers.read_metrics(workdir / "metrics.jsonl")


def test_killed_and_resumed_equals_uninterrupted_bitwise(finished, tmp_path):
    workdir, expected = finished
    with pytest.raises(Killed):
        run(tmp_path, after=3)  # a step after it was saved
    state = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    for mine, other in zip(rows(tmp_path), rows(workdir), strict=True):
        assert mine["loss"] == other["loss"]


def test_one_device_trains_the_same(finished, tmp_path):
    workdir, expected = finished
    state = run(tmp_path, devices=1)
    for mine, other in zip(rows(tmp_path), rows(workdir), strict=True):
        assert mine["count/t2i"] == other["count/t2i"]
        for name in ("loss", "val/loss/t2i", "val/loss/ie"):
            np.testing.assert_allclose(mine.get(name, 0), other.get(name, 0), rtol=2e-5)
    assert int(state.step) == int(expected.step) == 6


def test_all_programs_are_compiled_before_the_first_step(tmp_path, monkeypatch):
    """An update and a validation of each bucket; the steps and evaluations then compile none."""
    compiled, before, shapes = [], [], set()

    def note(event: str, seconds: float, *, fun_name: str = "", **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(fun_name)

    def noting(self):
        before.append(list(compiled))
        batch = Stream.__next__(self)
        shapes.add(batch.target.shape[1:3])
        return batch

    monkeypatch.setattr(OurStream, "__next__", noting)
    monitoring.register_event_duration_secs_listener(note)
    try:
        run(tmp_path)
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert shapes == set(SHAPES)
    for name in ("jit(update)", "jit(validate)"):
        assert before[0].count(name) == compiled.count(name) == 2, name
