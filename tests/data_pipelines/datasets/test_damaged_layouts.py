"""Damaged files of boxes and phrases end in one line: of the file, or of an entry left out."""

import numpy as np
import pytest

from data_pipelines.datasets import boxes, flickr30k_entities, grounded_sbu
from tests.data_pipelines.datasets.test_damaged_labels import read_all
from tests.native import boxes as boxes_files
from tests.native import drawing
from tests.native import flickr30k_entities as flickr_files
from tests.native import grounded_sbu as sbu_files
from tests.native.damage import damage

MUTATIONS = 34  # of each: some 100 in all


def write_unpacked(root):
    """Annotations as files, whose damage a zip's checksums would hide."""
    options = flickr_files.write(root)
    (root / "annotations.zip").unlink()
    for name, text in flickr_files.annotations().items():
        drawing.write_file(root / name, text)
    return options


CASES = {
    "boxes": (boxes.DATASET, boxes_files.write),
    "spans": (boxes.DATASET, boxes_files.write_spans),
    "flickr30k_entities": (flickr30k_entities.DATASET, write_unpacked),
    "zip": (flickr30k_entities.DATASET, flickr_files.write),
    "grounded_sbu": (grounded_sbu.DATASET, sbu_files.write),
}


@pytest.mark.parametrize("name", CASES)
def test_only_one_line_comes_out(name, tmp_path):
    dataset, write = CASES[name]
    options = write(tmp_path)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    labels = [path for path in files if path.suffix != ".jpg"]
    rng = np.random.default_rng(sum(map(ord, name)))
    for number in range(MUTATIONS):
        choice = labels if rng.integers(6) else files
        path = choice[rng.integers(len(choice))]
        whole = path.read_bytes()
        content = whole
        if name == "grounded_sbu" and path.suffix == ".tsv" and number % 2:
            # JSON of a line, behind its key.
            key, _, row = whole.split(b"\n")[0].partition(b"\t")
            content = key + b"\t" + damage(row, rng) + b"\n"
        else:
            content = damage(whole, rng)
        path.write_bytes(content)
        try:
            read_all(dataset, options)
        except Exception as error:
            error.add_note(f"mutation {number} of {path.relative_to(tmp_path)}")
            raise
        path.write_bytes(whole)
    read_all(dataset, options)
