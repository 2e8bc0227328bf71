"""Scores the images of a public benchmark in a folder, whoever made them."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from univg_jax.errors import UserError
from univg_jax.evaluation import score
from univg_jax.evaluation.job import missing
from univg_jax.evaluation.official import Official, Request, Row
from univg_jax.evaluation.scorers import PROTOCOLS, Scorers, local_mesh
from univg_jax.evaluation.summaries import Scores
from univg_jax.images import open_picture, to_rgb
from univg_jax.progress import Bar
from univg_jax.together import each_together


def read_images(request: Request, folder: epath.PathLike) -> list[np.ndarray | None]:
    """The pictures of a request's files; None for one that is not there.

    Raises UserError for a file that is no picture, or a torn one.
    """
    images = []
    for name in request.files:
        file = epath.Path(folder) / name
        try:
            images.append(to_rgb(open_picture(file.read_bytes())))
        except FileNotFoundError:
            images.append(None)
        except UserError as error:
            raise UserError(f"{file} {error}") from None
    return images


def score_images(
    benchmark: Official, rows: Sequence[Row], folder: epath.PathLike, scorers: Scorers
) -> list[Scores]:
    """The sums and counts of each row, from the images in `folder`.

    All processes call it, each reads its share of the rows, and all return all rows. Raises
    UserError for a scorer that is missing, a picture that cannot be read, and a folder that has
    none.
    """
    for name in benchmark.needs:
        if name not in scorers:
            raise UserError(f"{benchmark.name} needs the scorer {name!r}: {PROTOCOLS[name]}")
    count, index, requests = jax.process_count(), jax.process_index(), benchmark.requests(rows)
    if len(missing(requests, folder)) == sum(len(request.files) for request in requests):
        raise UserError(
            f"{folder} has no image of {benchmark.name}: expected {requests[0].files[0]} and others"
        )
    template = benchmark.score(rows[0], [None] * len(requests[0].files), scorers)

    def share() -> Iterator[tuple[int, Scores] | None]:
        # Equally many on every process, which may have no row left in the last turn.
        for number in range(index, -(-len(rows) // count) * count, count):
            if number >= len(rows):
                yield None
                continue
            images = read_images(requests[number], folder)
            with local_mesh():
                yield number, benchmark.score(rows[number], images, scorers)

    found = {}
    with Bar(total=len(rows), desc="score", unit="row", disable=index > 0) as bar:
        for item in each_together(share()):
            if item is not None:
                number, found[number] = item
            bar.update(min(count, len(rows) - bar.n))
    table = score.gather(found, count=len(rows), template=template)
    return [{name: ratios[k] for name, ratios in table.items()} for k in range(len(rows))]
