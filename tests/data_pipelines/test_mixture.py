"""The stream: the same on any hosts, resumable, with the shares of the weights."""

import itertools
import json

import jax
import numpy as np
import pytest

from data_pipelines import mixture
from data_pipelines.datasets import emoji_scenes
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from tests.data_pipelines.toy import (
    NUM_RECORDS,
    PERSONS,
    SCENES,
    BrokenSource,
    assert_same,
    join,
    make_config,
    make_scene,
    sources,
    stream,
    text_of,
)
from univg_jax.errors import UserError
from univg_jax.settings import Config, Task


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_any_number_of_hosts_makes_the_same_global_batches(hosts):
    alone = stream()
    parts = [stream(process_index=i, process_count=hosts) for i in range(hosts)]
    for step in range(3):
        whole = next(alone)
        assert_same(join([next(part) for part in parts]), whole)
        np.testing.assert_array_equal(whole.sample_id, np.arange(8) + 8 * step)


def test_a_stream_resumes_on_other_hosts():
    expected = list(itertools.islice(stream(), 6))
    two = [stream(process_index=i, process_count=2) for i in range(2)]
    for _ in range(3):
        for part in two:
            next(part)
    states = [json.loads(json.dumps(part.get_state())) for part in two]
    assert states[0] == states[1]
    four = [stream(process_index=i, process_count=4) for i in range(4)]
    for part in four:
        next(part)  # it may have been running
        part.set_state(states[0])
    for batch in expected[3:]:
        assert_same(join([next(part) for part in four]), batch)
    two[0].set_state(stream().get_state())  # back to the beginning
    np.testing.assert_array_equal(next(two[0]).sample_id, np.arange(4))


def test_threads_change_nothing():
    threaded = make_config()
    threaded.data.read_threads, threaded.data.prefetch = 4, 16
    for a, b in zip(itertools.islice(stream(threaded), 5), stream()):
        assert_same(a, b)


def test_an_epoch_visits_every_record_once_and_shuffles_anew():
    batches = itertools.islice(stream(make_config(batch_size=NUM_RECORDS, t2i=1.0)), 3)
    epochs = [batch.target[:, 0, 0, 0].tolist() for batch in batches]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_RECORDS))
    assert epochs[0] != epochs[1] != epochs[2]
    other = (
        next(stream(make_config(batch_size=NUM_RECORDS, seed=1, t2i=1.0)))
        .target[:, 0, 0, 0]
        .tolist()
    )
    assert other != epochs[0]


def test_rows_keep_their_task_format():
    config = make_config(batch_size=64, t2i=1, ie=1, ip=1, seg=1, id=1)
    batch = next(stream(config))
    names = list(TASKS)
    assert batch.valid.all()
    for row in range(batch.size):
        name, text = names[batch.task[row]], text_of(batch.tokens[row])
        k = int(batch.target[row, 0, 0, 0])
        assert text.startswith(f"<{name}>")
        assert batch.has_source[row] == (name in ("ie", "ip", "seg"))
        assert batch.has_face[row] == batch.identity_slot[row].any() == (name == "id")
        assert (batch.mask[row] == 1).all() == (name != "ip")
        if name == "t2i":
            assert text == f"<t2i> pig {k}"
            assert not batch.source[row].any()
        if name == "ie":
            assert (text, batch.source[row, 0, 0, 0]) == (f"<ie> do {k}", 255 - k)
        if name == "id":
            assert (text, batch.face[row, 0, 0, 0]) == ("<id> <p> smiles", k - 100)
        if name == "seg":
            assert (batch.target[row] == 255).all()


def test_the_mixture_has_the_shares_of_the_weights():
    config = make_config(batch_size=200)
    made = stream(config)
    batch = next(made)
    for name, share in made.shares.items():
        # a rotation's window of 200 errs by at most two rows at either edge of a share
        assert abs((batch.task == list(TASKS).index(name)).mean() - share) < 4 / 200
    assert made.shares == pytest.approx(dict(t2i=0.28, ie=0.47, ip=0.2, seg=0.05))


def test_sources_share_a_task_by_size_or_by_weight():
    small = MemorySource("small", SCENES[:3])
    config = make_config(t2i=1.0)
    config.tasks.t2i.sources = ("scenes", "small")
    by_size = mixture.components(Config.of(config).tasks, sources=sources(small=small))
    assert [c.weight for c in by_size] == pytest.approx([23 / 26, 3 / 26])
    by_weight = {"t2i": Task(weight=2.0, sources=dict(scenes=1.0, small=3.0))}
    found = mixture.components(by_weight, sources=sources(small=small))
    assert [(c.source.name, c.weight) for c in found] == [("scenes", 0.5), ("small", 1.5)]


def test_conditions_drop_at_their_rates():
    config = make_config(batch_size=600, ie=1.0)
    config.tasks.ie = dict(
        weight=1.0, sources=("scenes",), drop_text=0.1, drop_image=0.2, drop_both=0.05
    )
    batch = next(stream(config))
    no_text = batch.text_mask.sum(axis=1) == len("<ie>")
    no_image = ~batch.has_source
    assert not batch.source[no_image].any()
    for rate, dropped in (
        (0.1, no_text & ~no_image),
        (0.2, no_image & ~no_text),
        (0.05, no_text & no_image),
    ):
        # four standard deviations of a binomial
        assert abs(dropped.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 600)


