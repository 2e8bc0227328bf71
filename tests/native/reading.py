"""A native dataset read as a build reads it: part by part, each as in a process of its own."""

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.native import Dataset
from data_pipelines.reader import Reader
from data_pipelines.sources import MemorySource
from tests.data_pipelines.toy import make_collator, text_of
from univg_jax.batch import Batch
from univg_jax.errors import UserError

Made = dict[str, dict[str, Any] | UserError]


def read(dataset: Dataset, options: Mapping[str, Any], split: str = "train") -> Made:
    """The stored records of a split by key, or why there is none. Checks keys and decodes all."""
    (native,) = dataset.open(dataset.make_options(options)).values()
    assert split in native.splits, native.splits
    found: Made = {}
    for part in native.parts(split):
        mine, part = pickle.loads(pickle.dumps((native, part)))
        assert "\n" not in str(part)
        for entry in mine.entries(part):
            entry = pickle.loads(pickle.dumps(entry))
            assert entry.key not in found, f"{entry.key} is there twice"
            assert entry.key.encode()
            assert all(isinstance(name, str) for name in entry.ids)
            found[entry.key] = _make(mine, entry.raw)
    assert not any("\n" in reason for reason in bad(found).values())
    return found


def _make(native: Any, raw: Any) -> dict[str, Any] | UserError:
    try:
        if isinstance(raw, UserError):
            raise raw
        record = dict(native.make(raw))
        assert tuple(record) == native.fields
        records.decode(record)
        return record
    except UserError as error:
        return error


def good(found: Made) -> dict[str, dict[str, Any]]:
    """Those that are records."""
    return {key: record for key, record in found.items() if isinstance(record, dict)}


def captions_of(found: Made) -> dict[str, list[tuple[str, str]]]:
    """The kinds and captions of the records."""
    return {
        key: list(zip(record["caption_kinds"], record["captions"], strict=True))
        for key, record in good(found).items()
    }


def bad(found: Made) -> dict[str, str]:
    """Why the others are none."""
    return {key: str(error) for key, error in found.items() if isinstance(error, UserError)}


def counts(dataset: Dataset, options: Mapping[str, Any]) -> dict[str, int]:
    """Records of each split."""
    (native,) = dataset.open(dataset.make_options(options)).values()
    return {split: len(good(read(dataset, options, split))) for split in native.splits}


def batch_of(found: Made, task: str) -> Batch:
    """The records as the rows of a batch of a task."""
    decoded = [records.decode(record) for record in good(found).values()]
    collator = make_collator()
    reader = Reader(task, MemorySource("native/train", decoded), collator=collator)
    rows = [reader.row(k, np.random.default_rng(k), sample_id=k) for k in range(len(decoded))]
    return collator(rows)


def prompts_of(batch: Batch) -> list[str]:
    """The texts of its rows, as the tokenizer got them."""
    return [text_of(tokens) for tokens in np.asarray(batch.tokens)]
