"""Requests that run the same compiled program are made together, on the devices of this process.

A program is fixed by the shape of the pictures, the passes of the guidance, the sampler, and the
rows of the batch, for which there are a few sizes. All of them are compiled by `Batching.compile`,
so no request waits for the compiler. Requests of one task and program share a queue of the library
`batched`, which cuts it into batches; one thread runs the batches of all queues in turn.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from batched.aio.batch_processor import AsyncBatchProcessor

from data_pipelines.tasks import TASKS, Example
from univg_jax.batch import BatchShape
from univg_jax.errors import UnsupportedError, UserError
from univg_jax.inputs import Request
from univg_jax.pipeline import Pipeline
from univg_jax.result import Result
from univg_jax.sampling import guidance_weights
from univg_jax.serving.metrics import Metrics
from univg_jax.settings import Guidance, Sampler


class Busy(UserError):
    """Too many pictures wait; `retry_after` is in how many seconds there may be room."""

    def __init__(self, message: str, *, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class NobodyWaits(Exception):
    """All who asked for a batch have left."""


@dataclasses.dataclass(kw_only=True)
class Job:
    """One picture to make."""

    request: Request
    seed: int
    negative_prompt: str = ""
    pipeline: Pipeline  # with the options that the picture asks for
    left: bool = False  # whether nobody waits for it any more
    queued: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def guidance(self) -> Guidance:
        """The scales, which are arguments of the program."""
        return self.pipeline.config.sampling.guidance.get(self.request.task) or Guidance()


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled, apart from the rows of the batch."""

    shape: tuple[int, int]  # height, width
    passes: int
    sampler: Sampler


