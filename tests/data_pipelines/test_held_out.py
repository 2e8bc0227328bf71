"""Held-out examples: each once on any hosts, and read only as they are needed."""

import numpy as np
import pytest

from data_pipelines.held_out import HeldOut, HeldOutBatches
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from tests.data_pipelines.toy import (
    NUM_RECORDS,
    SCENES,
    SIZE,
    CountingSource,
    assert_same,
    join,
    make_collator,
    make_config,
    sources,
    text_of,
)
from univg_jax.errors import UserError
from univg_jax.settings import Config


def make(task: str, **options) -> HeldOut:
    options = dict(split="validation", sources=sources()) | options
    return HeldOut(Config.of(make_config()), task, **options)


def batches(task: str, **options) -> HeldOutBatches:
    options = dict(batch_size=8, collator=make_collator()) | options
    held_out = make(task, sources=options.pop("sources", sources()))
    return HeldOutBatches(held_out, **options)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batches_cover_each_record_once_on_any_hosts(hosts):
    parts = [list(batches("seg", process_index=i, process_count=hosts)) for i in range(hosts)]
    whole = [join(pieces) for pieces in zip(*parts, strict=True)]
    # 11 of the 23 scenes have an expression: two batches of 8, five rows of padding.
    assert [batch.valid.sum() for batch in whole] == [8, 3]
    ids = np.concatenate([batch.sample_id[batch.valid] for batch in whole])
    np.testing.assert_array_equal(ids, np.arange(11))
    texts = [text_of(t) for batch in whole for t in batch.tokens[batch.valid]]
    assert texts == [f"<seg> the pig {k}" for k in range(1, NUM_RECORDS, 2)]


def test_batches_can_be_iterated_anew():
    made = batches("ip")
    first, second = list(made), list(made)
    assert len(first) == len(second) == len(made) == 3
    for a, b in zip(first, second):
        assert_same(a, b)


def test_it_stops_at_the_number_asked_for():
    assert [r["caption"] for r in make("t2i", num=5)] == [f"pig {k}" for k in range(5)]
    assert [r["caption"] for r in make("seg", num=2)] == ["pig 1", "pig 3"]
    assert len(make("t2i", num=99)) == NUM_RECORDS
    with pytest.raises(IndexError):
        make("t2i", num=5)[5]


def test_sources_follow_one_another():
    config = make_config(t2i=1.0, seg=1.0)
    config.tasks.t2i.sources = config.tasks.seg.sources = ("few", "none", "scenes")
    given = dict(few=MemorySource("few", SCENES[2:5]), none=MemorySource("none", SCENES[:1]))
    made = HeldOut(Config.of(config), "seg", split="test", num=3, sources=sources(**given))
    assert [r["caption"] for r in made] == ["pig 3", "pig 1", "pig 3"]
    made = HeldOut(Config.of(config), "t2i", split="test", num=5, sources=sources(**given))
    assert [r["caption"] for r in made] == ["pig 2", "pig 3", "pig 4", "pig 0", "pig 0"]


def test_records_are_whole_and_center_cropped():
    image = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    image[:, SIZE : 2 * SIZE] = 255
    wide = dict(image=image, caption="a pig", depth=np.ones((SIZE, 3 * SIZE), np.float32))
    record = make("t2i", sources=dict(scenes=MemorySource("scenes", [wide])))[0]
    assert (record["image"] == 255).all()
    assert record["image"].shape == (SIZE, SIZE, 3)
    assert record["depth"].shape == (SIZE, SIZE)
    assert record["caption"] == "a pig"


def test_a_record_is_read_when_it_is_asked_for_and_never_kept():
    source = CountingSource("scenes", SCENES)
    made = make("t2i", sources=dict(scenes=source))
    assert len(made) == NUM_RECORDS
    assert source.reads == []
    for _ in range(2):
        assert made[3]["caption"] == "pig 3"
    made.example(4)
    assert source.reads == [(3, None), (3, None), (4, TASKS["t2i"].needs)]


def test_a_host_reads_its_own_rows_one_batch_at_a_time():
    source = CountingSource("scenes", SCENES)
    options = dict(sources=dict(scenes=source), process_index=1, process_count=2)
    iterator = iter(batches("t2i", **options))
    assert source.reads == []
    next(iterator)
    assert [index for index, _ in source.reads] == [4, 5, 6, 7]
    next(iterator)
    assert [index for index, _ in source.reads] == [4, 5, 6, 7, 12, 13, 14, 15]
    source.reads.clear()
    next(iterator)  # rows 20 to 22, and one of padding
    assert [index for index, _ in source.reads] == [20, 21, 22]


def test_only_a_task_that_may_refuse_records_looks_for_suitable_ones():
    source = CountingSource("scenes", SCENES)
    made = make("seg", num=3, sources=dict(scenes=source))
    # up to the third suitable one, and only the fields of the task
    assert source.reads == [(k, TASKS["seg"].needs) for k in range(6)]
    source.reads.clear()
    assert made[1]["caption"] == "pig 3"
    assert source.reads == [(3, None)]
    assert {name for name, task in TASKS.items() if task.may_refuse} == {"lg", "pose", "seg"}


def test_no_suitable_record_gives_no_batch():
    plain = [scene | dict(expressions=[""]) for scene in SCENES]
    made = batches("seg", sources=dict(scenes=MemorySource("scenes", plain)))
    assert list(made) == []


def test_a_wrong_task_or_record_is_named():
    with pytest.raises(UserError, match="unknown task of this config 'segm'; did you mean 'seg'"):
        make("segm")
    broken = [SCENES[0], SCENES[1] | dict(caption="")]
    with pytest.raises(UserError, match=r"^scenes\[1\]: field 'caption' is empty"):
        list(batches("t2i", sources=dict(scenes=MemorySource("scenes", broken))))
