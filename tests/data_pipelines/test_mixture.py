"""The stream: the same on any hosts, resumable, with the shares of the weights."""

import collections
import dataclasses
import errno
import itertools
import json

import jax
import numpy as np
import pytest

from data_pipelines import mixture
from data_pipelines.build import build
from data_pipelines.datasets import emoji_scenes
from data_pipelines.quarantine import read_quarantine
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from tests.data_pipelines.toy import (
    NUM_RECORDS,
    PERSONS,
    SCENES,
    SIZE,
    BrokenSource,
    assert_same,
    join,
    make_collator,
    make_config,
    make_scene,
    sources,
    stream,
    text_of,
    tokenize,
)
from univg_jax.errors import UnreachableError, UserError
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
    assert broken.counters() == {
        **dict(quarantined=1, unsuitable=0, truncated=0),
        "quarantined/scenes": 1,
    }
    assert "quarantined scenes[77] for task 't2i': ValueError: truncated image" in caplog.text


def test_too_many_corrupt_records_end_the_run():
    scenes = [make_scene(k % 250) for k in range(500)]
    config = make_config(batch_size=500, t2i=1.0)
    with pytest.raises(UserError, match=r"records read are unusable \(more than data.max_bad_frac"):
        next(
            stream(
                config, sources=dict(scenes=BrokenSource("scenes", scenes, set(range(0, 500, 20))))
            )
        )
    with pytest.raises(UserError, match="100 records in succession of scenes cannot serve task"):
        next(
            stream(config, sources=dict(scenes=BrokenSource("scenes", scenes, set(range(1, 500)))))
        )


def test_a_source_of_which_no_record_serves_the_task_fails_before_the_first_batch():
    persons = [person | dict(caption="a person") for person in PERSONS]
    message = (
        r"none of 7 records tried of persons can serve task 'id'; "
        r"the first: persons\[0\] for task 'id': field 'caption' has no <p>"
    )
    with pytest.raises(UserError, match=message):
        stream(make_config(id=1.0), sources=sources(persons=MemorySource("persons", persons)))
    with pytest.raises(UserError, match=r"task 'lg' cannot read scenes: no field 'boxes'"):
        stream(make_config(lg=1.0))


def test_a_damaged_record_among_those_tried_first_is_no_reason_to_stop(caplog):
    persons = [PERSONS[0] | dict(caption="a person"), *PERSONS[1:]]
    made = stream(make_config(id=1.0), sources=sources(persons=MemorySource("persons", persons)))
    assert "quarantined persons[0] for task 'id': field 'caption' has no <p>" in caplog.text
    assert 100 not in next(made).target[:, 0, 0, 0]
    assert made.counters()["quarantined"] == 1


def a_set_with_every_fault() -> dict:
    """18 sound scenes, and five that each task of the config cannot use."""
    scenes = [make_scene(k) for k in range(NUM_RECORDS)]
    scenes[3]["caption"] = 7  # no text
    del scenes[8]["image"]
    scenes[9]["image"] = np.zeros((0, 0, 3), np.uint8)
    scenes[15]["caption"] = " "
    scenes[21]["caption"] = "word " * 20  # cannot be tokenized below
    return dict(scenes=MemorySource("scenes", scenes))


def test_a_host_that_cannot_go_on_gives_batches_of_no_valid_rows():
    """It must not leave the others waiting: they see the missing rows in the step's metrics."""
    scenes = [make_scene(k % 250) for k in range(500)]
    config = make_config(batch_size=8, t2i=1.0)
    sound = MemorySource("scenes", scenes)
    broken = BrokenSource("scenes", scenes, set(range(1, 499)))
    broken.fingerprint = sound.fingerprint
    hosts = [
        stream(config, sources=dict(scenes=source), process_index=index, process_count=2)
        for index, source in enumerate((sound, broken))
    ]
    for _ in range(3):
        good, bad = (next(host) for host in hosts)
        assert good.valid.all()
        assert not bad.valid.any()
        for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(bad), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert hosts[0].failure is None
    assert "in succession of scenes cannot serve task" in str(hosts[1].failure)
    assert hosts[0].get_state() == hosts[1].get_state()


def test_what_is_quarantined_is_written_once_also_after_a_resume(tmp_path):
    scenes = [make_scene(k) for k in range(250)]
    config = make_config(batch_size=50, t2i=0.5, ip=0.5)
    file = tmp_path / "quarantine.jsonl"
    for _ in range(2):
        broken = BrokenSource("scenes", scenes, {77, 140})
        made = stream(config, sources=dict(scenes=broken), quarantine=file)
        for _ in range(12):
            next(made)
    rows = read_quarantine(tmp_path)
    assert sorted(row["index"] for row in rows) == [77, 140]
    for row in rows:
        assert (row["dataset"], row["shard"], row["key"]) == ("scenes", "", row["index"])
        assert row["task"] in ("t2i", "ip")
        assert row["reason"].endswith("ValueError: truncated image")


