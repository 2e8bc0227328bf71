"""Latents from a cache are those of the pictures that a run sees, in its buckets, or an error."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from data_pipelines import cache
from data_pipelines.cache import LATENTS, CachedLatents, latents_writer, picture_key, pictures
from data_pipelines.collate import Collator
from data_pipelines.held_out import HeldOut, HeldOutBatches, Hosts
from data_pipelines.mixture import Stream
from data_pipelines.run_rows import rows_of_run
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from tests.data_pipelines import toy
from tests.data_pipelines.test_tasks import make_record
from univg_jax.batch import BatchShape
from univg_jax.errors import AlreadyExistsError, NotFoundError, UserError
from univg_jax.settings import Config

SHAPES, CELL = ((16, 8), (8, 16)), 4
IDENTITY = dict(kind="mean", sha256="abc", channels=4, downsampling=CELL)
DRAWN = [name for name, task in TASKS.items() if task.draws_source]
STEPS = 4
ALONE = Hosts()


def encode(pixels: np.ndarray) -> np.ndarray:
    """A codec of two lines: the mean color of a cell, and its brightest value."""
    b, h, w, _ = pixels.shape
    cells = pixels.reshape(b, h // CELL, CELL, w // CELL, CELL, 3).astype(np.float32) / 255
    return np.concatenate([cells.mean((2, 4)), cells.max((2, 4, 5))[..., None]], axis=-1)


def make_records(seed: int) -> list[dict]:
    """Records with every field, in pictures of many shapes."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(12):
        h, w = rng.integers(8, 24, 2).tolist()
        planes = dict(
            image=rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
            source=rng.integers(0, 256, (h, w, 3), dtype=np.uint8),
            depth=rng.uniform(1, 20, (h, w)).astype(np.float32),
            edit_mask=np.ones((h, w), np.uint8),
            masks=np.ones((2, h, w), np.uint8),
        )
        record = make_record(**planes, caption="<p> beside a pig and an apple")
        records.append(record | dict(boxes=np.array([[0, 0, 1, 1], [0, 0, 1, 1]], np.float32)))
    return records


SOURCES, HELD_OUT = ({"all": MemorySource("all", make_records(seed))} for seed in (0, 1))


def make_config(**changes) -> Config:
    tasks = {
        name: dict(weight=1.0, sources=("all",), drop_text=0.2, drop_image=0.2) for name in TASKS
    }
    data = dict(resolution=16, face_resolution=8, num_tokens=8, batch_size=8, buckets=SHAPES)
    return Config.of(dict(tasks=tasks, data=data | dict(read_threads=1), **changes))


CONFIG = make_config()
PLAIN = Collator(tokenizer=toy.tokenize, shape=BatchShape.of(CONFIG.data))


def make_stream(collator=PLAIN, config=CONFIG) -> Stream:
    stream = Stream(config, collator=collator, sources=SOURCES)
    toy.OPEN.append(stream)
    return stream


def held_out(collator=PLAIN, shapes=SHAPES):
    for name in TASKS:
        options = dict(split="validation", num=5, shapes=shapes, sources=HELD_OUT)
        yield HeldOut(CONFIG, name, collator=collator, **options)


def rows(*, steps: int = STEPS, hosts: Hosts = ALONE):
    """The rows of a run, as lists."""
    return rows_of_run(CONFIG.data, make_stream(), held_out(), steps=steps, hosts=hosts)


def write_latents(folder, *, steps: int = STEPS, encode=encode, **options) -> int:
    options = dict(file_bytes=4000) | options
    writer = latents_writer(
        folder, encode=encode, identity=IDENTITY, batch_size=lambda shape: 4, **options
    )
    seen = set(writer.done)
    for row in itertools.chain.from_iterable(rows(steps=steps)):
        for name, pixels in pictures(row.example, task=row.task, drop=row.drop).items():
            if (key := picture_key(pixels)) not in seen:
                seen.add(key)
                writer.add(key, cache.Picture(pixels=pixels, name=name), group=pixels.shape)
    writer.flush()
    return writer.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_latents(folder)
    return folder


def with_cache(folder, *, draws_sources: bool = True, encode_missing: bool = False) -> Collator:
    options = dict(draws_sources=draws_sources, encode_missing=encode_missing)
    return dataclasses.replace(PLAIN, latents=CachedLatents(folder, **options))


def batches_of(collator) -> list:
    """All of a run's batches: of training, and held out."""
    stream = make_stream(collator)
    found = [next(stream) for _ in range(STEPS)]
    for examples in held_out(collator):
        found += HeldOutBatches(examples, batch_size=8, collator=collator)
    return found


