"""What encoders are fitted on: targets of all tasks, and portraits of persons.

Both are what the run itself will see, in its sizes, and come one at a time: memory does not grow
with the pictures. They are the same on any hosts.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import UInt8

from data_pipelines import transforms
from data_pipelines.collate import Collator
from data_pipelines.mixture import Stream
from data_pipelines.quarantine import usable_records
from data_pipelines.reader import Reader
from data_pipelines.sources import Source, open_source
from univg_jax.errors import UserError
from univg_jax.settings import Config, Task

NUM_TARGETS = 1024

_logger = logging.getLogger(__name__)


def targets(
    config: Config,
    *,
    collator: Collator,
    num: int = NUM_TARGETS,
    sources: Mapping[str, Source] | None = None,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The targets of the first `num` rows of the stream of `fit_tasks`."""
    tasks = fit_tasks(config, collator=collator, sources=sources)
    config = dataclasses.replace(config, tasks=tasks)
    stream = Stream(config, collator=collator, sources=sources)
    for position in range(num):
        yield stream.row(position).example.target


def fit_tasks(
    config: Config, *, collator: Collator, sources: Mapping[str, Source] | None = None
) -> Mapping[str, Task]:
    """The tasks of `conditioning.fit_on`, or the run's own where it names none.

    A task of both reads the run's sources. One of later stages whose data is not there is left out.
    """
    found: dict[str, Task] = {}
    absent: list[str] = []
    for name, weights in config.conditioning.fit_on.items():
        task = Task(weight=sum(weights.values()), sources=weights)
        if name in config.tasks:
            found[name] = dataclasses.replace(task, sources=config.tasks[name].sources)
            continue
        try:
            for source in task.source_names:
                Reader(name, _open(source, config, sources), collator=collator)
        except UserError as error:
            absent.append(name)
            reason = error
        else:
            found[name] = task
    if absent:
        _logger.warning(
            "the codec is fitted without targets of the tasks %s, whose data is not there: %s",
            *(", ".join(absent), reason),
        )
    return found or config.tasks


def portraits(
    config: Config, *, collator: Collator, sources: Mapping[str, Source] | None = None
) -> Iterator[tuple[UInt8[np.ndarray, "f f 3"], int]]:
    """Every training picture of task id, of the size of a face, and the person that it shows.

    Raises UserError if the config has no such task, or its records no `person`.
    """
    if "id" not in config.tasks:
        raise UserError("conditioning.identity is fitted on the data of task 'id': add it to tasks")
    side = collator.shape.face
    for name in config.tasks["id"].source_names:
        source = _open(name, config, sources)
        reader = Reader("id", source, collator=collator, fields=("person",))
        for record in usable_records(reader, range(len(source))):
            picture = transforms.resize_image(record["image"], height=side, width=side)
            yield picture, record["person"]


def _open(name: str, config: Config, sources: Mapping[str, Source] | None) -> Source:
    if sources and name in sources:
        return sources[name]
    return open_source(name, "train", data_dir=config.data.dir)
