"""Where metrics go: TensorBoard and `metrics.jsonl`, through clu's writer interface and without
TensorFlow.

clu imports TensorFlow for its TensorBoard writer alone. Importing this module first puts a
tensorboardX one in its place; nothing else in the project imports `clu.metric_writers`.
"""

import json
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorboardX
from etils import epath

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
    """

    def __init__(self, logdir: str, *, purge_step: int | None = None) -> None:
        self._writer = tensorboardX.SummaryWriter(logdir, purge_step=purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class JsonlWriter(_ScalarsAndImages):
    """One JSON object a step in `metrics.jsonl`. Resuming at a step drops the lines after it.

    The file is rewritten at every flush, since object stores cannot append: a line a hundred
    steps keeps it small.
    """

    def __init__(self, path: epath.PathLike, *, resume_step: int = 0) -> None:
        self._path = epath.Path(path)
        self._rows: dict[int, dict[str, float | int]] = {
            row["step"]: row for row in read_metrics(path) if row["step"] <= resume_step
        }

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        row = self._rows.setdefault(step, {"step": step})
        row.update({name: float(value) for name, value in scalars.items()})

    def flush(self) -> None:
        self._path.write_text("".join(json.dumps(row) + "\n" for row in self._rows.values()))


def read_metrics(path: epath.PathLike) -> list[dict[str, float | int]]:
    """The rows of a `metrics.jsonl`, in order of steps; none where there is no file."""
    path = epath.Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


_stand_in.SummaryWriter = TensorBoardWriter


def create_writer(
    workdir: epath.PathLike, *, resume_step: int, active: bool
) -> metric_writers.MetricWriter:
    """Writes `workdir/tensorboard` and `workdir/metrics.jsonl`; nothing where not `active` (other
    processes).
    """
    if not active:
        return metric_writers.MultiWriter([])
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return metric_writers.MultiWriter(
        [
            TensorBoardWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1),
            JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step),
        ]
    )