def test_an_identity_without_text_has_no_face():
    config = make_config(id=1.0)
    config.tasks.id.drop_text = 1.0
    batch = next(stream(config))
    assert not batch.has_face.any()
    assert not batch.face.any()
    assert not batch.identity_slot.any()
    assert text_of(batch.tokens[0]) == "<id>"


def test_sample_ids_wrap():
    made = stream()
    made.set_state(made.get_state() | dict(next=2**32 - 8))
    assert next(made).sample_id[-1] == 2**32 - 1
    np.testing.assert_array_equal(next(made).sample_id, np.arange(8))


def test_a_corrupt_record_is_replaced_by_the_next_and_counted(caplog):
    scenes = [make_scene(k) for k in range(200)]
    config = make_config(batch_size=200, t2i=1.0)
    broken = stream(config, sources=dict(scenes=BrokenSource("scenes", scenes, {77})))
    whole = stream(config, sources=dict(scenes=MemorySource("scenes", scenes)))
    a, b = next(broken), next(whole)
    differ = (a.target != b.target).any(axis=(1, 2, 3))
    assert (a.target[differ, 0, 0, 0], b.target[differ, 0, 0, 0]) == (78, 77)
    assert broken.counters() == dict(quarantined=1)
    assert "quarantined scenes[77]" in caplog.text
    assert "truncated image" in caplog.text


def test_too_many_corrupt_records_end_the_run():
    scenes = [make_scene(k % 250) for k in range(500)]
    config = make_config(batch_size=500, t2i=1.0)
    with pytest.raises(UserError, match=r"of \d+ records read are unusable \(more than 1%\)"):
        next(
            stream(
                config, sources=dict(scenes=BrokenSource("scenes", scenes, set(range(0, 500, 20))))
            )
        )
    with pytest.raises(
        ValueError, match="23 records in succession of scenes cannot serve task 't2i'"
    ):
        next(
            stream(
                make_config(t2i=1.0),
                sources=dict(scenes=BrokenSource("scenes", SCENES, set(range(23)))),
            )
        )


def test_a_record_that_breaks_the_schema_fails_before_the_first_batch():
    persons = [PERSONS[0] | dict(caption="a person"), *PERSONS[1:]]
    with pytest.raises(UserError, match=r"task 'id', persons\[0\]: field 'caption' has no <p>"):
        stream(make_config(id=1.0), sources=sources(persons=MemorySource("persons", persons)))
    with pytest.raises(UserError, match=r"task 'lg' cannot read scenes: no field 'boxes'"):
        stream(make_config(lg=1.0))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (dict(t2i=-1.0), "weight of task 't2i' is -1.0, expected a finite number >= 0"),
        (dict(t2i=float("nan")), "weight of task 't2i' is nan"),
        (dict(t2i=0.0, ie=0.0), "no task has a weight above zero"),
        (dict(t2ii=1.0), "unknown task 't2ii'; did you mean 't2i'"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(UserError) as error:
        stream(make_config(**weights))
    assert message in str(error.value)


def test_a_task_of_weight_zero_is_left_out():
    assert stream(make_config(t2i=1.0, ie=0.0)).shares == dict(t2i=1.0)


def test_a_state_of_another_mixture_is_refused():
    state = stream().get_state()
    for other in (make_config(t2i=1.0), make_config(seed=1)):
        with pytest.raises(UserError, match="the saved data position belongs to another mixture"):
            stream(other).set_state(state)
    shorter = dict(scenes=MemorySource("scenes", SCENES[:-1]))
    with pytest.raises(UserError, match="components was"):
        stream(sources=shorter).set_state(state)


def test_dropout_must_be_a_probability():
    config = make_config(t2i=1.0)
    config.tasks.t2i.drop_text, config.tasks.t2i.drop_image = 0.6, 0.6
    with pytest.raises(UserError, match="expected probabilities that sum to at most 1"):
        stream(config)


def test_records_on_disk_serve_every_task(tmp_path):
    options = emoji_scenes.Options(resolution=16, num_scenes=16, nouns=4)
    emoji_scenes.build(tmp_path, options, processes=1)
    config = make_config(batch_size=16, **dict.fromkeys(TASKS, 1.0))
    config.data.update(dict(dir=str(tmp_path), resolution=16, read_threads=2, prefetch=2))
    for name, task in config.tasks.items():
        task.sources = (dict(ie="edits", pose="puppets", id="persons").get(name, "scenes"),)
    batch = next(stream(config, sources=None))
    np.testing.assert_array_equal(np.bincount(batch.task, minlength=8) > 0, True)
    assert stream(config, sources=None).counters() == dict(quarantined=0)


def test_the_stream_states_its_shapes_before_it_reads():
    for hosts in (1, 2):
        made = stream(process_count=hosts)
        (spec,) = made.specs()
        batch = join([next(stream(process_index=i, process_count=hosts)) for i in range(hosts)])
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype), spec
        )


def test_a_saved_position_is_a_number_and_the_mixture():
    """The form that checkpoints on disk have."""
    made = stream(make_config(t2i=1, ie=3))
    next(made)
    components = [["t2i", "scenes", 23, 1.0], ["ie", "scenes", 23, 3.0]]
    assert made.get_state() == dict(next=8, mixture=dict(seed=0, components=components))
