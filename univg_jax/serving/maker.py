"""Forms to pictures: one at a time, in the order in which visitors ask."""

import asyncio
import concurrent.futures
import dataclasses
import io
import json
import threading
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from absl import logging

from data_pipelines import drawings, layouts
from data_pipelines.tasks import TASKS
from univg_jax import images
from univg_jax.errors import UserError
from univg_jax.pipeline import Pipeline
from univg_jax.result import Result
from univg_jax.serving.form import Form
from univg_jax.serving.store import RGB, Store

MAX_WAITING = 16


class Stopped(Exception):
    """A visitor stopped a job, or left."""


class Job:
    """A form on its way. The page reads how far it is, and may stop it."""

    def __init__(self, form: Form):
        self.form = form
        self.has_begun = self.is_stopped = False
        self.step = self.total = 0

    def advance(self, step: int, total: int) -> None:
        """The pipeline's callback. Raises Stopped where the job was stopped."""
        self.step, self.total = step, total
        if self.is_stopped:
            raise Stopped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a form. Files are names in the store."""

    form: Form  # with the values of all settings
    picture: str
    shown: Mapping[str, str]  # beside the picture: what it is, and its file
    note: str = ""  # what a dense task found
    answer: str = ""  # the file of that


class Maker:
    """A model, and the one thread in which it works."""

    def __init__(self, pipeline: Pipeline, store: Store):
        self.pipeline, self.store = pipeline, store
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "maker")
        self._lock = threading.Lock()
        self._jobs: list[Job] = []

    async def make(self, job: Job) -> Made:
        """The picture of a job, when its turn has come.

        Raises UserError for what cannot be made and where too many jobs wait, and Stopped.
        """
        with self._lock:
            if len(self._jobs) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} pictures are waiting: try again in a minute")
            self._jobs.append(job)
        return await asyncio.wrap_future(self._pool.submit(self._run, job))

    def before(self, job: Job) -> int:
        """The jobs that come before this one."""
        with self._lock:
            return self._jobs.index(job) if job in self._jobs else 0

    def _run(self, job: Job) -> Made:
        try:
            job.advance(0, 0)
            job.has_begun = True
            return self._make(job)
        except (UserError, Stopped):
            raise
        except Exception:
            logging.exception("%s", job.form)
            raise
        finally:
            with self._lock:
                self._jobs.remove(job)

    def _make(self, job: Job) -> Made:
        form, read = job.form, self._read
        given: dict[str, Any] = {
            name: read(getattr(form, name))
            for name in TASKS[form.task].inputs
            if getattr(form, name, "")
        }
        if any(form.margins):
            given["margins"] = _pixels(form.margins, given["image"])
            given.pop("mask", None)
        if form.boxes:
            given["boxes"] = [(box.name, box.corners) for box in form.boxes]
        if form.width or form.height:
            side = self.pipeline.config.data.resolution
            given["size"] = (form.width or side, form.height or side)
        result = self.pipeline.run(
            form.task,
            prompt=form.prompt,
            negative_prompt=form.negative_prompt,
            guidance=form.guidance,
            image_guidance=form.image_guidance,
            steps=form.steps,
            solver=form.solver,
            seed=form.seed,
            callback=job.advance,
            **given,
        )
        return self._made(form, result, given)

    def _made(self, form: Form, result: Result, given: Mapping[str, Any]) -> Made:
        add = self.store.add_picture
        shown = {name: getattr(form, name) for name in ("image", "face") if getattr(form, name)}
        if form.boxes:
            width, height = result.image.size
            _, canvas = layouts.draw(form.prompt, given["boxes"], height=height, width=width)
            shown["layout"] = add(canvas)
        note, answer = "", ""
        if result.answer is not None:
            drawing, note, data, suffix = _ANSWERS[form.task](given["image"], result.answer)
            shown["answer"], answer = add(drawing), self.store.add(data, suffix)
        return Made(
            form=form,
            picture=add(np.asarray(result.image)),
            shown=shown,
            note=note,
            answer=answer,
        )

    def _read(self, name: str) -> RGB:
        return images.to_rgb(images.open_picture(self.store.read(name)))


def _pixels(percent: tuple[int, int, int, int], image: RGB) -> tuple[int, int, int, int]:
    """Margins in pixels, of percents of the sides."""
    height, width = image.shape[:2]
    left, top, right, bottom = percent
    across, down = width / 100, height / 100
    return round(left * across), round(top * down), round(right * across), round(bottom * down)


# What a dense task found: drawn for people, in words, and as a file with its suffix.
Answer = tuple[RGB, str, bytes, str]


def _depth(image: RGB, depth: np.ndarray) -> Answer:
    """Colored from near, red, to far, blue."""
    near, far = float(depth.min()), float(depth.max())
    scale = np.log(far / depth) / max(np.log(far / near), 1e-6)
    colors = cv2.applyColorMap(np.round(255 * scale).astype(np.uint8), cv2.COLORMAP_TURBO)
    file = io.BytesIO()
    np.save(file, depth, allow_pickle=False)
    note = f"from {near:.2g} m (red) to {far:.2g} m (blue)"
    return cv2.cvtColor(colors, cv2.COLOR_BGR2RGB), note, file.getvalue(), ".npy"


def _pose(image: RGB, joints: np.ndarray) -> Answer:
    """Drawn on the picture."""
    seen = joints.copy()
    seen[:, 2] = np.where(joints[:, 2] > 0, 2, 0)
    drawing = drawings.draw_record({"image": image, "joints": seen[None]})
    note = f"{int((joints[:, 2] > 0).sum())} of {len(joints)} joints found"
    return drawing, note, json.dumps(joints.round(4).tolist()).encode(), ".json"


def _mask(image: RGB, mask: np.ndarray) -> Answer:
    """Tinted on the picture."""
    drawing = drawings.draw_record({"image": image, "masks": mask[None]})
    note = f"{mask.mean():.0%} of the picture"
    return drawing, note, images.png_bytes(mask * np.uint8(255)), ".png"


_ANSWERS = {"depth": _depth, "pose": _pose, "seg": _mask}
