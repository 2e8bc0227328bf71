"""Held-out examples: each once on any hosts, and read only as they are needed."""

import concurrent.futures
import dataclasses
import errno
import threading

import numpy as np
import pytest

from data_pipelines.held_out import HeldOut, HeldOutBatches, Hosts
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from tests.data_pipelines.toy import (
    NUM_RECORDS,
    SCENES,
    SIZE,
    BrokenSource,
    CountingSource,
    assert_same,
    join,
    make_collator,
    make_config,
    sources,
    text_of,
    tokenize,
)
from univg_jax.errors import UnreachableError, UserError
from univg_jax.settings import Config


def make(task: str, **options) -> HeldOut:
    options = dict(split="validation", sources=sources(), collator=make_collator()) | options
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
    assert [r["expressions"] for r in make("seg", num=2)] == [["the pig 1"], ["the pig 3"]]
    assert len(make("t2i", num=99)) == NUM_RECORDS
    with pytest.raises(IndexError):
        make("t2i", num=5)[5]


def test_sources_follow_one_another():
    config = make_config(t2i=1.0, seg=1.0)
    config.tasks.t2i.sources = config.tasks.seg.sources = ("few", "none", "scenes")
    given = dict(few=MemorySource("few", SCENES[2:5]), none=MemorySource("none", SCENES[:1]))
    options = dict(split="test", collator=make_collator(), sources=sources(**given))
    made = HeldOut(Config.of(config), "seg", num=3, **options)
    assert [r["expressions"] for r in made] == [[f"the pig {k}"] for k in (3, 1, 3)]
    made = HeldOut(Config.of(config), "t2i", num=5, **options)
    assert [r["caption"] for r in made] == ["pig 2", "pig 3", "pig 4", "pig 0", "pig 0"]


def test_records_have_the_fields_asked_for_and_are_center_cropped():
    image = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    image[:, SIZE : 2 * SIZE] = 255
    wide = dict(image=image, caption="a pig", depth=np.ones((SIZE, 3 * SIZE), np.float32))
    source = MemorySource("scenes", [wide])
    record = make("t2i", sources=dict(scenes=source), fields=("depth",))[0]
    assert (record["image"] == 255).all()
    assert record["image"].shape == (SIZE, SIZE, 3)
    assert record["depth"].shape == (SIZE, SIZE)
    assert record["caption"] == "a pig"


def test_each_record_is_read_once_to_know_whether_it_can_be_used_and_never_kept():
    source, needs = CountingSource("scenes", SCENES), TASKS["seg"].needs
    made = make("seg", num=3, sources=dict(scenes=source))
    # up to the third usable one, and only the fields of the task
    assert source.reads == [(k, needs) for k in range(6)]
    source.reads.clear()
    for _ in range(2):
        assert made[1]["expressions"] == ["the pig 3"]
    made.row(2)
    assert source.reads == [(3, needs), (3, needs), (5, needs)]


def test_a_host_reads_its_own_rows_one_batch_at_a_time():
    source = CountingSource("scenes", SCENES)
    options = dict(sources=dict(scenes=source), process_index=1, process_count=2)
    iterator = iter(batches("t2i", **options))
    source.reads.clear()
    next(iterator)
    assert [index for index, _ in source.reads] == [4, 5, 6, 7]
    next(iterator)
    assert [index for index, _ in source.reads] == [4, 5, 6, 7, 12, 13, 14, 15]
    source.reads.clear()
    next(iterator)  # rows 20 to 22, and one of padding
    assert [index for index, _ in source.reads] == [20, 21, 22]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_damaged_record_is_left_out_by_name_on_all_hosts_alike(hosts, caplog):
    broken = dict(scenes=BrokenSource("scenes", SCENES, {0, 5, 6}))
    parts = [
        list(batches("t2i", sources=broken, process_index=i, process_count=hosts))
        for i in range(hosts)
    ]
    whole = [join(pieces) for pieces in zip(*parts, strict=True)]
    texts = [text_of(t) for batch in whole for t in batch.tokens[batch.valid]]
    assert texts == [f"<t2i> pig {k}" for k in range(NUM_RECORDS) if k not in (0, 5, 6)]
    ids = np.concatenate([batch.sample_id[batch.valid] for batch in whole])
    np.testing.assert_array_equal(ids, np.arange(NUM_RECORDS - 3))
    assert "quarantined scenes[5] for task 't2i': ValueError: truncated image" in caplog.text


def test_a_prompt_that_cannot_be_tokenized_is_damage_too(caplog):
    def tokenizer(text, num_tokens):
        if "pig 1" in text:
            raise UserError("prompt 'pig 1' would lose <p>")
        return tokenize(text, num_tokens)

    collator = dataclasses.replace(make_collator(), tokenizer=tokenizer)
    made = make("t2i", num=2, collator=collator)
    assert [r["caption"] for r in made] == ["pig 0", "pig 2"]
    assert "quarantined scenes[1] for task 't2i': prompt 'pig 1' would lose <p>" in caplog.text


def test_a_split_without_one_usable_record_is_refused():
    plain = [scene | dict(expressions=[""]) for scene in SCENES]
    message = r"no record of scenes can serve task 'seg'; the last: scenes\[22\] for task 'seg'"
    with pytest.raises(UserError, match=message):
        make("seg", sources=dict(scenes=MemorySource("scenes", plain)))
    with pytest.raises(UserError, match="no record of scenes can serve task 't2i'; the last: "):
        make("t2i", sources=dict(scenes=BrokenSource("scenes", SCENES[:3], {0, 1, 2})))


