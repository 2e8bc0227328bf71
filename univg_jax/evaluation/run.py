"""Evaluation of a trained model on a benchmark, beside what it has to beat.

`evaluate` makes the systems of a `Pipeline` and opens the benchmark's data and scorers. `Evaluator`
runs any systems: it generates (`generate`), scores (`score`), and keeps what is finished, so that a
killed evaluation goes on with the next task.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from data_pipelines.collate import Collator
from data_pipelines.tasks import TASKS
from univg_jax import assembly
from univg_jax.errors import UserError, check_name
from univg_jax.evaluation import generate, score
from univg_jax.evaluation.benchmark import AnswerFn, Benchmark, BenchmarkTask, Cases, ScoreFn
from univg_jax.evaluation.generate import System
from univg_jax.evaluation.scorers import Scorers, digest, local_mesh
from univg_jax.files import write_whole
from univg_jax.pipeline import Pipeline
from univg_jax.progress import Bar

VERSION = 3  # of the arithmetic and of the results' keys: results of another one are not reused
NUM_TRAIN = 256  # training cases that trivial answers are made from
NUM_SAMPLES = 6  # cases of a task that the report shows, so that input and target are written, too


def evaluate(
    pipeline: Pipeline,
    benchmark: Benchmark,
    *,
    out: epath.PathLike,
    tasks: Sequence[str] | None = None,
    split: str = "test",
    num_examples: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    data_dir: epath.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores a pipeline on a benchmark, with its untrained self, its codec and the true answers.

    All processes call it. `tasks` are by default those that the model was trained on and the
    benchmark has; `num_examples` is for each. `batch_size` is global. `data_dir` replaces the
    folder of the run's own data. `settings` are stored with the results, beside those that the
    pipeline knows. See `Evaluator.run` for what is written to `out`, and returned.

    Raises UserError for an unknown task, a split that is missing, a batch size that does not divide
    over the devices, or a scorer that cannot be had.
    """
    config = pipeline.config
    if data_dir is not None:
        data = dataclasses.replace(config.data, dir=str(data_dir))
        config = dataclasses.replace(config, data=data)
        pipeline = dataclasses.replace(pipeline, config=config)
    devices = pipeline.rows * jax.process_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(f"batch size {batch_size}: expected a multiple of {devices} devices")
    for name in tasks or ():
        check_name(name, config.tasks, what="task of this run:")
        check_name(name, benchmark.tasks, what=f"task of {benchmark.name}:")
    chosen = [name for name in benchmark.tasks if name in (tasks or pipeline.tasks)]
    assembly.prepare_data(config)
    make_cases = functools.partial(benchmark.cases, config, collator=pipeline.collator)
    cases = {name: make_cases(name, split=split, num=num_examples) for name in chosen}
    train = {name: make_cases(name, split="train", num=NUM_TRAIN) for name in chosen}
    needs = {need: None for name in chosen for need in benchmark.tasks[name].needs_scorers}
    sampling = config.to_dict()["sampling"]
    kept = ("solver", "steps", "shift", "rescale", "interval", "guidance")
    evaluator = Evaluator(
        benchmark=benchmark,
        systems=pipeline_systems(pipeline, seed=seed),
        collator=pipeline.collator,
        scorers=benchmark.open_scorers(pipeline, needs=tuple(needs)),
        settings={  # in the order in which the report shows them
            "checkpoint": pipeline.path,
            "step": pipeline.step,
            **(settings or {}),
            **{key: sampling[key] for key in kept},
            "seed": seed,
            "split": split,
            "dataset": hashlib.sha256(benchmark.fingerprint(config).encode()).hexdigest()[:12],
        },
        out=out,
        batch_size=batch_size,
    )
    return evaluator.run(cases, train=train)


def pipeline_systems(pipeline: Pipeline, *, seed: int) -> dict[str, System]:
    """What is measured of a pipeline: the model and what is compared with it.

    `untrained` is the model at its initialization. `codec` is the reconstruction of the true answer
    and `real` the true answer itself: what no model with this codec, or with these scorers, passes.
    """
    names = list(TASKS)

    def model(pipeline: Pipeline) -> System:
        return lambda batch: pipeline.generate_batch(batch, names[int(batch.task[0])], seed=seed)

    return {
        "model": model(pipeline),
        "untrained": model(pipeline.untrained(seed=seed)),
        "codec": pipeline.reconstruct,
        "real": lambda batch: np.asarray(batch.target),
    }


