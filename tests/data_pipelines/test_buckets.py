"""A stream in buckets: one shape a step, no record left out, the same on any hosts."""

import collections
import itertools
import json

import jax
import numpy as np
import pytest

from data_pipelines import buckets
from data_pipelines.build import write_dataset
from data_pipelines.sources import MemorySource, open_source
from data_pipelines.tasks import TASKS
from tests.data_pipelines.toy import (
    BrokenSource,
    assert_same,
    join,
    make_config,
    sources,
    stream,
)
from univg_jax.errors import UserError
from univg_jax.images import png_bytes

SHAPES = ((12, 8), (8, 8), (8, 12))
SIZES = [(9, 6), (8, 8), (20, 30), (16, 15), (10, 20), (30, 8), (8, 9), (5, 10), (64, 64)]
NEAREST = [0, 1, 2, 1, 2, 0, 1, 2, 1]


def make_picture(k: int) -> dict:
    """A record of its own shape, whose picture tells its number."""
    image = np.full((*SIZES[k % len(SIZES)], 3), k, np.uint8)
    masks = np.ones((1, *image.shape[:2]), np.uint8)
    text = dict(caption=f"pig {k}", instruction=f"do {k}", expressions=[f"the pig {k}"])
    return dict(image=image, source=255 - image, masks=masks, **text)


PICTURES = [make_picture(k) for k in range(27)]


def config(shapes=SHAPES, **weights):
    made = make_config(**(dict(batch_size=4, t2i=0.5, ie=0.3, ip=0.15, seg=0.05) | weights))
    made.data.buckets = shapes
    return made


def pictures(**changes):
    return sources(scenes=MemorySource("scenes", PICTURES), **changes)


def open_stream(made=None, **changes):
    return stream(made or config(), **dict(sources=pictures()) | changes)


def test_each_record_is_in_the_bucket_of_its_shape():
    found = buckets.split(MemorySource("scenes", PICTURES[:9]), SHAPES)
    assert [bucket.records.tolist() for bucket in found] == [
        [k for k in range(9) if NEAREST[k] == b] for b in range(3)
    ]
    assert len({bucket.name for bucket in found}) == 3
    (whole,) = buckets.split(MemorySource("scenes", PICTURES), SHAPES[:1])
    assert (whole.records, whole.name) == (range(27), None)


def test_rows_of_a_step_have_the_shape_of_their_pictures():
    made, seen = open_stream(), collections.defaultdict(collections.Counter)
    for batch in itertools.islice(made, 60):
        shape = batch.target.shape[1:3]
        names = np.array(list(TASKS))[batch.task]
        # Of seg the target is a mask; the source shows the record, and the others' target does.
        number = np.where(names == "seg", batch.source[:, 0, 0, 0], batch.target[:, 0, 0, 0])
        assert all(SHAPES[NEAREST[k % 9]] == shape for k in number)
        assert batch.source.shape[1:3] == batch.mask.shape[1:3] == shape
        for name, k in zip(names, number):
            seen[name][int(k)] += 1
    assert len(seen["t2i"]) == 27
    # Each bucket's epochs are whole: no record comes twice more often than another.
    for shape in range(3):
        counts = [seen["t2i"][k] for k in range(27) if NEAREST[k % 9] == shape]
        assert max(counts) - min(counts) <= 1


def test_tasks_keep_their_shares_over_all_buckets():
    made = open_stream(config(batch_size=40))
    counts = np.zeros(len(TASKS), int)
    for batch in itertools.islice(made, 100):
        counts += np.bincount(batch.task, minlength=len(TASKS))
    for name, share in made.shares.items():
        assert abs(counts[list(TASKS).index(name)] / counts.sum() - share) < 0.01


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_hosts_are_in_the_same_bucket_and_make_the_same_batches(hosts):
    alone = open_stream()
    parts = [open_stream(process_index=i, process_count=hosts) for i in range(hosts)]
    for _ in range(8):
        assert_same(join([next(part) for part in parts]), next(alone))


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_stream_in_buckets_resumes_at_any_step_on_other_hosts(steps):
    whole = open_stream()
    expected = list(itertools.islice(whole, steps + 3))
    first = open_stream()
    for _ in range(steps):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    parts = [open_stream(process_index=i, process_count=2) for i in range(2)]
    for part in parts:
        part.set_state(state)
    for batch in expected[steps:]:
        assert_same(join([next(part) for part in parts]), batch)


