"""Every row that a run will see: of its first steps, its validation and its previews."""

from collections.abc import Iterable, Iterator

import grain

from data_pipelines.collate import Row
from data_pipelines.held_out import HeldOut, Hosts
from data_pipelines.mixture import Stream
from data_pipelines.order import host_rows
from univg_jax.settings import Data


def rows_of_run(
    data: Data, stream: Stream, held_out: Iterable[HeldOut], *, steps: int, hosts: Hosts
) -> Iterator[list[Row]]:
    """This process's share of the rows, at most its rows of a batch at a time.

    They are those of the next `steps` batches of `stream`, and of all of `held_out`. Lists come
    equally often on every process, and may be empty.
    """
    share = dict(process_index=hosts.index, process_count=hosts.count)
    mine = host_rows(data.batch_size, **share)
    yield from _training_rows(data, stream, mine, steps=steps)
    for examples in held_out:
        for start in range(0, len(examples), data.batch_size):
            indices = [start + row for row in mine if start + row < len(examples)]
            yield [examples.row(index) for index in indices]


def _training_rows(data: Data, stream: Stream, mine: range, *, steps: int) -> Iterator[list[Row]]:
    start, size = stream.get_state()["next"], data.batch_size
    positions = grain.MapDataset.range(steps * len(mine)).map(
        lambda i: start + i // len(mine) * size + mine[i % len(mine)]
    )
    # As in training: ahead by as many rows as `prefetch` batches have.
    read = grain.ReadOptions(
        num_threads=data.read_threads, prefetch_buffer_size=data.prefetch * len(mine)
    )
    rows = iter(positions.map(stream.row).to_iter_dataset(read_options=read))
    try:
        for _ in range(steps):
            yield [next(rows) for _ in mine]
    finally:
        rows.close()