def test_every_batch_of_the_run_has_the_latents_of_its_pictures(folder):
    plain, cached = batches_of(PLAIN), batches_of(with_cache(folder))
    shapes = set()
    for without, batch in zip(plain, cached, strict=True):
        for name in ("target", "source", "mask", "tokens", "sample_id"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(without, name))
        latents = batch.latents
        np.testing.assert_array_equal(latents.target, encode(batch.target))
        assert latents.target.dtype == np.float32
        assert latents.target_missing is None
        is_drawn = np.isin(batch.task, [list(TASKS).index(name) for name in DRAWN])
        np.testing.assert_array_equal(latents.source_missing, batch.has_source & is_drawn)
        has = batch.has_source & ~latents.source_missing
        np.testing.assert_array_equal(latents.source[has], encode(batch.source)[has])
        assert not latents.source[~has].any()
        shapes.add(batch.target.shape[1:3])
    assert shapes == set(SHAPES)
    (spec, _) = make_stream(with_cache(folder)).specs()
    like = next(batch for batch in cached if batch.target.shape == spec.target.shape)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), spec) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )


def test_rows_of_two_hosts_are_those_of_one():
    whole = list(rows())
    halves = [list(rows(hosts=Hosts(index=i, count=2, agree=agree_alone))) for i in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for one, *two in zip(whole, *halves, strict=True):
        ids = [(row.task, row.sample_id) for row in one]
        assert ids == [(row.task, row.sample_id) for half in two for row in half]


def agree_alone(verdicts):
    """As if the other host had found what it read usable."""
    return np.maximum(verdicts, 1)


def test_what_is_not_there_names_its_record_or_is_marked(folder):
    stream = make_stream(with_cache(folder))
    with pytest.raises(
        NotFoundError,
        match=r"has no latents of the (target|source) of all\[\d+\] for task '\w+', sample \d+; "
        r"make it anew \(univg data cache --what=latents\), or .*data\.encode_missing=True",
    ):
        [next(stream) for _ in range(STEPS + 5)]
    stream = make_stream(with_cache(folder, encode_missing=True, draws_sources=False))
    found = [next(stream) for _ in range(STEPS + 5)]
    assert not any(batch.latents.target_missing.any() for batch in found[:STEPS])
    missing = np.concatenate([batch.latents.target_missing for batch in found[STEPS:]])
    assert missing.any()
    for batch in found:
        there = ~batch.latents.target_missing
        want = encode(batch.target) * there[:, None, None, None]
        np.testing.assert_array_equal(batch.latents.target, want)
        assert not (batch.latents.source_missing & ~batch.has_source).any()


def test_where_nothing_can_be_missing_nothing_is_marked(folder):
    tasks = {"t2i": dict(weight=1.0, sources=("all",))}
    data = dataclasses.asdict(CONFIG.data)
    config = Config.of(dict(tasks=tasks, data=data))
    collator = with_cache(folder, draws_sources=False, encode_missing=True)
    assert next(make_stream(collator, config)).latents.source_missing is not None
    collator = with_cache(folder, draws_sources=False)
    latents = collator.spec(8).latents
    assert latents.target_missing is latents.source_missing is None


def test_other_codecs_and_finished_caches_are_refused(folder, tmp_path):
    latents = with_cache(folder).latents
    latents.check(IDENTITY)
    with pytest.raises(
        UserError, match=r"latents of another codec: sha256 is 'abc', this run's 'x'"
    ):
        latents.check(IDENTITY | dict(sha256="x"))
    with pytest.raises(AlreadyExistsError, match=r"has a cache; .*latents\.json"):
        write_latents(folder)
    with pytest.raises(NotFoundError, match=r"no latents\.json: not a finished cache"):
        with_cache(tmp_path)


def test_latents_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(UserError, match=r"^the latents of target is not finite"):
        write_latents(tmp_path, encode=lambda pixels: encode(pixels) + np.inf)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [0, 2, 5, 9])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, after):
    encoded = []

    def killed(pixels):
        if len(encoded) == after:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        write_latents(tmp_path, encode=killed)
    assert not (tmp_path / LATENTS.record).exists()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_latents(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    for name, written in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == written


def test_a_cache_in_a_bucket(folder, bucket):
    write_latents(bucket / "cache")
    here, there = (next(make_stream(with_cache(f))) for f in (folder, str(bucket / "cache")))
    jax.tree.map(np.testing.assert_array_equal, here, there)