def test_one_bucket_is_the_plain_stream():
    squares = config(shapes=((8, 8),))
    plain = config(shapes=())
    for a, b in zip(itertools.islice(open_stream(squares), 5), open_stream(plain)):
        assert_same(a, b)
    assert open_stream(squares).get_state() == open_stream(plain).get_state()


def test_buckets_without_a_picture_are_no_part_of_the_stream():
    squares = dict(scenes=MemorySource("scenes", [p for p in PICTURES if p["image"].shape[0] > 60]))
    made = stream(config(), sources=squares)
    assert made.shapes == ((8, 8),)
    assert made.get_state() == stream(config(shapes=()), sources=squares).get_state()


def test_it_states_the_shapes_and_shares_of_its_buckets():
    made = open_stream()
    assert [share.shape for share in made.bucket_shares()] == list(made.shapes) == list(SHAPES)
    counts = [NEAREST.count(b) * 3 for b in range(3)]
    assert [share.records for share in made.bucket_shares()] == counts
    assert [share.share for share in made.bucket_shares()] == pytest.approx(
        [count / 27 for count in counts]
    )
    batches, specs = itertools.islice(made, 12), made.specs()
    shapes_of = lambda batch: jax.tree.map(lambda x: (x.shape, x.dtype), batch)  # noqa: E731
    assert len(specs) == 3
    for batch in batches:
        assert shapes_of(batch) in [shapes_of(spec) for spec in specs]


def test_a_damaged_record_is_replaced_by_the_next_of_its_bucket():
    whole = open_stream(config(batch_size=3, t2i=1.0, ie=0, ip=0, seg=0))
    broken = open_stream(
        config(batch_size=3, t2i=1.0, ie=0, ip=0, seg=0),
        sources=dict(scenes=BrokenSource("scenes", PICTURES, {2})),
    )
    replaced = set()
    for _ in range(12):
        a, b = next(whole).target[:, 0, 0, 0], next(broken).target[:, 0, 0, 0]
        assert set(a[a != b].tolist()) <= {2}
        replaced |= set(b[a != b].tolist())
    assert replaced == {4}  # the next of shape 8x12
    assert broken.counters()["quarantined"] == 1


def test_other_sizes_of_the_same_pictures_are_refused():
    class Resized(MemorySource):
        def sizes(self):
            return super().sizes()[:, ::-1]

    state = open_stream().get_state()
    with pytest.raises(UserError, match="8x12 with other records in them"):
        open_stream(sources=pictures() | dict(scenes=Resized("scenes", PICTURES))).set_state(state)


# --- sizes on disk ---


def write(folder) -> None:
    stored = [
        dict(image=png_bytes(picture["image"]), caption=picture["caption"]) for picture in PICTURES
    ]
    write_dataset(folder, {"train": stored})


def test_sizes_come_from_the_index_or_else_from_the_headers(tmp_path):
    write(tmp_path / "scenes")
    index = next((tmp_path / "scenes").glob("train.sizes.npy"), tmp_path / "scenes/train.sizes.npy")
    index.unlink(missing_ok=True)
    source = open_source(str(tmp_path / "scenes"), "train")
    expected = np.array([source.read(k)["image"].shape[:2] for k in range(27)])
    np.testing.assert_array_equal(source.sizes(), expected)
    np.save(index, expected[::-1].astype(np.uint16))
    found = open_source(str(tmp_path / "scenes"), "train").sizes()
    np.testing.assert_array_equal(found, expected[::-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            np.zeros((26, 2), np.uint16),
            r"sizes.npy has uint16 \(26, 2\), expected .*\(27, 2\)",
        ),
        (np.zeros((27, 2), np.float32), "train.sizes.npy has float32"),
        (b"", "train.sizes.npy is damaged: .*; build the dataset anew"),
        (b"\x93NUMPY\x01\x00", "train.sizes.npy is damaged"),
        (b"no index", "train.sizes.npy is damaged"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    write(tmp_path / "scenes")
    index = tmp_path / "scenes" / "train.sizes.npy"
    index.unlink(missing_ok=True)
    if isinstance(content, bytes):
        index.write_bytes(content)
    else:
        np.save(index, content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "scenes"), "train").sizes()
