"""Damaged native files of labels end in one line: of the file, or of the entry that is left out."""

import json
import pathlib

import numpy as np
import pytest

from data_pipelines.datasets import coco_pose, hypersim, identity, kitti, phrasecut, refcoco
from data_pipelines.native import SPLITS
from tests.data_pipelines.datasets import building
from tests.native import coco_pose as coco_pose_files
from tests.native import hypersim as hypersim_files
from tests.native import identity as identity_files
from tests.native import kitti as kitti_files
from tests.native import phrasecut as phrasecut_files
from tests.native import refcoco as refcoco_files
from univg_jax.errors import UserError

CASES = {
    "coco_pose": (coco_pose.DATASET, coco_pose_files.write),
    "hypersim": (hypersim.DATASET, hypersim_files.write),
    "kitti": (kitti.DATASET, kitti_files.write),
    "phrasecut": (phrasecut.DATASET, phrasecut_files.write),
    "refcoco": (refcoco.DATASET, refcoco_files.write),
    "folders": (identity.DATASET, identity_files.write),
    "vggface2": (identity.DATASET, identity_files.write_vggface2),
    "celeba": (identity.DATASET, identity_files.write_celeba),
    "table": (identity.DATASET, identity_files.write_table),
}
MUTATIONS = 40  # of each
# What stands in place of any value of a JSON file.
OTHERS = (
    None,
    True,
    -1,
    3,
    1e308,
    10**30,
    "",
    "x",
    "\x00",
    [],
    [[]],
    [1],
    {},
    {"a": [1]},
    [None] * 4,
)


def read_all(dataset, options) -> None:
    """All splits, as far as files can be read: nothing but UserErrors may come out."""
    try:
        native = building.open_native(dataset, options)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    for split in SPLITS:
        if split in native.splits:
            try:
                building.read(native, split)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut, doubled, blanked or put in."""
    data = bytearray(content)
    at = int(rng.integers(len(data) + 1))
    some = int(rng.integers(1, 40))
    kind = rng.integers(5)
    if kind == 0:
        for k in rng.integers(len(data), size=rng.integers(1, 6)):
            data[k] ^= int(rng.integers(1, 256))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at : at + some]
    elif kind == 3:
        data[at : at + some] = bytes(len(data[at : at + some]))
    else:
        data[at:at] = rng.bytes(some)
    return bytes(data)


def mutate_json(content: bytes, rng: np.random.Generator) -> bytes:
    """One value, at any depth, is of another type, or is gone."""
    value = json.loads(content)
    places = []

    def visit(inside):
        for key in inside if isinstance(inside, dict) else range(len(inside)):
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                visit(inside[key])

    visit(value)
    # Most values are numbers of polygons: the others are as likely as these.
    deep = [place for place in places if not isinstance(place[0][place[1]], int | float)]
    inside, key = (deep if rng.integers(2) else places)[rng.integers(len(deep))]
    if rng.integers(4) == 0:
        del inside[key]
    else:
        inside[key] = OTHERS[rng.integers(len(OTHERS))]
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", CASES)
def test_only_one_line_comes_out(name, tmp_path):
    dataset, write = CASES[name]
    options = write(tmp_path)
    files = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    # Pictures are many, and of one kind: files of labels are as likely as these.
    labels = [p for p in files if p.suffix not in (".jpg", ".png")]
    rng = np.random.default_rng(sum(map(ord, name)))
    for number in range(MUTATIONS):
        choice = labels if labels and rng.integers(4) else files
        path: pathlib.Path = choice[rng.integers(len(choice))]
        whole = path.read_bytes()
        is_json = path.suffix == ".json" and number % 2
        path.write_bytes((mutate_json if is_json else mutate)(whole, rng))
        try:
            read_all(dataset, options)
        except Exception as error:
            error.add_note(f"mutation {number} of {path.relative_to(tmp_path)}")
            raise
        path.write_bytes(whole)
    read_all(dataset, options)
