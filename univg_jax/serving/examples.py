"""Forms to begin with: the inputs of a model's own held-out examples."""

from collections.abc import Mapping, Sequence

from absl import logging

from data_pipelines import examples as layouts
from data_pipelines.held_out import HeldOut
from data_pipelines.renderings import PALETTE
from data_pipelines.tasks import TASKS
from univg_jax.errors import UserError
from univg_jax.pipeline import Pipeline
from univg_jax.serving.form import SIDES, Form, fields_of
from univg_jax.serving.store import Store

APART = 8  # records of the split from one example to the next, where there are so many


def load_examples(
    pipeline: Pipeline, store: Store, *, num: int, data_dir: str = ""
) -> Mapping[str, Sequence[Form]]:
    """Up to `num` examples of each task in the test split of the run's data.

    They lie apart, since neighbors may show the same person. Their pictures are kept in the store.
    `data_dir` is where the data lies, if not where the run found it. A task whose data is not there
    has none, which the log says.
    """
    found = {}
    for task in pipeline.tasks:
        try:
            found[task] = _of_task(pipeline, task, store, num=num, data_dir=data_dir)
        except UserError as error:
            logging.warning("no examples of task %s: %s", task, error)
            found[task] = []
    return found


def _of_task(
    pipeline: Pipeline, task: str, store: Store, *, num: int, data_dir: str
) -> Sequence[Form]:
    config = pipeline.config
    if data_dir:
        stored = config.to_dict()
        config = type(config).of({**stored, "data": {**stored["data"], "dir": data_dir}})
    held_out = HeldOut(config, task, split="test", num=num * APART, collator=pipeline.collator)
    step = max(1, len(held_out) // num)
    return [_form(held_out, i, store) for i in range(0, len(held_out), step)[:num]]


def _form(held_out: HeldOut, index: int, store: Store) -> Form:
    """Example `index` as a visitor would give it."""
    task, given = TASKS[held_out.task], {"task": held_out.task}
    if task.name == "lg":
        record = held_out[index]
        return Form.of({**given, "prompt": record["caption"], "boxes": _boxes(record)})
    example = held_out.row(index).example
    # Under a hole the source is blank; its own picture has all of it.
    pictures = {"image": example.source if example.mask is None else example.target}
    if example.mask is not None:
        pictures["mask"] = example.mask[..., 0] * 255
    pictures["face"] = example.face
    names = {name: store.add_picture(pictures[name], keep=True) for name in task.inputs}
    text = {"prompt": example.text} if "prompt" in fields_of(task.name) else {}
    return Form.of({**given, **text, **names})


def _boxes(record: Mapping) -> list[dict]:
    """The boxes that a phrase of the caption names, each once, as many as there are colors."""
    ends = layouts.places(record["caption"], record["phrases"])
    named = {
        tuple(float(x) for x in box): phrase
        for box, phrase, end in zip(record["boxes"], record["phrases"], ends, strict=True)
        if end is not None and box[0] < box[2] and box[1] < box[3]
    }
    shown = list(named.items())[: len(PALETTE)]
    return [dict(zip(SIDES, corners, strict=True), name=phrase) for corners, phrase in shown]
