"""Evaluation of a trained model on a benchmark, beside what it has to beat.

`evaluate` makes the systems of a `Pipeline` and opens the benchmark's data and scorers. `Evaluator`
runs any systems: it generates (`generate`), scores (`score`), and keeps what is finished, so that a
killed evaluation goes on with the next task.
"""

import collections
import dataclasses
import datetime
import functools
import itertools
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from etils import epath

from data_pipelines.collate import Collator
from data_pipelines.reader import MissingFieldError
from data_pipelines.tasks import TASKS
from univg_jax import assembly, version
from univg_jax.batch import Batch
from univg_jax.errors import UserError, check_name
from univg_jax.evaluation import generate, score
from univg_jax.evaluation.benchmark import AnswerFn, Benchmark, Case, Cases, ScoreFn
from univg_jax.evaluation.generate import System
from univg_jax.evaluation.metrics import Image
from univg_jax.evaluation.results import FILE, Done, Results, digest
from univg_jax.evaluation.scorers import Scorers, local_mesh, scorer_digests
from univg_jax.images import open_picture
from univg_jax.pipeline import Pipeline
from univg_jax.progress import Bar
from univg_jax.settings import Config
from univg_jax.together import each_together

Only = Literal["generate", "score"]
SAMPLING = ("solver", "steps", "shift", "rescale", "interval")  # settings of all tasks' samplers
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
    only: Only | None = None,
    images: epath.PathLike | None = None,
) -> Results:
    """Scores a pipeline on a benchmark, with its untrained self, its codec and the true answers.

    All processes call it. `tasks` and `split` are those of `open_cases`, `num_examples` is for each
    task. `batch_size` is global. `data_dir` replaces the folder of the run's own data. `settings`
    are stored with the results, beside those that the pipeline knows. See `Evaluator.run` for what
    is written to `out` and returned, and for `only`. With `images` the images of that folder are
    scored in place of the pipeline's.

    Raises UserError for what `open_cases` refuses, a pipeline that was not loaded from a
    checkpoint, a batch size that does not divide over the devices, or a scorer that cannot be had.
    """
    if not pipeline.digests:
        raise UserError("a pipeline is evaluated as `Pipeline.load` gives it: this one has no path")
    config = with_data(pipeline.config, data_dir)
    pipeline = dataclasses.replace(pipeline, config=config)
    check_batch_size(batch_size)
    cases, train = open_cases(
        config,
        benchmark,
        tasks=tasks,
        split=split,
        num=num_examples,
        collator=pipeline.collator,
    )
    needs = {need: None for name in cases for need in benchmark.tasks[name].needs_scorers}
    sampling = config.to_dict()["sampling"]
    evaluator = Evaluator(
        benchmark=benchmark,
        systems=pipeline_systems(pipeline, seed=seed),
        collator=pipeline.collator,
        scorers=benchmark.open_scorers(pipeline, needs=tuple(needs)),
        settings={  # in the order in which the report shows them
            "step": pipeline.step,
            **(settings or {}),
            **{key: sampling[key] for key in SAMPLING},
            "guidance": sampling["guidance"],
            "seed": seed,
            "split": split,
            "examples": num_examples,
            "dataset": digest(benchmark.fingerprint(config, (split, "train"))),
            **pipeline.digests,
            **({} if images is None else {"images": os.path.abspath(images)}),
        },
        provenance=provenance(pipeline),
        out=out,
        batch_size=batch_size,
        images=images,
    )
    return evaluator.run(cases, train=train, only=only)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddedJob:
    """What is done with a pipeline on a benchmark that has its own data; see `evaluate`."""

    benchmark: Benchmark
    out: epath.PathLike
    tasks: Sequence[str] | None = None
    split: str = "test"
    num_examples: int = 64
    batch_size: int = 32
    seed: int = 0
    data_dir: epath.PathLike | None = None
    settings: Mapping[str, Any] | None = None
    only: Only | None = None
    images: epath.PathLike | None = None

    def __post_init__(self):
        check_batch_size(self.batch_size)

    def __call__(self, pipeline: Pipeline) -> Done:
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        results = evaluate(pipeline, **options)
        if self.only == "generate":
            return Done(folder=results.folder(self.out), text="the images are made")
        numbers = {
            f"{name}/{metric}": entry["value"]
            for name, task in results.tasks.items()
            for metric, entry in task["systems"]["model"].items()
        }
        return Done(
            folder=results.folder(self.out),
            text=score.table(results.tasks),
            numbers=numbers,
            primary=next(iter(numbers), ""),
        )


