"""What runs together, what does not wait, and what is left out."""

import asyncio
import dataclasses
import threading

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import monitoring

from univg_jax.errors import NonFiniteError, UnsupportedError, UserError
from univg_jax.inputs import make_request
from univg_jax.serving.batching import Batching, Busy, Job, NobodyWaits, batch_sizes
from univg_jax.serving.metrics import Metrics

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture
def batching(pipeline):
    made = Batching(pipeline, Metrics(), max_batch=8, max_wait_ms=200, max_queue=100)
    yield made
    made.stop()


@pytest.fixture
def batches(batching, monkeypatch):
    """The batches that are sampled: lists of jobs."""
    seen = []
    sample = batching._sample

    def note(jobs):
        seen.append(list(jobs))
        return sample(jobs)

    monkeypatch.setattr(batching, "_sample", note)
    return seen


def job(batching, task="t2i", seed=0, prompt="a pig on grass", inputs=None, **options):
    request = make_request(
        task, data=batching.pipeline.config.data, prompt=prompt, **(inputs or {})
    )
    pipeline = batching.with_options(task, **options)
    return Job(request=request, seed=seed, pipeline=pipeline)


PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def make_all(batching, jobs):
    """Their results or errors."""

    async def make():
        return await asyncio.gather(*map(batching.make, jobs), return_exceptions=True)

    return asyncio.run(make())


