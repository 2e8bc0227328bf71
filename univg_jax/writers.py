"""Where metrics go: TensorBoard and `metrics.jsonl`, through clu's writer interface and without
TensorFlow.

clu imports TensorFlow for its TensorBoard writer alone. Importing this module first puts a
tensorboardX one in its place; nothing else in the project imports `clu.metric_writers`.
"""

import contextlib
import io
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import register_writer_factory

from univg_jax.errors import quote
from univg_jax.files import write_whole, writing

Json = dict[str, Any]
Row = dict[str, float | int]  # of one step, which its key "step" names

_stand_in = types.ModuleType("clu.metric_writers.summary_writer")
_stand_in.SummaryWriter = None  # set below; clu only looks the name up
sys.modules.setdefault("clu.metric_writers.summary_writer", _stand_in)

from clu import metric_writers  # noqa: E402


class _ScalarsAndImages(metric_writers.MetricWriter):
    """The kinds of summaries that this project writes; the others raise."""

    def _unsupported(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} writes scalars, images and texts only")

    write_summaries = write_videos = write_audios = write_histograms = write_pointcloud = (
        write_hparams
    ) = _unsupported

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        pass

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.flush()


class TensorBoardWriter(_ScalarsAndImages):
    """TensorBoard events; `purge_step` hides what an interrupted run wrote after its last
    checkpoint.

    What is written is in memory until `flush`, which leaves it on the disk. Of
    `tensorboardX.SummaryWriter` another thread has the events, for which its `flush` does not wait:
    a kill would lose some of a row.
    """

    def __init__(self, logdir: str, *, purge_step: int = 0) -> None:
        # A file is named by its second: an attempt within the same one must not overwrite it.
        prefix = f"{_SCHEME}:{os.path.join(logdir, 'events')}"
        self._events = EventsWriter(prefix, f".{purge_step:08d}")
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._newest: tuple[int, set[str]] = (-1, set())  # a step, and what it has

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Events cannot be changed: what the newest step has already stays as it is."""
        if step != self._newest[0]:
            self._newest = (step, set())
        for name in scalars.keys() - self._newest[1]:
            self._write(step, summary=summary.scalar(name, float(scalars[name])))
        self._newest[1].update(scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            image = np.asarray(image)
            self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._write(step, summary=summary.text(name, text))

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def flush(self) -> None:
        self._events.flush()


class _EventsFile:
    """A file of events, as tensorboardX writes one; nothing of it is there before `flush`.

    In a bucket all of it is one upload. What a full disk took of a flush is cut off by the next.
    """

    def __init__(self, path: str) -> None:
        self._path, self._new, self._size = path, io.BytesIO(), 0
        self.write = self._new.write

    def flush(self) -> None:
        content = self._new.getvalue()
        if "://" in self._path:
            write_whole(self._path, content)
            return
        if not content:
            return
        with writing(self._path):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(self._path, "ab") as file:
                file.truncate(self._size)
                file.write(content)
        self._size += len(content)
        self._new.seek(0)
        self._new.truncate()

    close = flush


class _EventsFiles:
    """Opens files of events, as `register_writer_factory` asks. Those of tensorboardX fail in other
    ways than all else here.
    """

    def directory_check(self, path: str) -> None:
        pass

    def open(self, path: str) -> _EventsFile:
        return _EventsFile(path.removeprefix(f"{_SCHEME}:"))


_SCHEME = "univg"
register_writer_factory(_SCHEME, _EventsFiles())


class JsonlWriter(_ScalarsAndImages):
    """One JSON object a step in `metrics.jsonl`, after `rows`: those that a resumed run keeps.

    A new row is appended: a kill or a full disk costs at most the row that was being written. What
    else changes the file (rows that a resumed run drops, one that is amended) is written aside and
    renamed; so is everything in a bucket, which cannot append. Nothing is synced to the disk: a
    kill loses no row that was flushed, the machine's crash may.
    """

    def __init__(self, path: epath.PathLike, rows: Iterable[Row] = ()) -> None:
        self._path = epath.Path(path)
        self._rows: dict[int, Row] = {row["step"]: dict(row) for row in rows}
        self._new: set[int] = set()  # steps that the file lacks
        self._can_append = False  # whether it has all others, as they are

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if step not in self._rows:
            self._new.add(step)
        elif step not in self._new:
            self._can_append = False
        row = self._rows.setdefault(step, {"step": step})
        row.update({name: float(value) for name, value in scalars.items()})

    def flush(self) -> None:
        can_append, self._can_append = self._can_append, False  # if it fails, half a row is there
        rows = [self._rows[step] for step in (sorted(self._new) if can_append else self._rows)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if can_append:
            with writing(self._path), self._path.open("a") as file:
                file.write(text)
        else:
            write_whole(self._path, text)
        self._new.clear()
        self._can_append = "://" not in os.fspath(self._path)


def read_metrics(path: epath.PathLike) -> list[Row]:
    """The rows of a `metrics.jsonl`, in order of steps; none where there is no file.

    Every value is a finite number. A line that is no such row, as a killed or older run may leave
    it, is left out with a warning.
    """
    return read_rows(path, _check_numbers)


def read_rows(path: epath.PathLike, check: Callable[[Json], None]) -> list[Json]:
    """The JSON objects in the lines of a file, one a step, in order of steps.

    `check(row)` raises ValueError with the reason for a row that cannot be. Such a line, or one
    that is torn, is left out with a warning that names file and line.
    """
    path, rows = epath.Path(path), {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            reason = "is torn and left out"
        else:
            try:
                step = _step_of(row)
                check(row)
            except ValueError as error:
                reason = f"is left out: {error}"
            else:
                rows[step] = row
                continue
        where = "the last line" if number == len(lines) else f"line {number}"
        logging.warning(
            "%s: %s %s (%d bytes, after step %d)",
            *(path, where, reason, len(line), max(rows, default=0)),
        )
    return [rows[step] for step in sorted(rows)]


def is_number(value: object) -> bool:
    """Whether a row's value counts: null and what is not finite, as a float, do not."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def _step_of(row: object) -> int:
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**31:
        raise ValueError(f"its step is {quote(step)}")
    return step


