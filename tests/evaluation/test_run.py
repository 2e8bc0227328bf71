"""The same numbers however cases are batched or sharded, and nothing is done twice."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.collate import Collator
from tests import helpers, processes
from tests.evaluation import evaluation_cases as data
from univg_jax import sharding
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import Cases
from univg_jax.evaluation.benchmarks.emoji_scenes import BENCHMARK
from univg_jax.evaluation.run import Evaluator, evaluate
from univg_jax.pipeline import Pipeline
from univg_jax.sampling import Generator
from univg_jax.settings import Config

TASKS = ("ie", "seg", "depth")


def run(out, *, batch_size=4, count=7, settings=None, model=data.blurred, tasks=TASKS, **systems):
    records = [data.scene(i) for i in range(20)]
    systems = {"model": model, "untrained": data.noise, "real": lambda b: b.target, **systems}
    evaluator = Evaluator(
        benchmark=BENCHMARK,
        systems={name: system for name, system in systems.items() if system},
        collator=data.COLLATOR,
        scorers={},
        settings=settings or {"checkpoint_step": 3, "seed": 0},
        out=out,
        batch_size=batch_size,
    )
    cases, train = (
        {task: data.make_cases(task, chosen) for task in tasks}
        for chosen in (records[:count], records[10:])
    )
    return evaluator.run(cases, train=train)


def test_results_and_files(tmp_path):
    results = run(tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == {"checkpoint_step": 3, "seed": 0, "scorers": "none"}
    edit = results["tasks"]["ie"]
    assert edit["beats"] == {"untrained": True, "trivial": True}
    assert edit["systems"]["real"]["l1_changed"]["value"] == 0
    assert edit["systems"]["model"]["l1_changed"]["count"] == 7
    assert edit["systems"]["model"]["l1_changed"]["stderr"] > 0
    assert len(list((tmp_path / "ie").glob("???.png"))) == 7
    assert edit["samples"][1] == {
        "prompt": edit["samples"][1]["prompt"],
        "input": "ie/001_input.png",
        "target": "ie/001_target.png",
        "output": "ie/001.png",
    }
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "ie/001_target.png")), data.scene(1)["image"]
    )


def test_a_model_that_copies_the_source_does_not_beat_it(tmp_path):
    before = {i: data.scene(i)["source"] for i in range(7)}
    results = run(tmp_path, model=lambda batch: np.stack([before[int(i)] for i in batch.sample_id]))
    assert results["tasks"]["ie"]["trivial"]["chosen"] == "a copy of the source"
    assert not results["tasks"]["ie"]["beats"]["trivial"]  # a tie is not a victory


def test_batching_and_padding_change_nothing(tmp_path):
    results = [run(tmp_path / str(b), batch_size=b) for b in (1, 4, 16)]
    assert results[0]["tasks"] == results[1]["tasks"] == results[2]["tasks"]


def test_results_of_the_same_settings_are_kept(tmp_path):
    calls = []

    def counted(batch):
        calls.append(len(batch.sample_id))
        return data.blurred(batch)

    first = run(tmp_path, model=counted)
    done = len(calls)
    assert run(tmp_path, model=counted) == first
    assert len(calls) == done
    run(tmp_path, model=counted, settings={"checkpoint_step": 4, "seed": 0})
    assert len(calls) == 2 * done
    run(tmp_path, model=counted, settings={"checkpoint_step": 4, "seed": 0}, count=8)
    assert len(calls) > 2 * done


def test_an_interrupted_evaluation_goes_on_with_the_next_task(tmp_path):
    calls = []

    def fails_at_depth(batch):
        calls.append(len(batch.sample_id))
        if len(calls) == 5:  # two batches of each task
            raise KeyboardInterrupt
        return data.blurred(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model=fails_at_depth)
    assert list(json.loads((tmp_path / "results.json").read_text())["tasks"]) == ["ie", "seg"]
    results = run(tmp_path, model=fails_at_depth)
    assert len(calls) == 7
    assert list(results["tasks"]) == list(TASKS)


def test_bad_calls_are_named(tmp_path):
    with pytest.raises(ValueError, match="systems must have 'model'"):
        run(tmp_path, model=None)
    with pytest.raises(UserError, match="no example of task 'ie'"):
        run(tmp_path, count=0)
    with pytest.raises(UserError, match="needs the scorer 'scene'"):
        run(tmp_path, tasks=("t2i",))
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="not the results of an evaluation"):
        run(tmp_path)


PROGRAM = """
import sys
from tests import processes
processes.join()
from tests.evaluation.test_run import run
run(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_agree_with_one_bitwise(tmp_path):
    processes.run([1, 1], str(tmp_path / "two"), program=("-c", PROGRAM))
    run(tmp_path / "one")
    one, two = ((tmp_path / name / "results.json").read_text() for name in ("one", "two"))
    assert one == two
    images = [
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.png"))
        for name in ("one", "two")
    ]
    assert images[0] == images[1]
    for path in images[0]:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


# --- of a pipeline ---

TOY = dataclasses.replace(
    BENCHMARK,
    name="toy",
    cases=lambda config, task, *, split, num, collator: Cases(
        task,
        [data.scene(i + 100 * (split == "train")) for i in range(min(num, 9))],
        resolution=config.data.resolution,
        fields=BENCHMARK.tasks[task].needs_fields,
    ),
    fingerprint=lambda config: config.data.dir,
    open_scorers=lambda pipeline, *, needs: {},
)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A model at its initialization."""
    config = helpers.tiny_config().to_dict()
    config["data"] |= {"resolution": 16, "dataset": "", "dir": "nowhere"}
    config["sampling"]["steps"] = 1
    config = Config.of(config)
    conditioner, frozen = helpers.tiny_conditioner()
    generator = Generator(
        model=helpers.tiny_model(conditioner),
        conditioner=conditioner,
        sampler=config.sampling.sampler,
    )
    blank = Pipeline(
        config=config,
        params=None,
        frozen=frozen,
        mesh=sharding.make_mesh(data=-1),
        generator=generator,
        collator=Collator(tokenizer=data.tokenize, shape=helpers.SHAPE),
        path="run",
        step=7,
    )
    init = jax.jit(blank._init_params, out_shardings=sharding.replicated(blank.mesh))
    with jax.set_mesh(blank.mesh):
        return dataclasses.replace(blank, params=init(jax.random.key(1)))


def test_a_pipeline_is_compared_with_its_untrained_self_its_codec_and_the_truth(pipeline, tmp_path):
    results = evaluate(
        pipeline,
        TOY,
        out=tmp_path,
        tasks=["ie"],
        batch_size=8,
        data_dir="elsewhere",
        settings={"parameters": "ema"},
    )
    settings = results["settings"]
    assert settings["checkpoint"] == "run"
    assert (settings["step"], settings["parameters"], settings["split"]) == (7, "ema", "test")
    assert settings["steps"] == 1
    (task,) = results["tasks"].values()
    assert task["examples"] == 9
    assert list(task["systems"]) == ["model", "untrained", "codec", "real", "trivial"]
    values = {name: entry["l1"]["value"] for name, entry in task["systems"].items()}
    assert values["real"] == 0 < values["codec"] < values["model"]
    assert len(list((tmp_path / "ie").glob("???.png"))) == 9
    again = evaluate(pipeline, TOY, out=tmp_path, tasks=["ie"], batch_size=8)
    assert again["settings"]["dataset"] != settings["dataset"], "it was of other data"


def test_what_a_pipeline_cannot_be_evaluated_on_is_named(pipeline, tmp_path):
    with pytest.raises(UserError, match="batch size 12: expected a multiple of 8 devices"):
        evaluate(pipeline, TOY, out=tmp_path, batch_size=12)
    with pytest.raises(UserError, match="unknown task of this run: 'pose'"):
        evaluate(pipeline, TOY, out=tmp_path, tasks=["pose"])
    few = dataclasses.replace(TOY, tasks={"t2i": TOY.tasks["t2i"]})
    with pytest.raises(UserError, match="unknown task of toy: 'ie'"):
        evaluate(pipeline, few, out=tmp_path, tasks=["ie"])
