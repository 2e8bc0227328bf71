"""A public benchmark from its official files to its numbers.

`generate_images` makes the images that it asks for, of a pipeline, in the official layout.
`score_folder` scores such a folder, whoever filled it. All processes call both.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from univg_jax.errors import UserError
from univg_jax.evaluation import job, score
from univg_jax.evaluation.official import Official, Row
from univg_jax.evaluation.prompts import EncodedPrompts
from univg_jax.evaluation.results import FILE, Done, digest
from univg_jax.evaluation.run import provenance
from univg_jax.evaluation.score_files import Scored, check_scorers, score_images
from univg_jax.evaluation.scorecard import (
    Scorecard,
    cases_of,
    numbers_of,
    published_of,
    write_rows,
)
from univg_jax.evaluation.scorers import Scorers, scorer_digests
from univg_jax.pipeline import Pipeline
from univg_jax.together import together


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicJob:
    """What is done with a pipeline on a benchmark; see `generate_images` and `score_folder`.

    `images` is a folder to score that somebody else has filled. `settings` are stored beside those
    that the pipeline knows.
    """

    benchmark: Official
    rows: Sequence[Row]
    out: epath.PathLike
    scorers: Scorers
    without: Collection[str] = ()
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    images: epath.PathLike | None = None
    generates: bool = True
    scores: bool = True
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, pipeline: Pipeline | None) -> Done:
        """Without a pipeline, `images` are scored."""
        benchmark, rows = self.benchmark, self.rows
        if benchmark.measure is not None:
            return self._measured(pipeline)
        folder, settings, origin = self.images, None, {}
        if folder is None:
            origin = provenance(pipeline)
            settings = {
                **self.settings,
                **image_settings(pipeline, benchmark, rows, seed=self.seed),
            }
            folder = images_folder(self.out, benchmark, settings)
        if self.generates:
            generate_images(
                pipeline,
                benchmark,
                rows,
                folder,
                seed=self.seed,
                batch_size=self.batch_size,
                limit=self.limit,
            )
        if not self.scores:
            return Done(folder=folder, text=f"{benchmark.name}: the images are made")
        at, card = score_folder(
            benchmark,
            rows,
            folder,
            out=self.out,
            scorers=self.scorers,
            without=self.without,
            limit=self.limit,
            settings=settings,
            provenance=origin,
        )
        return _done(at, card)

    def _measured(self, pipeline: Pipeline | None) -> Done:
        """The numbers of the model itself."""
        benchmark, rows = self.benchmark, self.rows[: self.limit]
        if pipeline is None or not (self.generates and self.scores):
            raise UserError(f"{benchmark.name} measures the model itself: it has no images")
        made_with = image_settings(pipeline, benchmark, self.rows, seed=self.seed)
        card = _new_card(benchmark, rows, {**self.settings, **made_with}, {})
        at = card.folder(self.out)
        if (at / FILE).exists():
            return _done(at, Scorecard.read(at))
        template = benchmark.score(rows[0], [], {})
        found = benchmark.measure(pipeline, rows, self.seed)
        table = score.gather(found, count=len(rows), template=template)
        scores = [{name: column[k] for name, column in table.items()} for k in range(len(rows))]
        scored = Scored(scores, {})
        return _done(at, _finish(card, at, benchmark, rows, scored, provenance(pipeline)))


def _done(folder: epath.Path, card: Scorecard) -> Done:
    return Done(folder=folder, text=card.table(), numbers=card.numbers, primary=card.primary)


SAMPLING = ("solver", "steps", "shift", "rescale", "interval")


def check_tasks(benchmark: Official, rows: Sequence[Row], trained: Collection[str]) -> None:
    """Raises UserError if a run that was `trained` on some tasks cannot make the images."""
    needed = dict.fromkeys(request.task for request in benchmark.requests(rows))
    if missing := [task for task in needed if task not in trained]:
        raise UserError(
            f"{benchmark.name} needs the task {missing[0]!r}: this run was trained on "
            f"{', '.join(trained)}"
        )


def image_settings(
    pipeline: Pipeline, benchmark: Official, rows: Sequence[Row], *, seed: int
) -> dict[str, Any]:
    """All that the images depend on, in the order in which a report shows it."""
    requests = benchmark.requests(rows)
    sampling = pipeline.config.to_dict()["sampling"]
    tasks = dict.fromkeys(request.task for request in requests)
    return {
        "step": pipeline.step,
        **{key: sampling[key] for key in SAMPLING},
        "guidance": {task: sampling["guidance"].get(task) for task in tasks},
        "seed": seed,
        "resolution": pipeline.config.data.resolution,
        "version": benchmark.version,
        "options": {k: v for k, v in benchmark.settings.items() if k not in benchmark.scoring},
        "items": digest(
            [(r.task, r.files, str(r.inputs.get("prompt", ""))) for r in requests]
            or list(map(repr, rows))
        ),
        **pipeline.digests,
    }


def generate_images(
    pipeline: Pipeline,
    benchmark: Official,
    rows: Sequence[Row],
    folder: epath.PathLike,
    *,
    seed: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
) -> None:
    """Makes the images of the first `limit` rows that `folder` does not have yet.

    An image is a function of the seed, the row and its number: neither the batch nor the devices
    change it, but for rounding. Each prompt is encoded once.

    Raises UserError for a task that the run was not trained on, a batch size that does not divide
    over the devices, and inputs that cannot be read.
    """
    check_tasks(benchmark, rows, pipeline.tasks)
    devices = pipeline.rows * jax.process_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(f"batch size {batch_size}: expected a multiple of {devices} devices")
    prompts = EncodedPrompts(pipeline.tokenizer, pipeline.embed_prompts)
    collator = dataclasses.replace(pipeline.collator, tokenizer=prompts)
    encoded = dataclasses.replace(pipeline, collator=collator)
    job.write_side_files(benchmark, rows[:limit], folder)
    made = job.generate(
        benchmark.requests(rows)[:limit],
        folder,
        answer=lambda batch, task: encoded.generate_batch(batch, task, seed=seed),
        collator=collator,
        batch_size=batch_size,
        prompts=prompts,
    )
    logging.info("%s: %d new images are in %s", benchmark.name, made, folder)


def images_folder(
    out: epath.PathLike, benchmark: Official, settings: Mapping[str, Any]
) -> epath.Path:
    """Where images of these settings lie."""
    return epath.Path(out) / f"{benchmark.name}-images-{digest(settings)[:12]}"


def score_folder(
    benchmark: Official,
    rows: Sequence[Row],
    folder: epath.PathLike,
    *,
    out: epath.PathLike,
    scorers: Scorers,
    without: Collection[str] = (),
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[epath.Path, Scorecard]:
    """Scores the images of the first `limit` rows; returns where the results are, and the results.

    `settings` are those of the images; without them they are somebody else's, and are named by
    their folder. Results of the same settings and scorers that are there already are returned as
    they are, if the images are ours.

    Raises UserError for a scorer that is missing, a picture that cannot be read, and a folder that
    has no image of the benchmark.
    """
    check_scorers(benchmark, scorers, without=without)
    used: Scorers = {name: scorers[name] for name in benchmark.needs if name in scorers}
    card = _new_card(benchmark, rows[:limit], settings, used, without=without, folder=folder)
    at = card.folder(out)
    if settings is not None and (at / FILE).exists():
        return at, Scorecard.read(at)
    scored = score_images(benchmark, rows[:limit], folder, used)
    return at, _finish(card, at, benchmark, rows[:limit], scored, provenance, without=without)


def _new_card(
    benchmark: Official,
    rows: Sequence[Row],
    settings: Mapping[str, Any] | None,
    scorers: Scorers,
    *,
    without: Collection[str] = (),
    folder: epath.PathLike = "",
) -> Scorecard:
    """A card without numbers; with no `settings` the images in `folder` are somebody else's."""
    plain = {"version": benchmark.version}
    place = os.path.abspath(folder)
    return Scorecard(
        benchmark=benchmark.name,
        settings={
            **(plain | {"images": place} if settings is None else settings),
            "options": dict(benchmark.settings),
            "rows": len(rows),
            "scorers": scorer_digests(scorers),
            "without": sorted(without),
        },
        primary=benchmark.primary,
        published=published_of(benchmark.published),
        rows=len(rows),
        # Beside the results, which may then be moved with them.
        images=place if settings is None else epath.Path(folder).name if folder else "",
    )


def _finish(
    card: Scorecard,
    at: epath.Path,
    benchmark: Official,
    rows: Sequence[Row],
    scored: Scored,
    provenance: Mapping[str, Any] | None,
    *,
    without: Collection[str] = (),
) -> Scorecard:
    """The card with its numbers, which process 0 writes."""
    references = {name: sums.digest for name, sums in scored.sums.items()}
    requests = benchmark.requests(rows)
    card = dataclasses.replace(
        card,
        numbers=numbers_of(scored.summary(benchmark, rows, without=without)),
        cases=cases_of(benchmark, requests, scored.rows) if requests else {},
        provenance={**(provenance or {}), **({"features": references} if references else {})},
    )
    with together():
        if jax.process_index() == 0:
            if requests:
                write_rows(at, requests, scored.rows)
            card.write(at)
    return card
