"""MLPerf's validation loss: which row is at which time, the mean of means, and a model's loss."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.collate import Collator
from data_pipelines.examples import Example
from tests import helpers
from tests.evaluation import evaluation_cases as data
from univg_jax import sharding
from univg_jax.errors import NotFoundError
from univg_jax.evaluation import score
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import coco30k, mlperf_loss
from univg_jax.evaluation.benchmarks.mlperf_loss import Row
from univg_jax.images import to_float, write_png
from univg_jax.pipeline import Pipeline
from univg_jax.sampling import Generator
from univg_jax.settings import Config

losses = st.lists(st.floats(0, 10), min_size=1, max_size=40)


def scored(numbers):
    rows = [Row(k, "", "") for k in range(len(numbers))]
    return rows, [mlperf_loss.score(r, n) for r, n in zip(rows, numbers, strict=True)]


def test_times_come_in_turn_and_equally_often():
    times = mlperf_loss.times(mlperf_loss.SAMPLES)
    assert set(collections.Counter(times.tolist()).values()) == {29_696 // 8}
    assert times[:9].tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0]


@given(losses)
def test_the_loss_by_the_published_algorithm(numbers):
    """Sums and counts of each time, one sample after the other."""
    sums, counts, t = np.zeros(8), np.zeros(8), 0
    for number in numbers:
        sums[t] += number
        counts[t] += 1
        t = (t + 1) % 8
    means = [s / c for s, c in zip(sums, counts, strict=True) if c]
    found = mlperf_loss.summary(*scored(numbers))
    assert found["loss"] == pytest.approx(sum(means) / len(means))
    assert found["time_0_8"] == pytest.approx(means[0])


@given(losses)
def test_shards_of_any_size_make_the_whole(numbers):
    rows, scores = scored(numbers)
    turned = mlperf_loss.summary(rows[::-1], scores[::-1])
    whole = mlperf_loss.summary(rows, scores)
    assert {k: repr(v) for k, v in turned.items()} == {k: repr(v) for k, v in whole.items()}


# A model's loss

COUNT, SEED = 11, 5


@pytest.fixture
def rows(tmp_path):
    """Captions in the official file, and their pictures, of other shapes than the model's."""
    rng = np.random.default_rng(0)
    captions = [
        dict(image_id=20 + k, id=k, caption=" ".join(["a pig", "on grass", "at dawn"][: 1 + k % 3]))
        for k in range(COUNT)
    ]
    (tmp_path / "captions_val2014.json").write_text(json.dumps(dict(annotations=captions)))
    for k in range(COUNT):
        pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        write_png(tmp_path / coco30k.real_file(coco30k.Row(k, 20 + k, k, "")), pixels)
    return mlperf_loss.read(tmp_path, excerpt=True)


def pipeline(**mesh) -> Pipeline:
    """A tiny model whose last layer is not zero."""
    conditioner, frozen = helpers.tiny_conditioner()
    model, config = helpers.tiny_model(conditioner), Config.of(helpers.tiny_config())
    shape = helpers.SHAPE
    encoded = conditioner.encoded_spec(frozen, shape.spec(1))
    params = model.init_params(jax.random.key(0), *encoded)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    mesh = sharding.make_mesh(**mesh)
    params = jax.tree.unflatten(tree, noisy)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    return Pipeline(
        config=config,
        params=params,
        frozen=jax.device_put(frozen, sharding.replicated(mesh)),
        mesh=mesh,
        generator=Generator(model=model, conditioner=conditioner, sampler=config.sampling.sampler),
        collator=Collator(tokenizer=data.tokenize, shape=shape),
    )


def by_hand(pipe, rows) -> list[float]:
    """The loss of each row by its formula, without flow's functions, batches and meshes."""
    conditioner, model = pipe.generator.conditioner, pipe.generator.model
    params, frozen = jax.device_get((pipe.params, pipe.frozen))

    @jax.jit
    def loss(pixels, batch, index, t):
        z = conditioner.encode(frozen, to_float(pixels))
        e = jax.random.normal(jax.random.fold_in(jax.random.key(SEED), index), z.shape[1:])[None]
        conditions = conditioner.conditions(frozen, batch)
        v = model.apply({"params": params}, (1 - t) * z + t * e, t[None], conditions)
        return jnp.mean(jnp.square(v - (e - z)))

    losses = []
    for row in rows:
        with Image.open(row.picture) as picture:
            pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC))
        example = Example(target=pixels, text=row.caption)
        batch = pipe.collator([pipe.collator.row(example, task="t2i", sample_id=0)])
        t = jnp.float32((row.index % 8) / 8)
        losses.append(float(loss(pixels[None], batch, row.index, t)))
    return losses


def test_the_loss_of_a_model_on_any_mesh_is_that_by_hand(rows):
    bench = open_benchmark("mlperf_loss")
    pipes = [pipeline(data=8, fsdp=1), pipeline(data=2, fsdp=2, tensor=2)]
    expected = by_hand(pipes[0], rows)
    template = bench.score(rows[0], [], {})
    for pipe in pipes:
        found = bench.measure(pipe, rows, SEED)
        assert sorted(found) == list(range(COUNT))
        losses = [found[k]["loss"].total.sum() for k in range(COUNT)]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        table = score.gather(found, count=COUNT, template=template)
        scores = [{"loss": ratio} for ratio in table["loss"]]
        by_time = [np.mean(expected[t::8]) for t in range(8)]
        assert bench.summary(rows, scores)["loss"] == pytest.approx(np.mean(by_time), rel=1e-4)
        assert bench.quality(scores[0]) == pytest.approx(-expected[0], rel=1e-4)


def test_two_processes_measure_the_rows_of_one(rows, monkeypatch):
    """Each its own rows, in equally many batches that are filled up."""
    pipe = pipeline(data=8, fsdp=1)
    whole = mlperf_loss.measure(pipe, rows, SEED)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    found = {}
    for index in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        batches = list(mlperf_loss._batches(pipe, rows))
        assert [int(batch.valid.sum()) for _, batch in batches] == [6 - index]
        found |= {number: rows[number].index for numbers, _ in batches for number in numbers}
    assert found == {number: number for number in whole}


def test_nothing_is_asked_for_and_pictures_are_beside_the_captions(tmp_path, rows):
    bench = open_benchmark("mlperf_loss")
    assert bench.requests(rows) == []
    assert rows[0].picture == str(tmp_path / "val2014" / "COCO_val2014_000000000020.jpg")
    moved = open_benchmark("mlperf_loss:pictures=/p").read(tmp_path, excerpt=True)
    assert moved[0].picture == "/p/COCO_val2014_000000000020.jpg"
    with pytest.raises(NotFoundError, match=r"020.jpg does not exist: expected COCO's val2014"):
        bench.measure(pipeline(data=8, fsdp=1), moved, 0)
