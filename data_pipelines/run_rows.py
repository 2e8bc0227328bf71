"""Every row that a run will see: of its first steps, its validation and its previews."""

from collections.abc import Callable, Iterator

import grain

from data_pipelines.collate import Collator, Row
from data_pipelines.held_out import HeldOut, Hosts
from data_pipelines.mixture import Stream
from data_pipelines.order import host_rows
from univg_jax.settings import Config


def rows_of_run(
    config: Config,
    collator: Collator,
    *,
    steps: int,
    begin: Callable[[Stream], None] = lambda stream: None,
    hosts: Hosts = Hosts(),
) -> Iterator[list[Row]]:
    """This process's share of the rows, at most its rows of a batch at a time.

    Lists come equally often on every process, and may be empty. `begin` puts the stream where the
    run begins, if it follows another one.
    """
    share = dict(process_index=hosts.index, process_count=hosts.count)
    stream = Stream(config, collator=collator, **share)
    begin(stream)
    mine = host_rows(config.data.batch_size, **share)
    yield from _training_rows(config, stream, mine, steps=steps)
    # Losses are of the stream's shapes, previews are square.
    c = config.train
    for num, shapes in ((c.eval_examples, stream.shapes), (c.sample_examples, ())):
        for name in stream.shares if num else ():
            options = dict(split="validation", num=num, collator=collator, shapes=shapes)
            held_out = HeldOut(config, name, **options, hosts=hosts)
            for start in range(0, len(held_out), config.data.batch_size):
                indices = [start + row for row in mine if start + row < len(held_out)]
                yield [held_out.row(index) for index in indices]


def _training_rows(
    config: Config, stream: Stream, mine: range, *, steps: int
) -> Iterator[list[Row]]:
    start, size = stream.get_state()["next"], config.data.batch_size
    positions = grain.MapDataset.range(steps * len(mine)).map(
        lambda i: start + i // len(mine) * size + mine[i % len(mine)]
    )
    # As in training; ahead by as many rows as `prefetch` batches have.
    read = grain.ReadOptions(
        num_threads=config.data.read_threads,
        prefetch_buffer_size=config.data.prefetch * len(mine),
    )
    rows = iter(positions.map(stream.row).to_iter_dataset(read_options=read))
    try:
        for _ in range(steps):
            yield [next(rows) for _ in mine]
    finally:
        rows.close()
