"""Builds on many machines: the calls of a local build, run by Apache Beam.

The process that launches a build plans it, packs and describes as `data_pipelines.build` does, and
its files are the same byte for byte. What a process of a pool would be called for, the stages of
parts and the writing of shards, becomes one pipeline each. Their folder, `OUT/.NAME.build`, is one
that all workers see: a shared disk or a bucket. The calls go through a file there and not through
the graph of the pipeline, whose size some runners limit.
"""

import concurrent.futures
import contextlib
import functools
import io
import os
import pickle
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from data_pipelines import build as builds
from data_pipelines.native import Dataset
from data_pipelines.staging import SHARD_BYTES, Plan
from univg_jax.errors import UserError, needs_extra
from univg_jax.files import write_streamed, write_whole

CALLS, PLAN, FAILED = "calls", "plan", "failed"  # in the staging folder
_LIMITED = 16  # parts at once, times PENDING, where a limit may leave out all others


def build(
    dataset: Dataset,
    out: epath.PathLike,
    options: Any,
    *,
    runner: str = "DirectRunner",
    pipeline_options: Sequence[str] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """As `build.build`, by a runner of Apache Beam, such as DataflowRunner.

    `pipeline_options` are flags of the runner, such as `--region=europe-west4`. All workers must
    see `out` and the native files by the same paths, and have this package and its extras `data`
    and `beam`.

    Raises UserError as that does, and for a runner or flags that cannot be.
    """
    make_pipeline = _pipelines(runner, list(pipeline_options))

    @contextlib.contextmanager
    def open_workers(plan: Plan, folder: epath.Path) -> Iterator[_Workers]:
        yield _Workers(plan, folder, make_pipeline)

    path = os.fspath(out)
    out = path if "://" in path else os.path.abspath(path)  # workers are elsewhere
    builds.build(dataset, out, options, shard_bytes=shard_bytes, open_workers=open_workers)


def read_flags(text: str) -> list[str]:
    """The flags in `text`, as a shell reads them. Raises UserError for what is none."""
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--beam_options={text}: {error}") from None
    if flags and not flags[0].startswith("--"):
        raise UserError(f"--beam_options={text}: expected flags such as --region=europe-west4")
    return flags


def _pipelines(runner: str, flags: list[str]) -> Callable[[], Any]:
    """Makes pipelines. Raises UserError in one line for what Beam would tell in pages."""
    with needs_extra("beam", f"--beam_runner={runner}"):
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners import create_runner
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"--beam_runner={runner}: {' '.join(str(error).split())[:200]}; known are "
            "DirectRunner, DataflowRunner (which needs apache-beam[gcp]), SparkRunner, FlinkRunner"
        ) from None
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            options = PipelineOptions(flags)
            options.get_all_options()
            apache_beam.Pipeline(runner=runner, options=options)
    except (ValueError, SystemExit) as error:  # argparse exits
        lines = (str(error) if isinstance(error, ValueError) else told.getvalue()).splitlines()
        reason = " ".join(lines if isinstance(error, ValueError) else lines[-1:])
        raise UserError(f"--beam_options={shlex.join(flags)}: {reason}") from None
    return lambda: apache_beam.Pipeline(runner=runner, options=PipelineOptions(flags))


class _Workers:
    """Collects calls; the first result that is asked for runs all of them, as one pipeline."""

    def __init__(self, plan: Plan, folder: epath.Path, make_pipeline: Callable[[], Any]):
        self._folder, self._make_pipeline = folder, make_pipeline
        self._calls: list[tuple[concurrent.futures.Future, tuple[Any, ...]]] = []
        # Without a limit a pipeline stages all parts that there are.
        self.size = 2**30 if plan.limit is None else _LIMITED
        write_whole(folder / PLAN, pickle.dumps(plan))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """The future of a call whose result nobody needs."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._calls.append((future, (function, *arguments)))
        return future

    def result(self, future: concurrent.futures.Future) -> None:
        """Runs what was submitted. Raises UserError for the first call that did."""
        if not future.done():
            calls = [(f, call) for f, call in self._calls if not f.cancelled()]
            self._calls = []
            self._run([call for _, call in calls])
            for done, _ in calls:
                done.set_result(None)

    def _run(self, calls: Sequence[tuple[Any, ...]]) -> None:
        import apache_beam

        places, contents, offset = [], [], 0
        for number, call in enumerate(calls):
            contents.append(pickle.dumps(call))
            places.append((number, offset, len(contents[-1])))
            offset += len(contents[-1])
        write_streamed(self._folder / CALLS, lambda file: file.writelines(contents))
        failed = self._folder / FAILED
        if failed.exists():
            failed.rmtree()
        failed.mkdir()
        with self._make_pipeline() as pipeline:
            _ = (
                pipeline
                | apache_beam.Create(places)
                | apache_beam.Reshuffle()  # or a runner might give all to one worker
                | apache_beam.Map(_call, os.fspath(self._folder))
            )
        for file in sorted(failed.iterdir()):
            raise UserError(file.read_text())
        failed.rmtree()


def _call(place: tuple[int, int, int], folder: str) -> None:
    """What a worker does.

    It leaves a UserError as a file: each runner wraps errors in another way, and some try again.
    """
    number, offset, length = place
    with (epath.Path(folder) / CALLS).open("rb") as file:
        file.seek(offset)
        function, *arguments = pickle.loads(file.read(length))
    try:
        function(_plan(folder), *arguments)
    except UserError as error:
        write_whole(epath.Path(folder) / FAILED / f"{number:08d}", str(error))


@functools.lru_cache(maxsize=1)
def _plan_of(content: bytes) -> Plan:
    return pickle.loads(content)


def _plan(folder: str) -> Plan:
    return _plan_of((epath.Path(folder) / PLAN).read_bytes())