def check_batch_size(batch_size: int) -> None:
    """Raises UserError for a global batch that does not divide over the devices."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(f"batch size {batch_size}: expected a multiple of {devices} devices")


def provenance(pipeline: Pipeline | None) -> dict[str, str]:
    """Which model this is, and when, by which code and on which machine it is evaluated.

    None is somebody else's, of which there are pictures only.
    """
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        **({} if pipeline is None else {"checkpoint": pipeline.path}),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "version": version.__version__,
        "revision": version.revision() or "unknown",
        "machine": f"{platform.node()}, {platform.machine()}, {devices}",
    }


def with_data(config: Config, data_dir: epath.PathLike | None) -> Config:
    """The config with its data in another folder, if one is given."""
    if data_dir is None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(data_dir)))


def open_cases(
    config: Config,
    benchmark: Benchmark,
    *,
    tasks: Sequence[str] | None,
    split: str,
    num: int,
    num_train: int = NUM_TRAIN,
    collator: Collator,
) -> tuple[dict[str, Cases], dict[str, Cases]]:
    """The first cases of each task: `num` of a split, and `num_train` of the training split.

    `tasks` are by default those that the run was trained on, that the benchmark has, and for which
    the data has the fields; a task that is left out is logged. Raises UserError for a task that is
    unknown, a split that is missing, or a field that is missing: of a task that is named, or of
    all.
    """
    for name in tasks or ():
        check_name(name, config.tasks, what="task of this run:")
        check_name(name, benchmark.tasks, what=f"task of {benchmark.name}:")
    trained = [name for name, task in config.tasks.items() if task.weight > 0]
    assembly.prepare_data(config)
    cases, train, refused = {}, {}, None
    for name in benchmark.tasks:
        if name not in (tasks or trained):
            continue
        try:
            cases[name], train[name] = (
                benchmark.cases(config, name, split=part, num=count, collator=collator)
                for part, count in ((split, num), ("train", num_train))
            )
        except MissingFieldError as error:
            if tasks:
                raise
            refused = error
            logging.warning("%s: left out, since %s", benchmark.name, error)
    if refused and not cases:
        raise refused
    if not cases:
        raise UserError(f"{benchmark.name} has none of the tasks that this run was trained on")
    return cases, train


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
    batch. `settings` say how the images were made: results of other settings have another folder.
    `provenance` is stored with them, and may differ.
    """

    benchmark: Benchmark
    systems: Mapping[str, System]
    collator: Collator
    scorers: Scorers
    settings: Mapping[str, Any]
    out: epath.PathLike
    batch_size: int  # global
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: epath.PathLike | None = None  # of the model, if somebody else made them

    def run(
        self, cases: Mapping[str, Cases], *, train: Mapping[str, Cases], only: Only | None = None
    ) -> Results:
        """Scores the cases of each task; returns what process 0 writes below `out`.

        Trivial answers are made from the cases `train`. A task that `out` has for the same
        settings, checkpoint and scorers is not run again, and no other one is changed. The model's
        images are written beside the results (`evaluation.results`); one that is there is not made
        again. With `only="generate"` nothing else is done, and the results have no task. With
        `only="score"` all images have to be there.

        Raises UserError for a task without cases, a scorer that is absent, an image that is, a
        batch size that does not divide over the processes, or results that are damaged.
        """
        if "model" not in self.systems:
            raise ValueError(f"systems must have 'model', got {', '.join(self.systems) or 'none'}")
        for name in cases:
            if not len(cases[name]):
                raise UserError(f"no example of task {name!r} to evaluate")
        compared = {"benchmark": self.benchmark.version, "systems": sorted(self.systems)}
        results = Results(benchmark=self.benchmark.name, settings={**self.settings, **compared})
        folder = results.folder(self.out)
        if only == "generate":
            self._generate(cases, folder)
            return results
        if (folder / FILE).exists():
            results = Results.read(folder)
        made_of = {name: self._made_of(name, cases[name]) for name in cases}
        done = {name: task.get("made_of") for name, task in results.tasks.items()}
        # A folder of somebody else may have changed: it is scored each time.
        is_new = self.images is not None
        todo = [name for name in cases if is_new or done.get(name) != made_of[name]]
        if only == "score" or self.images is not None:
            for name in todo:
                _check_images(cases[name], self._images(folder))
        total = sum(len(cases[name]) * len(self.systems) for name in todo)
        quiet = not total or jax.process_index() > 0
        with Bar(total=total, unit="image", disable=quiet) as bar:
            for name in todo:
                bar.set_description(f"evaluate {name}")
                task = self._evaluate(cases[name], train=train[name], folder=folder, bar=bar)
                found = {**results.tasks, name: {"made_of": made_of[name], **task}}
                # In the benchmark's order, whichever were finished before.
                ordered = {n: found[n] for n in self.benchmark.tasks if n in found}
                results = dataclasses.replace(results, provenance=self.provenance, tasks=ordered)
                if jax.process_index() == 0:
                    results.write(folder)
        logging.info("results are in %s", folder)
        return results

    def _images(self, folder: epath.Path) -> epath.Path:
        return folder if self.images is None else epath.Path(self.images)

    def _generate(self, cases: Mapping[str, Cases], folder: epath.Path) -> None:
        """Writes the model's images that are not there."""
        total = sum(map(len, cases.values()))
        with Bar(
            total=total, desc="generate", unit="image", disable=jax.process_index() > 0
        ) as bar:
            for name in cases:
                for mine, _, _ in self._answered(cases[name], folder):
                    bar.update(min(len(mine) * jax.process_count(), total - bar.n))

    def _answered(
        self, cases: Cases, folder: epath.Path
    ) -> Iterator[tuple[list[Case], Batch, list[Image]]]:
        """This process's cases in batches, with the model's images, made where they are not there.

        All processes make a batch of which any of them lacks an image.
        """
        images, there = self._images(folder), generate.existing(cases, self._images(folder))
        batches = generate.case_batches(cases, collator=self.collator, batch_size=self.batch_size)
        for number, (mine, batch) in enumerate(each_together(batches)):
            first = number * self.batch_size
            asked = range(first, min(first + self.batch_size, len(cases)))
            made = None if there.issuperset(asked) else np.asarray(self.systems["model"](batch))
            found = []
            for k, case in enumerate(mine):
                if case.index in there:
                    found.append(generate.read_picture(images, case))
                else:
                    found.append(made[k])
                    with_case = case.index < NUM_SAMPLES
                    generate.write_pictures(folder, case, made[k], with_case=with_case)
            yield mine, batch, found

    def _made_of(self, name: str, cases: Cases) -> dict[str, Any]:
        """What a task's results depend on beside the settings."""
        needed = {
            need: self.scorers[need]
            for need in self.benchmark.tasks[name].needs_scorers
            if need in self.scorers
        }
        return {"examples": len(cases), "scorers": scorer_digests(needed)}

    def _evaluate(
        self, cases: Cases, *, train: Cases, folder: epath.Path, bar: Bar
    ) -> dict[str, Any]:
        """The entry of one task in results.json."""
        task = self.benchmark.tasks[cases.task]
        groups = None if task.group is None else [task.group(case) for case in cases]
        with local_mesh():
            score_fn = task.score_fn(self.scorers, cases)
            template = score_fn(cases[0], cases[0].example.target)
            answers = {
                "trivial": task.make_trivial(train),
                "references": task.make_references(train),
            }
        rows = self._score(cases, score_fn=score_fn, answers=answers, folder=folder, bar=bar)
        gather = functools.partial(score.gather, count=len(cases), template=template)
        # Not in the order of `rows`: a process may have none, and all must gather the same thing.
        summaries = {
            kind: {name: score.summarize(gather(rows[kind, name]), groups) for name in names}
            for kind, names in {"systems": self.systems, **answers}.items()
        }
        summaries["trivial"] |= {
            name: {metric: score.guess(value) for metric, value in values.items()}
            for name, values in task.make_guesses(cases).items()
        }
        return {
            "title": task.title,
            "metric": task.primary,
            "metrics": {name: dataclasses.asdict(metric) for name, metric in task.metrics.items()},
            "examples": len(cases),
            "groups": len(cases if groups is None else set(groups)),
            **score.verdict(task, **summaries),
            "difficulty": task.difficulty,
            "note": task.note,
            "samples": [
                {"prompt": case.prompt, **generate.picture_names(case)}
                for case in itertools.islice(cases, NUM_SAMPLES)
            ],
        }

    def _score(
        self,
        cases: Cases,
        *,
        score_fn: ScoreFn,
        answers: Answers,
        folder: epath.Path,
        bar: Bar,
    ) -> Mapping[Key, dict[int, score.Scores]]:
        """The scores of this process's cases, by who answered and case index.

        All systems answer a batch before the next one is read, so that each case is decoded once.
        """
        rows: dict[Key, dict[int, score.Scores]] = collections.defaultdict(dict)
        for mine, batch, answered in self._answered(cases, folder):
            images: dict[Key, Iterable[np.ndarray]] = {}
            for name, system in self.systems.items():
                is_model = name == "model"
                images["systems", name] = answered if is_model else np.asarray(system(batch))
                bar.update(len(mine) * jax.process_count())
            with local_mesh():
                for kind, functions in answers.items():
                    for name, answer in functions.items():
                        images[kind, name] = map(answer, mine)
                for key, pictures in images.items():
                    for case, image in zip(mine, pictures):  # without the images of padding
                        rows[key][case.index] = score_fn(case, image)
        return rows


def _check_images(cases: Cases, folder: epath.Path) -> None:
    missing = set(range(len(cases))) - generate.existing(cases, folder)
    if missing:
        name = generate.output_name(cases.task, min(missing))
        raise UserError(
            f"{folder} lacks {len(missing)} images, such as {name}: generate them first"
        )
    for index in range(len(cases)):
        file = folder / generate.output_name(cases.task, index)
        try:
            open_picture(file.read_bytes())
        except UserError as error:
            raise UserError(f"{file} {error}; nothing was scored") from None
