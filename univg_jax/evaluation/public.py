"""A public benchmark from its official files to its numbers.

`generate_images` makes the images that it asks for, of a pipeline, in the official layout.
`score_folder` scores such a folder, whoever filled it. All processes call both.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from univg_jax.errors import UserError
from univg_jax.evaluation import job, score
from univg_jax.evaluation.official import Official, Request, Row, requests_in
from univg_jax.evaluation.prompts import EncodedPrompts
from univg_jax.evaluation.results import Done, digest
from univg_jax.evaluation.run import SAMPLING, Only, check_batch_size, provenance
from univg_jax.evaluation.score_files import (
    Scored,
    check_scorers,
    check_settings,
    score_images,
    unreadable,
    warn_of_networks,
)
from univg_jax.evaluation.scorecard import (
    Scorecard,
    cases_of,
    numbers_of,
    published_of,
    write_rows,
)
from univg_jax.evaluation.scorers import Scorers, backbones, scorer_digests
from univg_jax.pipeline import Pipeline
from univg_jax.together import together

_NAMED = 3  # files of a warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicJob:
    """What is done with a pipeline on a benchmark; see `generate_images` and `score_folder`.

    `only` leaves out the other half. `images` is a folder to score that somebody else has filled.
    `settings` are stored beside those that the pipeline knows. Raises UserError for no items, what
    would be wrong with the scorers, what scoring lacks, and a batch size that does not divide over
    the devices.
    """

    benchmark: Official
    rows: Sequence[Row]
    out: epath.PathLike
    scorers: Scorers
    only: Only | None = None
    without: Collection[str] = ()
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    images: epath.PathLike | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.rows:
            raise UserError(f"{self.benchmark.name} has no item left with these settings")
        if self.benchmark.measure is not None and (self.only or self.images is not None):
            raise UserError(f"{self.benchmark.name} measures the model itself: it has no images")
        if self.only != "generate":
            check_scorers(self.benchmark, self.scorers, without=self.without)
            check_settings(self.benchmark, self.scorers)
            warn_of_networks(self.benchmark, self.scorers)
            self.benchmark.check_scoring(self.rows[: self.limit], self.scorers)
        if self.only != "score" and self.images is None:
            check_batch_size(self.batch_size)

    def __call__(self, pipeline: Pipeline | None) -> Done:
        """Without a pipeline, `images` are scored."""
        if self.images is not None:
            return self._scored(self.images, origin=provenance(None))
        settings = {**self.settings, **self._image_settings(pipeline)}
        if self.benchmark.measure is not None:
            return self._measured(pipeline, settings)
        folder = epath.Path(self.out) / f"{self.benchmark.name}-images-{digest(settings)[:12]}"
        if self.only != "score":
            generate_images(
                pipeline,
                self.benchmark,
                self.rows,
                folder,
                seed=self.seed,
                batch_size=self.batch_size,
                limit=self.limit,
            )
        if self.only == "generate":
            return Done(folder=folder, text=f"{self.benchmark.name}: the images are made")
        return self._scored(folder, settings, origin=provenance(pipeline))

    def _scored(
        self,
        folder: epath.PathLike,
        settings: Mapping[str, Any] | None = None,
        *,
        origin: Mapping[str, Any],
    ) -> Done:
        at, card = score_folder(
            self.benchmark,
            self.rows,
            folder,
            out=self.out,
            scorers=self.scorers,
            without=self.without,
            limit=self.limit,
            settings=settings,
            provenance=origin,
        )
        return _done(at, card)

    def _measured(self, pipeline: Pipeline, settings: Mapping[str, Any]) -> Done:
        """The numbers of the model itself."""
        benchmark, rows = self.benchmark, self.rows[: self.limit]
        card = _new_card(benchmark, rows, settings, {})
        at = card.folder(self.out)
        template = benchmark.score(rows[0], [], {})
        found = benchmark.measure(pipeline, rows, self.seed)
        table = score.gather(found, count=len(rows), template=template)
        scores = [{name: column[k] for name, column in table.items()} for k in range(len(rows))]
        scored = Scored(scores, {})
        return _done(at, _finish(card, at, benchmark, rows, [], scored, provenance(pipeline)))

    def _image_settings(self, pipeline: Pipeline) -> dict[str, Any]:
        """All that the images depend on, in the order in which a report shows it."""
        benchmark, asked = self.benchmark, self._asked
        sampling = pipeline.config.to_dict()["sampling"]
        return {
            "step": pipeline.step,
            **{key: sampling[key] for key in SAMPLING},
            "guidance": {task: sampling["guidance"].get(task) for task in asked.tasks},
            "seed": self.seed,
            "resolution": pipeline.config.data.resolution,
            "version": benchmark.version,
            "options": {k: v for k, v in benchmark.settings.items() if k not in benchmark.scoring},
            "items": asked.items,
            **({"pictures": asked.pictures} if asked.pictures else {}),
            **pipeline.digests,
        }

    @functools.cached_property
    def _asked(self) -> "_Asked":
        """Of pictures, those of the first `limit` items, which are read for it."""
        requests = self.benchmark.requests(self.rows)
        items = [(r.task, r.files, str(r.inputs.get("prompt", ""))) for r in requests]
        return _Asked(
            tasks=tuple(dict.fromkeys(request.task for request in requests)),
            items=digest(items or list(map(repr, self.rows))),
            pictures=job.pictures_digest(requests[: self.limit]),
        )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a model is asked for: tasks, digests of all items and of the pictures it is given."""

    tasks: tuple[str, ...]
    items: str
    pictures: str


