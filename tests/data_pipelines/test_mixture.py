import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data_pipelines import mixture, tasks
from data_pipelines.datasets import emoji_scenes
from data_pipelines.mixture import make_stream
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from data_pipelines.tokenizer import TokenizedText

SIZE, NUM_RECORDS = 8, 23


def tokenize(text: str, num_tokens: int) -> TokenizedText:
    """Characters as tokens; a slot where `<p>` begins."""
    tokens = np.zeros(num_tokens, np.int32)
    codes = [ord(c) for c in text[:num_tokens]]
    tokens[: len(codes)] = codes
    slot = np.zeros(num_tokens, bool)
    if 0 <= text.find("<p>") < num_tokens:
        slot[text.find("<p>")] = True
    text_mask = np.arange(num_tokens) < len(codes)
    return TokenizedText(tokens=tokens, text_mask=text_mask, identity_slot=slot, num_truncated=0)


def text_of(tokens: np.ndarray) -> str:
    return "".join(chr(t) for t in tokens if t)


def make_scene(k: int) -> dict:
    """A record whose image tells its number."""
    image = np.full((SIZE, SIZE, 3), k, np.uint8)
    masks = np.ones((1, SIZE, SIZE), np.uint8)
    return dict(
        image=image,
        source=255 - image,
        caption=f"pig {k}",
        instruction=f"do {k}",
        masks=masks,
        expressions=[f"the pig {k}" if k % 2 else ""],
    )


SCENES = [make_scene(k) for k in range(NUM_RECORDS)]
PERSONS = [
    dict(
        image=np.full((SIZE, SIZE, 3), 100 + k, np.uint8),
        caption="<p> smiles",
        face=np.full((4, 4, 3), k, np.uint8),
    )
    for k in range(7)
]


def sources(**changes) -> dict:
    return (
        dict(scenes=MemorySource("scenes", SCENES), persons=MemorySource("persons", PERSONS))
        | changes
    )


def make_config(batch_size: int = 8, seed: int = 0, **weights: float) -> ConfigDict:
    weights = weights or dict(t2i=0.28, ie=0.47, ip=0.2, seg=0.05)
    c = ConfigDict(dict(seed=seed))
    c.tasks = {
        name: dict(
            weight=weight,
            sources=("persons" if name == "id" else "scenes",),
            drop_text=0.0,
            drop_image=0.0,
        )
        for name, weight in weights.items()
    }
    c.data = dict(
        dir="",
        resolution=SIZE,
        num_tokens=40,
        face_resolution=4,
        batch_size=batch_size,
        read_threads=0,
        prefetch=0,
    )
    return c


def stream(config: ConfigDict | None = None, **changes) -> mixture.Stream:
    changes = dict(sources=sources()) | changes
    return make_stream(config or make_config(), tokenizer=tokenize, **changes)


