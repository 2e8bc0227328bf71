"""Where metrics go: TensorBoard and `metrics.jsonl`, through clu's writer interface and without
TensorFlow.

clu imports TensorFlow for its TensorBoard writer alone. Importing this module first puts a
tensorboardX one in its place; nothing else in the project imports `clu.metric_writers`.
"""

import io
import json
import operator
import os
import sys
import time
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check, register_writer_factory

from univg_jax.errors import UserError
from univg_jax.files import write_whole

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

    Events are written by the thread that has them. `tensorboardX.SummaryWriter` leaves them to
    another one, and its `flush` does not wait for that: a kill would lose some of a row.
    """

    def __init__(self, logdir: str, *, purge_step: int = 0) -> None:
        directory_check(logdir)
        # A file is named by its second: an attempt within the same one must not overwrite it.
        self._events = EventsWriter(os.path.join(logdir, "events"), f".{purge_step:08d}")
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

    def close(self) -> None:
        self._events.close()


class _EventsInBucket:
    """Makes the files of events in a bucket, as `register_writer_factory` asks; all is one upload.

    What tensorboardX has for that fails in other ways than all else here.
    """

    def directory_check(self, path: str) -> None:
        pass

    def open(self, path: str) -> "_EventsFile":
        return _EventsFile(path)


class _EventsFile:
    def __init__(self, path: str) -> None:
        self._path, self._content = path, io.BytesIO()
        self.write = self._content.write

    def flush(self) -> None:
        write_whole(self._path, self._content.getvalue())

    close = flush


register_writer_factory("gs", _EventsInBucket())


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
            try:
                with self._path.open("a") as file:
                    file.write(text)
            except OSError as error:  # such as a full disk
                raise UserError(f"{self._path} cannot be written: {error.strerror}") from error
        else:
            write_whole(self._path, text)
        self._new.clear()
        self._can_append = "://" not in os.fspath(self._path)


def read_metrics(path: epath.PathLike) -> list[Row]:
    """The rows of a `metrics.jsonl`, in order of steps; none where there is no file.

    A line that cannot be read, as a killed or older run may leave it, is left out with a warning.
    """
    path, rows = epath.Path(path), {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[operator.index(row["step"])] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            where = "the last line" if number == len(lines) else f"line {number}"
            logging.warning(
                "%s: %s is torn and left out (%d bytes, after step %d)",
                *(path, where, len(line), max(rows, default=0)),
            )
    return [rows[step] for step in sorted(rows)]


_stand_in.SummaryWriter = TensorBoardWriter


def create_writer(
    workdir: epath.PathLike, *, resume_step: int, rows: Iterable[Row], active: bool
) -> metric_writers.MetricWriter:
    """Writes `workdir/tensorboard` and `workdir/metrics.jsonl`; nothing where not `active` (other
    processes). `rows` are those up to `resume_step`, which the run keeps.
    """
    if not active:
        return metric_writers.MultiWriter([])
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return metric_writers.MultiWriter(
        [
            TensorBoardWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1),
            JsonlWriter(workdir / "metrics.jsonl", rows),
        ]
    )
