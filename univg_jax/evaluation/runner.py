"""The sharded runner: every process generates and scores its own part, rows are gathered, and
divided last.

Case i of a task is padded into the same global batch, keyed by the same sample id, on any number of
processes; padding is not valid and counts nowhere. What travels between processes is one row of
sums and counts a case, and the rows are added in the order of cases with correct rounding: one
shard, k shards and uneven shards give the same bits, as long as `generate` gives the same images.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from data_pipelines import mixture, tasks
from data_pipelines.mixture import Row
from data_pipelines.sources import open_source
from univg_jax import sharding
from univg_jax.batch import Batch
from univg_jax.conditioning import Conditioner
from univg_jax.errors import check_name
from univg_jax.evaluation import scorers as scorers_lib
from univg_jax.evaluation.benchmarks import BENCHMARKS, Benchmark, Case, draw_cases
from univg_jax.evaluation.metrics import Ratio, merge
from univg_jax.evaluation.scorers import Scorers

VERSION = 2  # of the benchmarks' arithmetic: results of another version are not reused

Generate = Callable[[Batch], UInt8[np.ndarray, "b h w 3"]]


def evaluate(
    cases: Mapping[str, Sequence[Case]],
    *,
    train: Mapping[str, Sequence[Case]],
    systems: Mapping[str, Generate],
    collate: Callable[[Sequence[Row]], Batch],
    scorers: Scorers,
    settings: Mapping[str, Any],
    out: epath.PathLike,
    batch_size: int,
    samples: int = 6,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores every system and every trivial answer on `cases`, by task; returns what it writes to
    `out/results.json`.

    `systems` must have "model"; "untrained", "codec" (the reconstruction of the target) and "real"
    (the target) are compared if present. `train` has training examples, from which the trivial
    answers are made. `batch_size` is global. `settings` is stored with the results and says how the
    images were made: a task whose results for the same settings and scorers are in `out` already is
    not run again. The model's images are written to `out/<task>/NNN.png`, the first `samples` with
    their input and target.

    Raises ValueError if "model" is missing, a task is unknown, or a needed scorer is absent.
    """
    if "model" not in systems:
        raise ValueError(f"systems must have 'model', got {', '.join(systems) or 'none'}")
    out = epath.Path(out)
    settings = {**settings, "scorers": scorers.digest}
    results = _previous(out / "results.json", settings)
    todo = {
        task: _key(task, rows, systems, settings)
        for task, rows in cases.items()
        if results["tasks"].get(task, {}).get("key") != _key(task, rows, systems, settings)
    }
    total = sum(len(cases[task]) * len(systems) for task in todo)
    bar = tqdm(
        total=total, unit="image", disable=not (progress and total and jax.process_index() == 0)
    )
    with bar:
        for task, key in todo.items():
            measured = _Task(
                task, cases[task], train[task], scorers, collate, batch_size, out, samples, bar
            )
            results["tasks"][task] = {"key": key, **measured.run(systems)}
            results["tasks"] = {
                name: results["tasks"][name] for name in cases if name in results["tasks"]
            }
            if jax.process_index() == 0:
                _write_json(out / "results.json", results)
    return results


def evaluate_config(
    config: Any,
    *,
    systems: Mapping[str, Generate],
    conditioner: Conditioner,
    frozen: Mapping[str, Any],
    tokenizer: Any,
    settings: Mapping[str, Any],
    out: epath.PathLike,
    task_names: Sequence[str] | None = None,
    split: str = "validation",
    num_examples: int = 64,
    num_train: int = 256,
    batch_size: int | None = None,
    samples: int = 6,
    scorer_steps: int = 300,
    progress: bool = True,
) -> dict[str, Any]:
    """`evaluate` on a config's data, with its frozen encoders and scorers fitted on its train
    split.

    `systems` has "model", "untrained" and "codec"; "real" is added. Raises ValueError for a task
    that the config does not have.
    """
    names = [
        check_name(name, config.tasks, what="task of this config")
        for name in task_names or config.tasks
    ]
    names = [name for name in tasks.TASKS if name in names]

    def draw(split: str, num: int) -> dict[str, list[Case]]:
        return {
            name: draw_cases(
                name,
                mixture.eval_records(config, name, split=split, num=num),
                resolution=config.data.resolution,
                seed=config.seed,
            )
            for name in names
        }

    def collate(rows: Sequence[Row]) -> Batch:
        return mixture.collate(
            rows,
            tokenizer=tokenizer,
            resolution=config.data.resolution,
            num_tokens=config.data.num_tokens,
            face_resolution=config.data.face_resolution,
        )

    build = epath.Path(config.data.dir) / "build.json"
    dataset = build.read_text() if build.exists() else str(config.data.dir)
    judging = _for_judges(frozen)
    embed_text = scorers_lib.text_embedder(
        conditioner, judging, tokenizer, num_tokens=config.data.num_tokens
    )
    scene = None
    if any(BENCHMARKS[name].needs_scene for name in names):
        source = next(
            s
            for name in names
            if BENCHMARKS[name].needs_scene
            for s in config.tasks[name]["sources"]
        )

        def scene_scorer() -> scorers_lib.SceneScorer:
            with _apart():
                return scorers_lib.scene_scorer(
                    open_source(source, "train", data_dir=config.data.dir),
                    noun_of=scorers_lib.emoji_noun,
                    embed_text=embed_text,
                    cache_dir=epath.Path(config.data.dir) / "scorers",
                    key=dataset,
                    steps=scorer_steps,
                    progress=progress,
                )

        if jax.process_index() == 0:
            scene_scorer()  # fits it, if that was not done before; the others read it
        multihost_utils.sync_global_devices("univg_jax.scene_scorer")
        scene = scene_scorer()
    has_face = conditioner.face_dim is not None
    faces = scorers_lib.face_embedder(conditioner, judging) if has_face else None
    return evaluate(
        draw(split, num_examples),
        train=draw("train", num_train),
        systems={**systems, "real": lambda batch: np.asarray(batch.target)},
        collate=collate,
        scorers=Scorers(scene=scene, embed_text=embed_text, embed_face=faces),
        settings={
            **settings,
            "split": split,
            "dataset": hashlib.sha256(dataset.encode()).hexdigest()[:12],
        },
        out=out,
        batch_size=batch_size or config.data.batch_size,
        samples=samples,
        progress=progress,
    )