class Batching:
    """A model that makes pictures for many at once.

    `steps` and `solvers` are those that a request may ask for. At most `max_queue` pictures wait or
    are being made; one that finds fewer than `max_batch` others waits `max_wait_ms` for more.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: Metrics,
        *,
        max_batch: int,
        max_wait_ms: int,
        max_queue: int,
        steps: Sequence[int] = (),
        solvers: Sequence[str] = (),
    ):
        self.pipeline, self.metrics = pipeline, metrics
        self.max_wait_ms, self.max_queue = max_wait_ms, max_queue
        self.steps = tuple(steps) or (pipeline.config.sampling.steps,)
        self.solvers = tuple(solvers) or (pipeline.config.sampling.solver,)
        self.sizes = batch_sizes(max_batch, rows=pipeline.rows)
        self.is_ready = self._is_stopping = False
        self._queues: dict[tuple[str, Program], AsyncBatchProcessor[Job, Result | Exception]] = {}
        # Devices run one program after the other.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "sampler")
        self.taken = 0  # places in the queue
        self._seconds_per_picture = 1.0
        metrics.waiting.set_function(lambda: self.taken)

    def programs(self) -> Iterator[Program]:
        """All that any request can ask for."""
        # Depth and pose have no text to be guided by, and only a picture has an image scale.
        tasks = [TASKS[name] for name in self.pipeline.tasks]
        guidance = self.pipeline.config.sampling.guidance
        kinds = {len(guidance_weights(guidance.get(task.name))) for task in tasks}
        kinds |= {2 for task in tasks if task.prompt != "none"}
        kinds |= {3 for task in tasks if task.prompt != "none" and "image" in task.inputs}
        shapes = [shape.size for shape in BatchShape.buckets(self.pipeline.config.data)]
        square = BatchShape.of(self.pipeline.config.data).size
        shapes = dict.fromkeys([square, *shapes])
        for shape, passes, steps, solver in itertools.product(
            shapes, sorted(kinds), self.steps, self.solvers
        ):
            sampler = dataclasses.replace(
                self.pipeline.config.sampling.sampler, steps=steps, solver=solver
            )
            yield Program(shape, passes, sampler)

    async def compile(self) -> None:
        """Compiles every program at every size of a batch, by running it once."""
        await self._in_thread(self._compile)
        self.is_ready = not self._is_stopping

    def stop(self) -> None:
        """Ends what is being compiled after the program at hand."""
        self._is_stopping = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self) -> None:
        start = time.monotonic()
        task = self.pipeline.tasks[0]
        scales = {1: {}, 2: {"text": 1.0}, 3: {"text": 1.0, "image": 1.0}}
        count = 0
        for program, size in itertools.product(self.programs(), self.sizes):
            if self._is_stopping:
                return
            blank = np.zeros((*program.shape, 3), np.uint8)
            request = Request.of_example(task, Example(target=blank, text="a picture"))
            options = {"steps": program.sampler.steps, "solver": program.sampler.solver}
            pipeline = self.pipeline.with_sampling(
                {**options, "guidance": {task: scales[program.passes]}}
            )
            begin = time.monotonic()
            for _ in pipeline.answer(
                [request] * size, seeds=[0] * size, batch_size=size, callback=lambda *_: None
            ):
                pass
            count += 1
            self._seconds_per_picture = (time.monotonic() - begin) / size
        seconds = time.monotonic() - start
        logging.info("compiled %d programs in %.1f s: ready", count, seconds)

    def with_options(self, task: str, **options: object) -> Pipeline:
        """The pipeline with a request's options. Raises UserError for what is not compiled."""
        pipeline = self.pipeline.with_options(task, **options)
        for name, known in {"steps": self.steps, "solver": self.solvers}.items():
            value = options.get(name)
            if value is not None and value not in known:
                raise UnsupportedError(
                    f"{name}={value}: this server is compiled for {', '.join(map(str, known))}"
                )
        return pipeline

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """In the block so many pictures have a place in the queue. Raises Busy if it is full."""
        if count > self.max_queue:
            raise UserError(f"n={count}: expected at most {self.max_queue}")
        if self.taken + count > self.max_queue:
            seconds = max(1, math.ceil(self.taken * self._seconds_per_picture))
            raise Busy(
                f"{self.taken} pictures are waiting, of at most {self.max_queue}: try again in "
                f"{seconds} s",
                retry_after=seconds,
            )
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count

    async def make(self, job: Job) -> Result:
        """The picture of a job. Where the caller is cancelled, the job leaves its batch."""
        program = Program(
            job.request.letterbox.canvas,
            len(guidance_weights(job.guidance)),
            job.pipeline.config.sampling.sampler,
        )
        key = (job.request.task, program)
        if key not in self._queues:
            self._queues[key] = AsyncBatchProcessor(
                self._make_batch, batch_size=self.sizes[-1], timeout_ms=self.max_wait_ms
            )
        try:
            made = await self._queues[key](job)
        except asyncio.CancelledError:
            job.left = True
            raise
        if isinstance(made, Exception):
            raise made
        return made

    async def _make_batch(self, jobs: list[Job]) -> list[Result | Exception]:
        return await self._in_thread(self._run, jobs)

    def _run(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """Runs in the thread. The scales of the guidance are the same in all rows of a program."""
        made: dict[int, Result | Exception] = {}
        together: dict[Guidance, list[int]] = {}
        for i, job in enumerate(jobs):
            if not job.left:
                together.setdefault(job.guidance, []).append(i)
        for indices in together.values():
            made.update(zip(indices, self._run_together([jobs[i] for i in indices])))
        return [made.get(i, NobodyWaits()) for i in range(len(jobs))]

    def _run_together(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """One batch. Where it fails, each job is tried alone, so that the others are not lost."""
        begin = time.monotonic()
        try:
            results: list[Result | Exception] = self._sample(jobs)
        except NobodyWaits as left:
            return [left] * len(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            logging.warning("a batch of %d failed (%s): one by one", len(jobs), error)
            return [made for job in jobs for made in self._run_together([job])]
        seconds = time.monotonic() - begin
        self._seconds_per_picture += 0.2 * (seconds / len(jobs) - self._seconds_per_picture)
        task = jobs[0].request.task
        self.metrics.batch_size.labels(task).observe(len(jobs))
        self.metrics.batch_seconds.labels(task).observe(seconds)
        self.metrics.pictures.labels(task).inc(len(jobs))
        for job in jobs:
            self.metrics.queue_seconds.labels(task).observe(begin - job.queued)
        return results

    def _sample(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        size = next(size for size in self.sizes if size >= len(jobs))
        padded = [*jobs, *[jobs[-1]] * (size - len(jobs))]

        def check(step: int, total: int) -> None:
            if all(job.left for job in jobs):
                raise NobodyWaits

        results = jobs[0].pipeline.answer(
            [job.request for job in padded],
            seeds=[job.seed for job in padded],
            negative_prompts=[job.negative_prompt for job in padded],
            batch_size=size,
            callback=check,
        )
        return list(results)[: len(jobs)]

    async def _in_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def batch_sizes(max_batch: int, *, rows: int) -> tuple[int, ...]:
    """The rows of compiled batches: powers of two times `rows`, up to the first that holds all."""
    sizes = [rows]
    while sizes[-1] < max_batch:
        sizes.append(min(2 * sizes[-1], -(-max_batch // rows) * rows))
    return tuple(sizes)
