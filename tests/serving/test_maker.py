"""One picture at a time, in the order in which they are asked for."""

import asyncio

import numpy as np
import pytest

from data_pipelines.tasks import TASKS
from univg_jax import Pipeline
from univg_jax.errors import UserError
from univg_jax.images import open_picture
from univg_jax.serving import maker as makers
from univg_jax.serving.examples import load_examples
from univg_jax.serving.form import Form, fields_of
from univg_jax.serving.maker import Job, Maker, Stopped
from univg_jax.serving.store import Store

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture(scope="module")
def pipeline(root):
    return Pipeline.load(root / "stage3")


@pytest.fixture
def maker(pipeline):
    return Maker(pipeline, Store())


def jobs(*prompts):
    return [Job(Form.of({"task": "t2i", "prompt": prompt})) for prompt in prompts]


def make_all(maker, jobs):
    async def gather():
        return await asyncio.gather(*map(maker.make, jobs), return_exceptions=True)

    return asyncio.run(gather())


def test_the_pictures_are_the_pipelines(maker, pipeline):
    job = Job(Form.of({"task": "t2i", "prompt": "a pig", "seed": 5, "steps": 3, "width": 40}))
    (made,) = make_all(maker, [job])
    assert (job.step, job.total) == (3, 3)
    result = pipeline("a pig", seed=5, steps=3, size=(40, 32), callback=lambda *_: None)
    picture = np.asarray(open_picture(maker.store.read(made.picture)))
    np.testing.assert_array_equal(picture, np.asarray(result.image))


def test_jobs_are_done_in_their_order_and_a_bad_one_harms_no_other(maker):
    first, bad, last = jobs("a pig", " ", "a cat")
    order = []
    for job in (first, bad, last):
        job.advance = lambda step, total, job=job: order.append(job)
    made, error, other = make_all(maker, [first, bad, last])
    assert made.form is first.form
    assert "needs a prompt" in str(error)
    assert isinstance(error, UserError)
    assert other.form is last.form
    assert order == sorted(order, key=[first, bad, last].index)
    assert maker.before(last) == 0


def test_a_stopped_job_ends_at_its_next_step_or_never_begins(maker):
    running, waiting, last = jobs("a pig", "a cat", "a dog")
    advance = running.advance

    def stop_both(step, total):
        if step == 1:
            running.is_stopped = waiting.is_stopped = True
        advance(step, total)

    running.advance = stop_both
    ends = make_all(maker, [running, waiting, last])
    assert [type(end) for end in ends] == [Stopped, Stopped, makers.Made]
    assert running.step == 1
    assert not waiting.has_begun


def test_a_fault_of_ours_is_logged_and_the_next_picture_is_made(maker, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr(Pipeline, "run", lambda *_, **__: 1 / 0)
        (error,) = make_all(maker, jobs("a pig"))
    assert isinstance(error, ZeroDivisionError)
    assert "division by zero" in caplog.text
    assert "a pig" in caplog.text
    (made,) = make_all(maker, jobs("a pig"))
    assert isinstance(made, makers.Made)


def test_too_many_that_wait_are_told_so(maker, monkeypatch):
    monkeypatch.setattr(makers, "MAX_WAITING", 2)
    *_, refused = make_all(maker, jobs("a pig", "a cat", "a dog"))
    assert "2 pictures are waiting: try again in a minute" in str(refused)
    (made,) = make_all(maker, jobs("a dog"))
    assert isinstance(made, makers.Made)


def test_examples_are_forms_that_need_nothing_more(pipeline):
    store = Store()
    examples = load_examples(pipeline, store, num=3)
    assert set(examples) == set(TASKS)
    for task, forms in examples.items():
        assert 2 <= len(forms) <= 3
        for form in forms:
            assert form.task == task
            assert Form.of({name: getattr(form, name) for name in fields_of(task)}) == form
            for name in ("image", "mask", "face"):
                needed = name in TASKS[task].inputs and task != "lg"
                assert bool(getattr(form, name)) == needed
                assert not needed or getattr(form, name) in store
    assert all(box.name in form.prompt for form in examples["lg"] for box in form.boxes)
    assert load_examples(pipeline, Store(), num=3) == examples, "links to examples stay"


def test_a_model_without_its_data_has_no_examples_and_says_why(pipeline, tmp_path, caplog):
    caplog.set_level("WARNING", logger="absl")
    examples = load_examples(pipeline, Store(), num=3, data_dir=str(tmp_path))
    assert not any(examples.values())
    assert "no examples of task t2i: " in caplog.text
