"""A native dataset through its reader: to decoded records, and to a `Batch` of a task."""

import pickle

import numpy as np

from data_pipelines import records
from data_pipelines.collate import Collator
from data_pipelines.tasks import TASKS
from tests.data_pipelines import toy
from univg_jax.batch import BatchShape
from univg_jax.errors import UserError

SIZE = 32


def open_native(dataset, options: dict):
    """The only family of a dataset."""
    (native,) = dataset.open(dataset.make_options(options)).values()
    return native


def read(native, split: str) -> tuple[dict[str, dict], dict[str, str]]:
    """The decoded records of a split by key, and why the others were left out."""
    made, skipped = {}, {}
    for part in native.parts(split):
        # As in another process.
        native, part = pickle.loads(pickle.dumps((native, part)))
        assert "\n" not in str(part)
        for entry in native.entries(part):
            if entry.key in made | skipped:
                skipped[f"{entry.key} again"] = "is there twice"  # as a build says
                continue
            try:
                if isinstance(entry.raw, UserError):
                    raise entry.raw
                stored = native.make(entry.raw)
                assert tuple(stored) == native.fields
                made[entry.key] = records.decode(stored)  # a build decodes what it writes, too
            except UserError as error:
                skipped[entry.key] = str(error)
    assert not any("\n" in reason for reason in skipped.values())
    return made, skipped


def batch(decoded, task: str):
    """The records as one batch of `task`."""
    shape = BatchShape(height=SIZE, width=SIZE, num_tokens=80, face=16)
    collator = Collator(tokenizer=toy.tokenize, shape=shape)
    rng = np.random.default_rng(0)
    rows = [
        collator.row(TASKS[task].example(record, rng, SIZE), task=task, sample_id=k)
        for k, record in enumerate(decoded)
    ]
    return collator(rows)