def _done(folder: epath.Path, card: Scorecard) -> Done:
    return Done(folder=folder, text=card.table(), numbers=card.numbers, primary=card.primary)


def check_tasks(benchmark: Official, rows: Sequence[Row], trained: Collection[str]) -> None:
    """Raises UserError if a run that was `trained` on some tasks cannot make the images."""
    needed = dict.fromkeys(request.task for request in benchmark.requests(rows))
    if missing := [task for task in needed if task not in trained]:
        raise UserError(
            f"{benchmark.name} needs the task {missing[0]!r}: this run was trained on "
            f"{', '.join(trained)}"
        )


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
    check_batch_size(batch_size)
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
    their folder. Scores are always made anew: what the images are compared with may have changed,
    and a server's answers are kept on their own.

    A picture that cannot be read scores as one that is missing, and is named. Raises UserError for
    a folder that has no image of the benchmark.
    """
    used: Scorers = {name: scorers[name] for name in benchmark.needs if name in scorers}
    card = _new_card(benchmark, rows[:limit], settings, used, without=without, folder=folder)
    at = card.folder(out)
    rows = rows[:limit]
    scored = score_images(benchmark, rows, folder, used)
    requests = requests_in(benchmark, rows, folder)
    bad = unreadable(benchmark, requests, scored.rows, folder)
    _warn(benchmark, bad)
    card = dataclasses.replace(card, cases=cases_of(benchmark, requests, scored.rows, bad))
    served = {name: scorer.served for name, scorer in used.items() if hasattr(scorer, "served")}
    origin = {**(provenance or {}), **({"served": served} if served else {})}
    return at, _finish(card, at, benchmark, rows, requests, scored, origin, without=without)


def _warn(benchmark: Official, bad: Mapping[int, Mapping[str, str]]) -> None:
    """Names the first files that cannot be read; all are in the results."""
    lines = [f"{file} {why}" for reasons in bad.values() for file, why in reasons.items()]
    if lines and jax.process_index() == 0:
        more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        logging.warning(
            "%s: %d of the files score as missing: %s%s",
            benchmark.name,
            len(lines),
            "; ".join(lines[:_NAMED]),
            more,
        )


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
            "reference": job.rows_digest(rows),
            "scorers": scorer_digests(scorers),
            **({"backbones": named} if (named := backbones(scorers)) else {}),
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
    requests: Sequence[Request],
    scored: Scored,
    provenance: Mapping[str, Any],
    *,
    without: Collection[str] = (),
) -> Scorecard:
    """The card with its numbers, which process 0 writes."""
    references = {name: sums.digest for name, sums in scored.sums.items()}
    card = dataclasses.replace(
        card,
        numbers=numbers_of(scored.summary(benchmark, rows, without=without)),
        provenance={**provenance, **({"features": references} if references else {})},
    )
    with together():
        if jax.process_index() == 0:
            if requests:
                write_rows(at, requests, scored.rows)
            card.write(at)
    return card