@hypothesis.given(st.integers(1, 1000), st.integers(1, 64))
def test_sizes_of_batches_are_few_divide_over_the_devices_and_hold_all(most, rows):
    sizes = batch_sizes(most, rows=rows)
    assert list(sizes) == sorted(set(sizes))
    assert all(size % rows == 0 for size in sizes)
    assert most <= sizes[-1] < most + rows
    assert len(sizes) <= 2 + max(0, (most // rows)).bit_length()
    # Padding is less than the pictures themselves, or than the devices.
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size < 2 * count or size == rows


def test_one_program_is_one_batch_and_each_gets_its_own(batching, batches, pipeline):
    prompts = ["a pig on grass", "a cat on sand", "a dog", "a red apple", "a pig"]
    jobs = [job(batching, prompt=prompt, seed=i) for i, prompt in enumerate(prompts)]
    made = make_all(batching, jobs)
    assert [len(batch) for batch in batches] == [5]
    expected = pipeline.run("t2i", prompt=prompts, seed=list(range(5)), callback=lambda *_: None)
    for result, image, seed, prompt in zip(made, expected.images, range(5), prompts, strict=True):
        # Both are batches of 8 rows.
        np.testing.assert_array_equal(np.asarray(result.image), np.asarray(image))
        assert (result.seeds, result.prompts) == ([seed], [prompt])


def test_other_programs_and_tasks_are_other_batches(batching, batches):
    image = {"image": PICTURE}
    jobs = [
        job(batching),
        job(batching, "depth", prompt="", inputs=image),
        job(batching, "ie", prompt="remove it", inputs=image),
        job(batching, "ie", prompt="remove it", inputs=image, image_guidance=3.0),
        job(batching, seed=1),
        job(batching, "depth", prompt="", inputs=image, seed=1),
    ]
    make_all(batching, jobs)
    by_task = sorted(tuple(job.request.task for job in batch) for batch in batches)
    assert by_task == [("depth", "depth"), ("ie",), ("ie",), ("t2i", "t2i")]


def test_scales_are_not_mixed_though_they_share_a_program(batching, batches, pipeline):
    jobs = [job(batching, guidance=scale) for scale in (2.0, 7.0, 2.0)]
    made = make_all(batching, jobs)
    assert sorted(len(batch) for batch in batches) == [1, 2]
    for result, scale in zip(made, (2.0, 7.0, 2.0), strict=True):
        alone = pipeline("a pig on grass", guidance=scale, callback=lambda *_: None)
        np.testing.assert_array_equal(np.asarray(result.image), np.asarray(alone.image))
        assert result.settings["guidance"] == scale


def test_more_than_a_batch_holds_are_several(batching, batches):
    make_all(batching, [job(batching, seed=i) for i in range(11)])
    assert [len(batch) for batch in batches] == [8, 3]


def test_nothing_is_compiled_once_it_is_ready(batching):
    asyncio.run(batching.compile())
    assert batching.is_ready
    image = {"image": PICTURE}
    everything = [
        *(job(batching, guidance=scale, seed=i) for i, scale in enumerate((None, 0.0, 9.0))),
        *(job(batching, "ie", prompt="x", inputs=image, image_guidance=s) for s in (None, 2.0)),
        *(job(batching, task, prompt="", inputs=image) for task in ("depth", "pose")),
        job(batching, "seg", inputs=image),
        job(batching, "seg", inputs=image, guidance=2.0),
        job(batching, "seg", inputs=image, guidance=2.0, image_guidance=1.0),
        job(batching, "id", prompt="a <p>", inputs={"face": PICTURE}),
        job(batching, "lg", inputs=image),
        job(batching, "ip", inputs={**image, "margins": (0, 0, 8, 8)}),
    ]
    compiled = []

    def note(event, _, *, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    monitoring.register_event_duration_secs_listener(note)
    try:
        made = make_all(batching, everything)
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert not [error for error in made if isinstance(error, Exception)]
    assert not compiled
    assert len(jax.devices()) == 8  # so also that of all devices


def test_who_leaves_before_the_batch_is_not_in_it(batching, batches):
    async def make():
        stays = asyncio.ensure_future(batching.make(job(batching, seed=1)))
        leaves = asyncio.ensure_future(batching.make(job(batching, seed=2)))
        await asyncio.sleep(0.02)
        leaves.cancel()
        await asyncio.wait([stays, leaves])
        return stays.result()

    assert asyncio.run(make()).seeds == [1]
    assert [[job.seed for job in batch] for batch in batches] == [[1]]


def test_a_batch_that_nobody_waits_for_stops_at_its_next_step(batching, monkeypatch):
    began, steps = threading.Event(), []
    answer = type(batching.pipeline).answer

    def slowly(self, *arguments, callback, **options):
        def count(step, total):
            steps.append(step)
            began.set()
            gone.wait(30)
            callback(step, total)

        return answer(self, *arguments, callback=count, **options)

    gone = threading.Event()
    monkeypatch.setattr(type(batching.pipeline), "answer", slowly)

    async def make():
        leaves = asyncio.ensure_future(batching.make(job(batching)))
        await asyncio.to_thread(began.wait, 60)
        leaves.cancel()
        await asyncio.wait([leaves])
        gone.set()
        return await batching.make(job(batching, seed=5))  # the devices are free again

    assert asyncio.run(make()).seeds == [5]
    assert steps == [1, 1, 2]


def test_one_that_fails_does_not_take_the_others_with_it(batching, monkeypatch):
    answer = type(batching.pipeline).answer

    def fussy(self, requests, *, seeds, **options):
        if 3 in seeds:
            raise NonFiniteError("the picture of seed 3 is not finite")
        return answer(self, requests, seeds=seeds, **options)

    monkeypatch.setattr(type(batching.pipeline), "answer", fussy)
    made = make_all(batching, [job(batching, seed=seed) for seed in (1, 3, 5)])
    assert [getattr(result, "seeds", None) for result in made] == [[1], None, [5]]
    assert isinstance(made[1], NonFiniteError)


def test_the_queue_is_bounded(pipeline):
    batching = Batching(pipeline, Metrics(), max_batch=8, max_wait_ms=1, max_queue=4)
    with batching.places(3):
        with (
            pytest.raises(Busy, match="3 pictures are waiting, of at most 4") as busy,
            batching.places(2),
        ):
            pass
        assert busy.value.retry_after >= 1
        with batching.places(1):
            assert batching.taken == 4
    assert batching.taken == 0
    with pytest.raises(UserError, match="n=5: expected at most 4"), batching.places(5):
        pass


def test_only_what_is_compiled_can_be_asked_for(pipeline):
    batching = Batching(
        pipeline, Metrics(), max_batch=8, max_wait_ms=1, max_queue=4, steps=[2, 3], solvers=["heun"]
    )
    programs = list(batching.programs())
    assert {program.sampler.steps for program in programs} == {2, 3}
    assert {program.sampler.solver for program in programs} == {"heun"}
    assert {program.passes for program in programs} == {1, 2, 3}
    assert len(set(programs)) == len(programs) == 6
    assert batching.with_options("t2i", steps=3).config.sampling.steps == 3
    with pytest.raises(UnsupportedError, match="steps=4: this server is compiled for 2, 3"):
        batching.with_options("t2i", steps=4)
    with pytest.raises(UnsupportedError, match="solver=euler: this server is compiled for heun"):
        batching.with_options("t2i", solver="euler")


def test_a_model_of_depth_alone_is_compiled_for_no_guidance(pipeline):
    config = pipeline.config
    tasks = {
        name: dataclasses.replace(task, weight=float(name == "depth"))
        for name, task in config.tasks.items()
    }
    alone = dataclasses.replace(pipeline, config=dataclasses.replace(config, tasks=tasks))
    batching = Batching(alone, Metrics(), max_batch=8, max_wait_ms=1, max_queue=4)
    assert [program.passes for program in batching.programs()] == [1]


def test_who_left_costs_nothing(batching, batches):
    left = job(batching)
    left.left = True
    (made,) = make_all(batching, [left])
    assert isinstance(made, NobodyWaits)
    assert not batches