Answers = Mapping[str, Mapping[str, AnswerFn]]  # that need no model, by kind and name
Key = tuple[str, str]  # who answered: ("systems", "model"), ("trivial", "a copy of the source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Scores systems on cases of a benchmark. All processes make the same one and call `run`.

    `systems` must have "model"; a system is any function that makes an image of each row of a
    batch. `settings` say how the images were made, and are stored with the results.
    """

    benchmark: Benchmark
    systems: Mapping[str, System]
    collator: Collator
    scorers: Scorers
    settings: Mapping[str, Any]
    out: epath.PathLike
    batch_size: int  # global

    def run(self, cases: Mapping[str, Cases], *, train: Mapping[str, Cases]) -> dict[str, Any]:
        """Scores the cases of each task; returns what process 0 writes to `out/results.json`.

        Trivial answers are made from the cases `train`. A task whose results for the same settings
        are in `out` already is not run again. The model's images are written to
        `out/<task>/NNN.png`.

        Raises UserError for a task without cases, a scorer that is absent, a batch size that does
        not divide over the processes, or an unreadable results.json.
        """
        if "model" not in self.systems:
            raise ValueError(f"systems must have 'model', got {', '.join(self.systems) or 'none'}")
        for name in cases:
            if not len(cases[name]):
                raise UserError(f"no example of task {name!r} to evaluate")
        path = epath.Path(self.out) / "results.json"
        settings = {**self.settings, "scorers": digest(self.scorers)}
        results = _read_results(path, settings)
        version = [VERSION, self.benchmark.name, self.benchmark.version, sorted(self.systems)]
        keys = {name: _hash([*version, settings, name, len(cases[name])]) for name in cases}
        todo = [n for n in cases if results["tasks"].get(n, {}).get("key") != keys[n]]
        total = sum(len(cases[name]) * len(self.systems) for name in todo)
        quiet = not total or jax.process_index() > 0
        with Bar(total=total, unit="image", disable=quiet) as bar:
            for name in todo:
                bar.set_description(f"evaluate {name}")
                task = self.benchmark.tasks[name]
                result = self._evaluate(task, cases[name], train=train[name], bar=bar)
                results["tasks"][name] = {"key": keys[name], **result}
                # In the order of `cases`, whichever were finished before.
                results["tasks"] = {n: results["tasks"][n] for n in cases if n in results["tasks"]}
                if jax.process_index() == 0:
                    write_whole(path, json.dumps(results, indent=1) + "\n")
        return results

    def _evaluate(
        self, task: BenchmarkTask, cases: Cases, *, train: Cases, bar: Bar
    ) -> dict[str, Any]:
        """The entry of one task in results.json."""
        with local_mesh():
            score_fn = task.score_fn(self.scorers, cases)
            template = score_fn(cases[0], cases[0].example.target)
            answers = {"trivial": task.make_trivial(train), "references": task.references}
        rows = self._score(cases, score_fn=score_fn, answers=answers, bar=bar)
        gather = functools.partial(score.gather, count=len(cases), template=template)
        # Not in the order of `rows`: a process may have none, and all must gather the same thing.
        summaries = {
            kind: {name: score.summarize(gather(rows[kind, name])) for name in names}
            for kind, names in {"systems": self.systems, **answers}.items()
        }
        if chance := task.chance(cases):
            summaries["trivial"]["chance"] = {
                metric: {"value": value, "stderr": None, "count": 0.0}
                for metric, value in chance.items()
            }
        return {
            "title": task.title,
            "metric": task.primary,
            "metrics": {name: dataclasses.asdict(metric) for name, metric in task.metrics.items()},
            "examples": len(cases),
            **score.verdict(task, **summaries),
            "difficulty": task.difficulty,
            "note": task.note,
            "samples": [
                {"prompt": case.prompt, **generate.picture_names(case)}
                for case in itertools.islice(cases, NUM_SAMPLES)
            ],
        }

    def _score(
        self, cases: Cases, *, score_fn: ScoreFn, answers: Answers, bar: Bar
    ) -> Mapping[Key, dict[int, score.Scores]]:
        """The scores of this process's cases, by who answered and case index.

        All systems answer a batch before the next one is read, so that each case is decoded once.
        The model's images are written on the way.
        """
        rows: dict[Key, dict[int, score.Scores]] = collections.defaultdict(dict)
        batches = generate.case_batches(cases, collator=self.collator, batch_size=self.batch_size)
        for mine, batch in batches:
            images: dict[Key, Iterable[np.ndarray]] = {}
            for name, system in self.systems.items():
                images["systems", name] = np.asarray(system(batch))
                bar.update(len(mine) * jax.process_count())
            with local_mesh():
                for kind, functions in answers.items():
                    for name, answer in functions.items():
                        images[kind, name] = map(answer, mine)
                for key, pictures in images.items():
                    for case, image in zip(mine, pictures):  # without the images of padding
                        rows[key][case.index] = score_fn(case, image)
            for case, image in zip(mine, images["systems", "model"]):
                with_case = case.index < NUM_SAMPLES
                generate.write_pictures(epath.Path(self.out), case, image, with_case=with_case)
        return rows


def _read_results(path: epath.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results that `path` holds already, without those of other settings."""
    blank = {"settings": settings, "tasks": {}}
    if not path.exists():
        return blank
    try:
        found = json.loads(path.read_text())
        same = found["settings"] == json.loads(json.dumps(settings))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the results of an evaluation: move it away") from None
    return found if same else blank


def _hash(content: Any) -> str:
    """16 digits that name what a task's result depends on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
