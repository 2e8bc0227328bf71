"""Random access to many shards, of which only some are open at a time."""

import concurrent.futures
import gc
import os
import threading

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import shards
from data_pipelines.shards import Shard, Shards


def write(folder, counts) -> list[Shard]:
    """Shards whose records tell their number."""
    written, number = [], 0
    for k, count in enumerate(counts):
        path = str(folder / f"{k:03d}.array_record")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for _ in range(count):
            writer.write(b"record %d" % number)
            number += 1
        writer.close()
        written.append(Shard(filename=path, examples_in_shard=count))
    return written


def open_files(folder) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


def test_records_lie_one_shard_after_another(tmp_path):
    found = Shards(write(tmp_path, [3, 0, 1, 5]))
    assert len(found) == 9
    assert list(found) == [b"record %d" % k for k in range(9)]
    for outside in (-1, 9):
        with pytest.raises(IndexError):
            found[outside]


def test_threads_read_from_more_shards_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_open", shards._OpenFiles(4))
    found = Shards(write(tmp_path, [2] * 30))
    order = np.random.default_rng(0).integers(60, size=600).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found.__getitem__, order)) == [b"record %d" % k for k in order]
    assert open_files(tmp_path) == 4


def test_files_are_closed_with_the_last_use_of_the_shards(tmp_path):
    found = Shards(write(tmp_path, [2] * 5))
    assert found[9] == b"record 9"
    assert open_files(tmp_path) == 1
    del found
    gc.collect()
    assert open_files(tmp_path) == 0


def test_garbage_may_be_collected_at_any_instruction(tmp_path, monkeypatch):
    """Also while this thread opens a file: whoever closes those of the garbage must not wait."""
    files = shards._OpenFiles(4)
    monkeypatch.setattr(shards, "_open", files)
    written = write(tmp_path, [2] * 4)
    kept, garbage = Shards(written), [Shards(written)]
    assert (kept[0], garbage[0][3]) == (b"record 0", b"record 3")
    garbage.append(garbage)  # a cycle: only a collection frees it
    del garbage

    def collect() -> None:
        with files._lock:
            gc.collect()

    worker = threading.Thread(target=collect, daemon=True)
    worker.start()
    worker.join(timeout=20)
    assert not worker.is_alive()
    assert kept[7] == b"record 7"
    assert open_files(tmp_path) == 2