def test_far_too_many_damaged_records_are_refused_before_all_are_read():
    broken = dict(scenes=BrokenSource("scenes", SCENES * 10, set(range(5, 230))))
    with pytest.raises(UserError, match=r"records read are unusable \(more than data.max_bad_frac"):
        make("t2i", sources=broken)


def test_a_wrong_task_or_field_is_named():
    with pytest.raises(UserError, match="unknown task of this config 'segm'; did you mean 'seg'"):
        make("segm")
    with pytest.raises(UserError, match="task 't2i' cannot read scenes: no field 'depth'"):
        make("t2i", fields=("depth",))


def test_sources_with_weights_follow_one_another_too():
    config = make_config(t2i=1.0).to_dict()
    config["tasks"]["t2i"]["sources"] = dict(none=0.0, few=3.0, scenes=1.0)
    given = sources(few=MemorySource("few", SCENES[2:4]))
    options = dict(split="test", collator=make_collator(), sources=given)
    made = HeldOut(Config.of(config), "t2i", num=3, **options)
    assert [r["caption"] for r in made] == ["pig 2", "pig 3", "pig 0"]


# --- several processes ---


def together(count: int, make_one) -> list:
    """What `make_one(hosts)` gives on each of `count` hosts, which agree with one another."""
    barrier, given = threading.Barrier(count), {}

    def agree(own):
        given[threading.get_ident()] = own
        barrier.wait(20)
        most = np.max(list(given.values()), axis=0)
        barrier.wait(20)
        return most

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        futures = [
            pool.submit(make_one, Hosts(index=i, count=count, agree=agree)) for i in range(count)
        ]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_reading_and_find_the_same_records(count):
    given = [CountingSource("scenes", SCENES) for _ in range(count)]
    made = together(
        count,
        lambda hosts: make("seg", num=5, hosts=hosts, sources=dict(scenes=given[hosts.index])),
    )
    reads = [[index for index, _ in source.reads] for source in given]
    # Each by one host.
    assert sorted(index for own in reads for index in own) == list(range(10))
    alone = make("seg", num=5)
    for held_out in made:
        assert [r["expressions"] for r in held_out] == [r["expressions"] for r in alone]
        for i in range(5):
            assert_same(held_out.row(i).prompt.tokens, alone.row(i).prompt.tokens)


def test_hosts_agree_on_damage_that_one_of_them_has_read():
    broken = dict(scenes=BrokenSource("scenes", SCENES, {0, 3}))
    made = together(2, lambda hosts: make("t2i", hosts=hosts, sources=broken))
    for held_out in made:
        expected = [f"pig {k}" for k in range(NUM_RECORDS) if k not in (0, 3)]
        assert [r["caption"] for r in held_out] == expected
    broken = dict(scenes=BrokenSource("scenes", SCENES * 10, set(range(5, 230))))
    for error in together(2, lambda hosts: make("t2i", hosts=hosts, sources=broken)):
        assert isinstance(error, UserError)
        assert "records read are unusable" in str(error)


def test_no_host_waits_for_one_whose_storage_does_not_answer():
    class Unreachable(MemorySource):
        def read(self, index, fields=None):
            if index == 3:
                raise OSError(errno.EIO, "bucket does not answer")
            return super().read(index, fields)

    given = dict(scenes=Unreachable("scenes", SCENES))
    errors = together(2, lambda hosts: make("t2i", hosts=hosts, sources=given))
    assert [type(error) for error in errors] == [UnreachableError] * 2
    assert "bucket does not answer" in str(errors[1])


# --- buckets ---

SHAPES = ((12, 8), (8, 8), (8, 12))
TALL, SQUARE, WIDE = (
    [scene | dict(image=np.full((*size, 3), k, np.uint8)) for k, scene in enumerate(SCENES[:n])]
    for size, n in (((30, 18), 3), ((9, 10), 9), ((20, 31), 2))
)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_batches_in_buckets_have_one_shape_each_and_cover_all(hosts):
    mixed = [*SQUARE[:4], *WIDE, *TALL, *SQUARE[4:]]
    given = dict(scenes=MemorySource("scenes", mixed))
    held_out = make("t2i", sources=given, shapes=SHAPES)
    parts = [
        list(
            HeldOutBatches(
                held_out,
                batch_size=8,
                collator=make_collator(),
                process_index=i,
                process_count=hosts,
            )
        )
        for i in range(hosts)
    ]
    whole = [join(pieces) for pieces in zip(*parts, strict=True)]
    assert [batch.target.shape[1:3] for batch in whole] == [(12, 8), (8, 8), (8, 8), (8, 12)]
    assert [int(batch.valid.sum()) for batch in whole] == [3, 8, 1, 2]
    ids = np.concatenate([batch.sample_id[batch.valid] for batch in whole])
    assert sorted(ids.tolist()) == list(range(14))
    for batch in whole:
        for i, texts in zip(batch.sample_id, batch.tokens, strict=True):
            assert text_of(texts) == f"<t2i> {mixed[i]['caption']}"


def test_a_record_is_tried_in_its_own_shape():
    """Of a box at the left of a wide picture nothing is left in a tall window."""
    boxes, phrases = np.float32([[0.02, 0.3, 0.1, 0.6]]), ["a pig"]
    wide = [scene | dict(caption="a pig", boxes=boxes, phrases=phrases) for scene in WIDE]
    config = Config.of(make_config(lg=1.0))
    options = dict(split="validation", sources=dict(scenes=MemorySource("scenes", wide)))
    options |= dict(collator=make_collator())
    assert len(HeldOut(config, "lg", shapes=SHAPES, **options)) == len(wide)
    with pytest.raises(UserError, match="no record of scenes can serve task 'lg'"):
        HeldOut(config, "lg", shapes=SHAPES[:1], **options)