def join(parts) -> object:
    """The global batch of all hosts' parts."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- the order ---


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**12),
)
def test_a_visit_counts_the_earlier_ones(weights, seed, start):
    rotation = mixture.Rotation(weights, seed=seed)
    counts: dict[int, int] = {}
    for position in range(200):
        component, visit = rotation[position]
        assert visit == counts.get(component, 0)
        counts[component] = visit + 1
    # Anywhere in the stream: the next visit of a component is one more.
    last: dict[int, int] = {}
    for position in range(start, start + 50):
        component, visit = rotation[position]
        assert visit == last.get(component, visit - 1) + 1
        last[component] = visit


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [8, 64, 144, 512])
@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (0.28, 0.47, 0.2, 0.01, 0.01, 0.01, 0.02), (1.0,) * 4]
)
def test_every_host_gets_each_share(hosts, batch_size, weights):
    rotation = mixture.Rotation(weights, seed=3)
    steps = 8192 // batch_size
    positions = np.arange(steps * batch_size).reshape(steps, hosts, -1)
    parts = np.array([rotation[int(g)][0] for g in positions.ravel()]).reshape(positions.shape)
    expected = np.array(weights) / np.sum(weights)
    whole = np.bincount(parts.ravel(), minlength=len(weights)) / parts.size
    # The discrepancy of a golden rotation is below 3 log(N) / N: here 0.0033.
    assert np.abs(whole - expected).max() < 0.0033
    for host in range(hosts):
        realised = np.bincount(parts[:, host].ravel(), minlength=len(weights)) / parts[:, host].size
        # A host's slice of 144 (a Fibonacci number) barely moves between steps, so that each of its
        # windows errs the same way; a window of n errs by less than 2/n, and drifting averages most
        # of it away.
        bound = 0.0033 * hosts + (2 * hosts / batch_size if batch_size == 144 else 0)
        assert np.abs(realised - expected).max() < bound


# --- the stream ---


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
    by_size = mixture.components(config.tasks, sources=sources(small=small))
    assert [part.weight for part in by_size] == pytest.approx([23 / 26, 3 / 26])
    by_weight = {"t2i": dict(weight=2.0, sources=dict(scenes=1, small=3))}
    parts = mixture.components(by_weight, sources=sources(small=small))
    assert [(part.source.name, part.weight) for part in parts] == [("scenes", 0.5), ("small", 1.5)]


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


# --- faults ---


class BrokenSource(MemorySource):
    def __init__(self, name, items, broken):
        super().__init__(name, items)
        self.broken = broken

    def read(self, index, fields=None):
        if index in self.broken:
            raise OSError("truncated image")
        return super().read(index, fields)


def test_a_corrupt_record_is_replaced_by_the_next_and_counted(caplog):
    scenes = [make_scene(k) for k in range(200)]
    config = make_config(batch_size=200, t2i=1.0)
    broken = stream(config, sources=dict(scenes=BrokenSource("scenes", scenes, {77})))
    whole = stream(config, sources=dict(scenes=MemorySource("scenes", scenes)))
    a, b = next(broken), next(whole)
    differ = (a.target != b.target).any(axis=(1, 2, 3))
    assert (a.target[differ, 0, 0, 0], b.target[differ, 0, 0, 0]) == (78, 77)
    assert broken.quarantined == 1
    assert "quarantined scenes[77]" in caplog.text
    assert "truncated image" in caplog.text


def test_too_many_corrupt_records_end_the_run():
    scenes = [make_scene(k % 250) for k in range(500)]
    config = make_config(batch_size=500, t2i=1.0)
    with pytest.raises(ValueError, match=r"of \d+ records read are unusable \(more than 1%\)"):
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
    with pytest.raises(ValueError, match=r"task 'id', persons\[0\]: field 'caption' has no <p>"):
        stream(make_config(id=1.0), sources=sources(persons=MemorySource("persons", persons)))
    with pytest.raises(ValueError, match=r"task 'lg' cannot read scenes: no field 'boxes'"):
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
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is matched below
        stream(make_config(**weights))
    assert message in str(error.value)


def test_a_task_of_weight_zero_is_left_out():
    assert stream(make_config(t2i=1.0, ie=0.0)).shares == dict(t2i=1.0)


def test_a_state_of_another_mixture_is_refused():
    state = stream().get_state()
    for other in (make_config(t2i=1.0), make_config(seed=1)):
        with pytest.raises(ValueError, match="the saved data position belongs to another mixture"):
            stream(other).set_state(state)
    shorter = dict(scenes=MemorySource("scenes", SCENES[:-1]))
    with pytest.raises(ValueError, match="components was"):
        stream(sources=shorter).set_state(state)


def test_batches_must_divide_by_hosts():
    with pytest.raises(ValueError, match="global batch size 8 does not divide by 3 hosts"):
        stream(process_count=3)


def test_dropout_must_be_a_probability():
    config = make_config(t2i=1.0)
    config.tasks.t2i.drop_text, config.tasks.t2i.drop_image = 0.6, 0.6
    with pytest.raises(ValueError, match="expected probabilities that sum to at most 1"):
        stream(config)


def test_records_on_disk_serve_every_task(tmp_path):
    emoji_scenes.build(tmp_path, resolution=16, num_scenes=16, nouns=4, progress=False, processes=1)
    config = make_config(batch_size=16, **dict.fromkeys(TASKS, 1.0))
    config.data.dir, config.data.resolution, config.data.read_threads, config.data.prefetch = (
        str(tmp_path),
        16,
        2,
        2,
    )
    for name, task in config.tasks.items():
        task.sources = (dict(ie="edits", pose="puppets", id="persons").get(name, "scenes"),)
    batch = next(stream(config, sources=None))
    np.testing.assert_array_equal(np.bincount(batch.task, minlength=8) > 0, True)
    assert stream(config, sources=None).quarantined == 0


# --- evaluation ---


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_covers_each_record_once_on_any_hosts(hosts):
    parts = [
        list(
            mixture.eval_batches(
                make_config(),
                "seg",
                split="validation",
                batch_size=8,
                tokenizer=tokenize,
                sources=sources(),
                process_index=i,
                process_count=hosts,
            )
        )
        for i in range(hosts)
    ]
    whole = [join(batches) for batches in zip(*parts, strict=True)]
    # 11 of the 23 scenes have an expression: two batches of 8, five rows of padding.
    assert [batch.valid.sum() for batch in whole] == [8, 3]
    ids = np.concatenate([batch.sample_id[batch.valid] for batch in whole])
    np.testing.assert_array_equal(ids, np.arange(11))
    texts = [text_of(t) for batch in whole for t in batch.tokens[batch.valid]]
    assert texts == [f"<seg> the pig {k}" for k in range(1, NUM_RECORDS, 2)]


def test_evaluation_stops_at_the_number_asked_for():
    records = mixture.eval_records(
        make_config(), "t2i", split="validation", num=5, sources=sources()
    )
    assert [record["caption"] for record in records] == [f"pig {k}" for k in range(5)]


def test_null_conditions_differ_in_nothing_else():
    def make(drop):
        return mixture.example_batch(
            SCENES[:3],
            task="ip",
            tokenizer=tokenize,
            resolution=SIZE,
            num_tokens=40,
            face_resolution=4,
            drop=drop,
            seed=5,
            sample_ids=[4, 9, 2],
            size=4,
        )

    full, text, image, both = (make(drop) for drop in ("none", "text", "image", "both"))
    np.testing.assert_array_equal(full.valid, [True, True, True, False])
    np.testing.assert_array_equal(full.sample_id, [4, 9, 2, 2])
    assert {text_of(t) for t in text.tokens} == {text_of(t) for t in both.tokens} == {"<ip>"}
    assert (image.mask == 1).all()
    assert not both.has_source.any()
    same = dict(tokens=full.tokens, text_mask=full.text_mask)
    assert_same(dataclasses.replace(text, **same), full)
    same = dict(source=full.source, mask=full.mask, has_source=full.has_source)
    assert_same(dataclasses.replace(image, **same), full)


def test_a_batch_of_no_records_is_an_error():
    with pytest.raises(ValueError, match="no record of task 't2i'"):
        mixture.example_batch(
            [],
            task="t2i",
            tokenizer=tokenize,
            resolution=8,
            num_tokens=8,
            face_resolution=4,
            drop="none",
        )
    assert tasks.prompt("t2i", "") == "<t2i>"