def _check_numbers(row: Json) -> None:
    if bad := [name for name, value in row.items() if not is_number(value)]:
        raise ValueError(f"its {quote(bad[0])} is {quote(row[bad[0]])}")


_stand_in.SummaryWriter = TensorBoardWriter


class _Writers(metric_writers.MultiWriter):
    """Writers whose files change in `flush` and `close` alone, each right after `before_write()`.

    Where one fails the others write all the same.
    """

    def __init__(
        self, writers: Sequence[metric_writers.MetricWriter], before_write: Callable[[], None]
    ) -> None:
        super().__init__(writers)
        self._flushed, self._before_write = writers, before_write

    def flush(self) -> None:
        self._before_write()
        with contextlib.ExitStack() as stack:
            for writer in self._flushed:
                stack.callback(writer.flush)

    close = flush


def create_writer(
    workdir: epath.PathLike,
    *,
    resume_step: int,
    rows: Iterable[Row],
    active: bool,
    before_write: Callable[[], None] = lambda: None,
) -> metric_writers.MetricWriter:
    """Writes `workdir/tensorboard` and `workdir/metrics.jsonl`; nothing where not `active` (other
    processes). `rows` are those up to `resume_step`, which the run keeps.

    All is in memory until `flush` or `close`. `before_write()` is called then, and nothing is
    written if it raises. Both raise UserError with the path and the cause where the system refuses.
    """
    if not active:
        return metric_writers.MultiWriter([])
    workdir = epath.Path(workdir)
    return _Writers(
        [
            TensorBoardWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1),
            JsonlWriter(workdir / "metrics.jsonl", rows),
        ],
        before_write,
    )