def _apart() -> contextlib.AbstractContextManager[Any]:
    """Where judges compute. Of several processes each judges its own rows: no business of their
    common mesh.
    """
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(data=1, devices=jax.local_devices()[:1]))


def _for_judges(frozen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The encoders that judges use, where they compute."""
    if jax.process_count() == 1:
        return frozen
    whole = {part: frozen[part] for part in ("text", "identity") if part in frozen}
    return jax.tree.map(
        lambda x: jax.device_put(sharding.all_gather_to_host(x), jax.local_devices()[0]), whole
    )


def _previous(path: epath.Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Results that `path` holds already; those of other settings are left out."""
    blank = {"settings": settings, "tasks": {}}
    if not path.exists():
        return blank
    found = json.loads(path.read_text())
    return found if found["settings"] == json.loads(json.dumps(settings)) else blank


def _key(
    task: str, cases: Sequence[Case], systems: Mapping[str, Generate], settings: Mapping[str, Any]
) -> str:
    """What a task's result depends on: settings, systems, prompts and true answers."""
    digest = hashlib.sha256(
        json.dumps([VERSION, task, sorted(systems), settings], sort_keys=True).encode()
    )
    for case in cases:
        digest.update(case.prompt.encode())
        digest.update(case.example.target.tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Task:
    name: str
    cases: Sequence[Case]
    train: Sequence[Case]
    scorers: Scorers
    collate: Callable[[Sequence[Row]], Batch]
    batch_size: int
    out: epath.Path
    samples: int
    bar: Any

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[check_name(self.name, BENCHMARKS, what="task")]

    def run(self, systems: Mapping[str, Generate]) -> dict[str, Any]:
        benchmark = self.benchmark
        with _apart():
            judge = benchmark.judge(self.scorers, self.cases)
            like = judge(self.cases[0], self.cases[0].example.target)

        def score(images_of: Callable[[list[Case]], Any], *, save: bool = False) -> dict[str, Any]:
            rows: dict[int, dict[str, Ratio]] = {}
            for part in self._parts():
                images = images_of(part)
                with _apart():
                    for case, image in zip(part, images):
                        rows[case.index] = judge(case, image)
                        if save:
                            self._save(case, image)
            return _summarize(_gather(rows, len(self.cases), like))

        measured = {}
        for system, generate in systems.items():
            self.bar.set_description(f"evaluate {self.name}, {system}")
            measured[system] = score(
                lambda part, g=generate: self._generated(g, part), save=system == "model"
            )
        trivial = {
            name: score(lambda part, a=answer: [a(case) for case in part])
            for name, answer in benchmark.trivial(self.train).items()
        }
        if chance := benchmark.chance(self.cases):
            trivial["chance"] = {
                k: {"value": v, "stderr": None, "count": 0.0} for k, v in chance.items()
            }

        references = {
            name: score(lambda part, a=answer: [a(case) for case in part])
            for name, answer in benchmark.references.items()
        }

        metric = benchmark.metrics[benchmark.primary]
        sign = 1 if metric.better == "higher" else -1

        def primary(entry: Mapping[str, Any]) -> float:
            value = entry[benchmark.primary]["value"]
            return -math.inf if value is None else sign * value

        chosen = max(trivial, key=lambda name: primary(trivial[name]))
        measured["trivial"] = trivial[chosen]
        opponents = [name for name in ("untrained", "trivial") if name in measured]
        return {
            "title": benchmark.title,
            "metric": benchmark.primary,
            "metrics": {name: dataclasses.asdict(m) for name, m in benchmark.metrics.items()},
            "examples": len(self.cases),
            "systems": measured,
            "trivial": {"chosen": chosen, "all": trivial},
            "references": references,
            "beats": {
                name: primary(measured["model"]) > primary(measured[name]) for name in opponents
            },
            "difficulty": benchmark.difficulty,
            "note": benchmark.note,
            "samples": [self._sample(case) for case in self.cases[: self.samples]],
        }

    def _parts(self) -> list[list[Case]]:
        """This process's part of each global batch; the last ones may be short or empty."""
        count, index = jax.process_count(), jax.process_index()
        if self.batch_size % count:
            raise ValueError(f"batch size {self.batch_size} does not divide by {count} processes")
        local = self.batch_size // count
        starts = range(0, len(self.cases), self.batch_size)
        return [list(self.cases[start + index * local :][:local]) for start in starts]

    def _generated(self, generate: Generate, part: Sequence[Case]) -> UInt8[np.ndarray, "b h w 3"]:
        """All processes call this equally often with batches of one size: what is missing is
        padding.
        """
        local = self.batch_size // jax.process_count()
        padding = [(self.cases[-1], False)] * (local - len(part))
        rows = [
            Row(example=case.example, task=self.name, sample_id=case.index, valid=valid)
            for case, valid in [(case, True) for case in part] + padding
        ]
        images = np.asarray(generate(self.collate(rows)))
        self.bar.update(len(part) * jax.process_count())
        return images[: len(part)]

    def _path(self, case: Case, kind: str) -> str:
        return f"{self.name}/{case.index:03d}{'' if kind == 'output' else '_' + kind}.png"

    def _save(self, case: Case, image: np.ndarray) -> None:
        pictures = {"output": image}
        if case.index < self.samples:
            pictures["target"] = case.example.target
            shown = case.example.source if case.example.face is None else case.example.face
            if shown is not None:
                pictures["input"] = shown
        for kind, picture in pictures.items():
            path = self.out / self._path(case, kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                Image.fromarray(picture).save(file, "PNG")

    def _sample(self, case: Case) -> dict[str, Any]:
        has_input = case.example.source is not None or case.example.face is not None
        kinds = ("input", "target", "output") if has_input else ("target", "output")
        return {"prompt": case.prompt} | {kind: self._path(case, kind) for kind in kinds}


def _gather(
    rows: Mapping[int, Mapping[str, Ratio]], count: int, like: Mapping[str, Ratio]
) -> dict[str, list[Ratio]]:
    """The rows of all `count` cases, by metric, from what each process has; every row is `like` one
    another.
    """
    table = _pack(rows, count, like)
    if jax.process_count() > 1:
        # As 32-bit words, since JAX would round float64 to float32 on the way.
        words = multihost_utils.process_allgather({k: v.view(np.uint32) for k, v in table.items()})
        table = {k: np.ascontiguousarray(v).view(np.float64).sum(axis=0) for k, v in words.items()}
    return {
        name: [Ratio(*row) for row in values.reshape(count, 2, -1)]
        for name, values in table.items()
    }


def _pack(
    rows: Mapping[int, Mapping[str, Ratio]], count: int, like: Mapping[str, Ratio]
) -> dict[str, Float[np.ndarray, "n _"]]:
    """Totals then counts of each case; zeros for the cases of other processes, also where a process
    has none.
    """
    table = {name: np.zeros((count, 2 * len(ratio.total))) for name, ratio in like.items()}
    for index, metrics in rows.items():
        for name, ratio in metrics.items():
            table[name][index] = np.concatenate([ratio.total, ratio.count])
    return table


def _summarize(rows: Mapping[str, Sequence[Ratio]]) -> dict[str, Any]:
    """Value, standard error and count of each metric; None where nothing was counted, since JSON
    has no NaN.
    """

    def finite(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    summary = {}
    for name, ratios in rows.items():
        whole = merge(ratios)
        summary[name] = {
            "value": finite(whole.value),
            "stderr": finite(_standard_error(ratios, whole)),
            "count": float(whole.count.sum()),
        }
    return summary


def _standard_error(ratios: Sequence[Ratio], whole: Ratio) -> float:
    """Jackknife over cases: sqrt((n-1)/n sum_i (v_-i - mean v_-i)²), v_-i the value without case i."""
    n = len(ratios)
    if n < 2:
        return math.nan
    without = np.array([Ratio(whole.total - r.total, whole.count - r.count).value for r in ratios])
    return float(np.sqrt((n - 1) / n * np.sum((without - without.mean()) ** 2)))


def _write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
