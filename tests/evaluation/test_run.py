"""The same numbers however cases are batched or sharded, and nothing is done twice."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from data_pipelines.reader import Reader
from data_pipelines.sources import MemorySource
from tests import processes
from tests.evaluation import evaluation_cases as data
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import Cases
from univg_jax.evaluation.benchmarks.emoji_scenes import BENCHMARK
from univg_jax.evaluation.results import Results
from univg_jax.evaluation.run import Evaluator, evaluate, open_cases
from univg_jax.images import write_png

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


def folder_of(out):
    """The only evaluation below `out`."""
    (file,) = out.glob("*/results.json")
    return file.parent


def test_results_and_files(tmp_path):
    results = run(tmp_path)
    folder = folder_of(tmp_path)
    assert Results.read(folder) == results
    assert results.settings["checkpoint_step"] == 3
    edit = results.tasks["ie"]
    assert edit["beats"] == {"untrained": True, "trivial": True}
    assert edit["systems"]["real"]["l1_changed"]["value"] == 0
    assert edit["systems"]["model"]["l1_changed"]["count"] == 7
    assert edit["systems"]["model"]["l1_changed"]["stderr"] > 0
    assert len(list((folder / "ie").glob("???.png"))) == 7
    assert edit["samples"][1] == {
        "prompt": edit["samples"][1]["prompt"],
        "input": "ie/001_input.png",
        "target": "ie/001_target.png",
        "output": "ie/001.png",
    }
    np.testing.assert_array_equal(
        np.asarray(Image.open(folder / "ie/001_target.png")), data.scene(1)["image"]
    )


@pytest.mark.parametrize("answer", ["a copy of the source", "the source's background"])
def test_a_model_that_gives_a_trivial_answer_does_not_beat_it(tmp_path, answer):
    cases = data.make_cases("ie", [data.scene(i) for i in range(7)])
    trivial = BENCHMARK.tasks["ie"].make_trivial(cases)[answer]
    model = lambda batch: np.stack([trivial(cases[min(int(i), 6)]) for i in batch.sample_id])  # noqa: E731
    results = run(tmp_path, model=model)
    assert not results.tasks["ie"]["beats"]["trivial"]  # a tie is not a victory


def test_batching_and_padding_change_nothing(tmp_path):
    results = [run(tmp_path / str(b), batch_size=b) for b in (1, 4, 16)]
    assert results[0] == results[1] == results[2]


def test_results_of_the_same_settings_are_kept_and_others_beside_them(tmp_path):
    calls = []

    def counted(batch):
        calls.append(len(batch.sample_id))
        return data.blurred(batch)

    first = run(tmp_path, model=counted)
    done = len(calls)
    before = (folder_of(tmp_path) / "results.json").read_bytes()
    assert run(tmp_path, model=counted) == first
    assert len(calls) == done
    others = [
        run(tmp_path, model=counted, settings={"checkpoint_step": 3, "seed": 0} | change)
        for change in ({"seed": 1}, {"examples": 3}, {"weights": "trained again"})
    ]
    assert len(calls) == 4 * done
    kept = {file: Results.read(file.parent) for file in tmp_path.glob("*/results.json")}
    assert len(kept) == 4
    assert all(results in kept.values() for results in (first, *others))
    assert before in [file.read_bytes() for file in kept]
    run(tmp_path, model=counted, count=8)
    assert len(calls) > 4 * done, "there are more cases now"


def test_other_tasks_join_those_that_are_done(tmp_path):
    run(tmp_path, tasks=("depth",))
    results = run(tmp_path, tasks=("ie",))
    assert list(Results.read(folder_of(tmp_path)).tasks) == list(results.tasks) == ["ie", "depth"]


def test_an_interrupted_evaluation_goes_on_with_the_next_task(tmp_path):
    calls = []

    def fails_at_depth(batch):
        calls.append(len(batch.sample_id))
        if len(calls) == 3:  # two batches of each task
            raise KeyboardInterrupt
        return data.blurred(batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model=fails_at_depth)
    assert list(Results.read(folder_of(tmp_path)).tasks) == ["ie"]
    results = run(tmp_path, model=fails_at_depth)
    assert len(calls) == 7
    assert set(results.tasks) == set(TASKS)


def test_bad_calls_are_named(tmp_path):
    with pytest.raises(ValueError, match="systems must have 'model'"):
        run(tmp_path, model=None)
    with pytest.raises(UserError, match="no example of task 'ie'"):
        run(tmp_path, count=0)
    with pytest.raises(UserError, match="needs the scorer 'scene'"):
        run(tmp_path, tasks=("t2i",))


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
    one, two = (folder_of(tmp_path / name) for name in ("one", "two"))
    assert one.name == two.name
    assert (one / "results.json").read_text() == (two / "results.json").read_text()
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
    fingerprint=lambda config, splits: config.data.dir,
    open_scorers=lambda pipeline, *, needs: {},
)


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
    settings = results.settings
    assert (settings["step"], settings["parameters"], settings["split"]) == (7, "ema", "test")
    assert (settings["steps"], settings["examples"], settings["weights"]) == (1, 64, "abc")
    made = results.provenance
    assert made["checkpoint"] == "run"
    assert {"date", "version", "revision", "machine"} <= set(made)
    (task,) = results.tasks.values()
    assert task["examples"] == 9
    assert list(task["systems"]) == ["model", "untrained", "codec", "real", "trivial"]
    values = {name: entry["l1"]["value"] for name, entry in task["systems"].items()}
    assert values["real"] == 0 < values["codec"] < values["model"]
    assert len(list((folder_of(tmp_path) / "ie").glob("???.png"))) == 9


def test_a_folder_of_others_is_scored_each_time(pipeline, tmp_path):
    """It may have changed, which its name does not tell."""
    options = dict(tasks=["ie"], batch_size=8)
    evaluate(pipeline, TOY, out=tmp_path / "theirs", only="generate", **options)
    (folder,) = (tmp_path / "theirs").iterdir()
    values = []
    for shade in (0, 255):
        for path in (folder / "ie").glob("???.png"):
            write_png(path, np.full((16, 16, 3), shade, np.uint8))
        results = evaluate(pipeline, TOY, out=tmp_path / "out", images=folder, **options)
        values.append(results.tasks["ie"]["systems"]["model"]["l1"]["value"])
    assert values[0] != values[1]
    scored = (folder_of(tmp_path / "out") / "results.json").read_bytes()
    last = sorted((folder / "ie").glob("???.png"))[-1]
    last.write_bytes(b"no picture")
    message = rf"ie/{last.name} is not a readable image: .*; nothing was scored"
    with pytest.raises(UserError, match=message):
        evaluate(pipeline, TOY, out=tmp_path / "out", images=folder, **options)
    assert (folder_of(tmp_path / "out") / "results.json").read_bytes() == scored


CHANGES = {
    "weights": lambda p: dataclasses.replace(p, digests={**p.digests, "weights": "other"}),
    "encoder": lambda p: dataclasses.replace(p, digests={**p.digests, "text": "other"}),
    "guidance": lambda p: with_sampling(p, guidance={}),
    "solver": lambda p: with_sampling(p, solver="heun"),
    "steps": lambda p: with_sampling(p, steps=2),
}


def with_sampling(pipeline, **changes):
    sampling = dataclasses.replace(pipeline.config.sampling, **changes)
    return dataclasses.replace(
        pipeline, config=dataclasses.replace(pipeline.config, sampling=sampling)
    )


def folders(pipeline, out, monkeypatch, *, benchmark=TOY, **options):
    """The names of the evaluations below `out` after one that needs no images."""
    monkeypatch.setattr(Evaluator, "_evaluate", lambda *args, **kwargs: {})
    options = dict(tasks=["ie"], batch_size=8) | options
    evaluate(pipeline, benchmark, out=out, **options)
    return {file.parent.name for file in out.glob("*/results.json")}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_results_of_another_model_are_not_taken_for_this_ones(
    pipeline, tmp_path, monkeypatch, change
):
    (first,) = folders(pipeline, tmp_path, monkeypatch)
    found = folders(change(pipeline), tmp_path, monkeypatch)
    assert first in found
    assert len(found) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_examples": 8},
        {"seed": 1},
        {"split": "validation"},
        {"data_dir": "elsewhere"},
        {"settings": {"parameters": "params"}},
        {"benchmark": dataclasses.replace(TOY, version=TOY.version + 1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_results_of_other_settings_lie_beside(pipeline, tmp_path, monkeypatch, options):
    (first,) = folders(pipeline, tmp_path, monkeypatch)
    found = folders(pipeline, tmp_path, monkeypatch, **options)
    assert first in found
    assert len(found) == 2


def test_the_same_model_elsewhere_is_the_same(pipeline, tmp_path, monkeypatch):
    folders(pipeline, tmp_path, monkeypatch)
    moved = dataclasses.replace(pipeline, path="moved")
    assert len(folders(moved, tmp_path, monkeypatch, batch_size=16)) == 1


def test_what_a_pipeline_cannot_be_evaluated_on_is_named(pipeline, tmp_path):
    with pytest.raises(UserError, match="batch size 12: expected a multiple of 8 devices"):
        evaluate(pipeline, TOY, out=tmp_path, batch_size=12)
    with pytest.raises(UserError, match="unknown task of this run: 'pose'"):
        evaluate(pipeline, TOY, out=tmp_path, tasks=["pose"])
    few = dataclasses.replace(TOY, tasks={"t2i": TOY.tasks["t2i"]})
    with pytest.raises(UserError, match="unknown task of toy: 'ie'"):
        evaluate(pipeline, few, out=tmp_path, tasks=["ie"])
    with pytest.raises(UserError, match=r"Pipeline\.load"):
        evaluate(dataclasses.replace(pipeline, digests={}), TOY, out=tmp_path)


def test_tasks_that_the_data_has_no_fields_for_are_left_out_or_named(pipeline, caplog):
    """As a run on one's own data has them, which has no segmented scenes."""

    def cases(config, task, *, split, num, collator):
        made = TOY.cases(config, task, split=split, num=num, collator=collator)
        kept = [{k: v for k, v in record.items() if k != "phrases"} for record in made.records]
        Reader(task, MemorySource("own", kept), collator=collator, fields=made.fields)
        return dataclasses.replace(made, records=kept)

    def opened(benchmark, tasks):
        options = dict(split="test", num=4, collator=pipeline.collator)
        return open_cases(pipeline.config, benchmark, tasks=tasks, **options)

    own = dataclasses.replace(TOY, cases=cases)
    found, train = opened(own, None)
    assert list(found) == list(train) == ["ie"]
    line = "task 't2i' cannot read own: no field 'phrases'"
    assert f"toy: left out, since {line}" in caplog.text
    with pytest.raises(UserError, match=line):
        opened(own, ["t2i", "ie"])
    with pytest.raises(UserError, match=line):
        opened(dataclasses.replace(own, tasks={"t2i": TOY.tasks["t2i"]}), None)