def picky(text: str, num_tokens: int):
    if text.count("word") == 20:
        raise UserError("cut to num_tokens it would lose <p>")
    return dataclasses.replace(tokenize(text, num_tokens), num_truncated=int("pig 5" in text))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_what_was_quarantined_or_cut_is_counted_once_and_the_same_on_any_hosts(hosts):
    config = make_config(batch_size=8, t2i=1.0)
    collator = dataclasses.replace(make_collator(config), tokenizer=picky)
    options = dict(collator=collator, sources=a_set_with_every_fault(), process_count=hosts)
    parts = [stream(config, process_index=i, **options) for i in range(hosts)]
    counts = [collections.Counter() for _ in range(12)]  # four epochs
    for total in counts:
        for part in parts:
            next(part)
            total.update(part.counters())
    for name in ("quarantined", "truncated"):
        series = [total[name] for total in counts]
        assert series == sorted(series)
    assert counts[-1] == {
        **dict(quarantined=5, unsuitable=0, truncated=1),
        "quarantined/scenes": 5,
    }

    # A second attempt goes on where the first one was, whatever that had read ahead.
    again = stream(config, **options | dict(process_count=1))
    again.set_state(dict(again.get_state(), next=8))
    next(again)
    first, second = dict(counts[0]), again.counters()
    assert {name: first[name] + second[name] for name in first} == dict(counts[1])


def test_records_that_hold_nothing_for_the_task_are_counted():
    made = stream(make_config(batch_size=NUM_RECORDS, seg=1.0))
    next(made)
    assert made.counters()["unsuitable"] == 12
    assert made.counters()["quarantined"] == 0


def test_a_storage_that_does_not_answer_is_no_damaged_record():
    """Another attempt would read the record, and make another stream than this one."""

    class Unreachable(MemorySource):
        def read(self, index, fields=None):
            raise OSError(errno.EIO, "bucket does not answer")

    with pytest.raises(UnreachableError, match=r"cannot read scenes\[0\]: .*does not answer"):
        stream(make_config(t2i=1.0), sources=dict(scenes=Unreachable("scenes", SCENES)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (dict(t2i=-1.0), "tasks.t2i.weight=-1.0: expected a finite number >= 0"),
        (dict(t2i=float("nan")), "tasks.t2i.weight=nan"),
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
    build(emoji_scenes.DATASET, tmp_path, options, processes=1)
    config = make_config(batch_size=16, **dict.fromkeys(TASKS, 1.0))
    config.data.update(dict(dir=str(tmp_path), resolution=16, read_threads=2, prefetch=2))
    for name, task in config.tasks.items():
        task.sources = (dict(ie="edits", pose="puppets", id="persons").get(name, "scenes"),)
    batch = next(stream(config, sources=None))
    np.testing.assert_array_equal(np.bincount(batch.task, minlength=8) > 0, True)
    assert stream(config, sources=None).counters()["quarantined"] == 0


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
    fingerprint = MemorySource("scenes", SCENES).fingerprint()
    places = [["t2i", "scenes", 23, fingerprint, 0], ["ie", "scenes", 23, fingerprint, 0]]
    assert json.loads(json.dumps(made.get_state())) == dict(
        next=8,
        mixture=dict(seed=0, components=components),
        fingerprints=dict(scenes=fingerprint),
        lineage=dict(seed=0, places=places),
    )


def test_a_position_saved_before_there_were_fingerprints_goes_on(caplog):
    made = stream()
    expected = [next(made) for _ in range(3)][2]
    old = dict(next=16, mixture=made.get_state()["mixture"])
    resumed = stream()
    resumed.set_state(old)
    assert_same(next(resumed), expected)
    assert caplog.text.count("an old checkpoint") == 1


def test_a_position_among_other_records_is_refused():
    """As many records under the same name, of which one pixel differs."""
    others = [dict(record) for record in SCENES]
    others[7]["image"] = others[7]["image"] ^ (np.arange(SIZE * SIZE * 3) == 5).reshape(
        SIZE, SIZE, 3
    )
    state = stream().get_state()
    with pytest.raises(
        UserError, match=r"scenes has other records .* was \w{32}, is \w{32}; bring"
    ):
        stream(sources=sources(scenes=MemorySource("scenes", others))).set_state(state)


# --- stages ---


def follow(state: dict, config, **changes):
    """The stream of a stage after the one whose saved stream `state` is."""
    made = stream(config, **changes)
    made.continue_from(json.loads(json.dumps(state)))
    return made


def test_a_stage_reads_on_and_resumes_without_the_stage_before():
    first = stream(make_config(t2i=1), sources=sources())
    seen = [k for _ in range(2) for k in next(first).target[:, 0, 0, 0].tolist()]
    config = make_config(t2i=1, ie=1)
    second = follow(first.get_state(), config)
    batches = [next(second) for _ in range(3)]
    seen += [k for b in batches for k in b.target[b.task == list(TASKS).index("t2i"), 0, 0, 0]]
    assert len(set(seen[:NUM_RECORDS])) == NUM_RECORDS  # what the first did not read comes first
    second = follow(first.get_state(), config)
    next(second)
    resumed = stream(config)
    resumed.set_state(json.loads(json.dumps(second.get_state())))
    for batch in batches[1:]:
        assert_same(next(resumed), batch)


def test_a_damaged_record_counts_once_in_a_stage_that_begins_within_an_epoch():
    scenes = [make_scene(k % 250) for k in range(300)]
    config = make_config(batch_size=100, t2i=1.0)
    changes = dict(sources=dict(scenes=BrokenSource("scenes", scenes, {77, 177, 277})))
    first = stream(config, **changes)
    counted = [(next(first), first.counters()["quarantined"])[1] for _ in range(3)]
    assert counted[-1] == 3
    second = follow(first.get_state() | dict(next=100), config, **changes)
    for _ in range(6):
        next(second)
    assert second.counters()["quarantined"] == 3 - counted[0]
