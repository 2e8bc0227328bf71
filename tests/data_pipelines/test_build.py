"""Builds: resumable, the same by any processes, never half done in appearance, on disk or in a
bucket.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines import dataset_files
from data_pipelines.build import build, write_dataset
from data_pipelines.native import Dataset, Entry, Options
from data_pipelines.sources import open_source
from tests.marks import nightly
from univg_jax.errors import AlreadyExistsError, UserError
from univg_jax.fields import setting
from univg_jax.images import png_bytes

COUNT = 40  # entries of a split, in parts of 8
SMALL = 500  # bytes of a shard: a few records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shades(Options):
    """Which shade the pictures have, and which of them are bad."""

    shade: int = setting(7, "of all")
    bad: tuple[int, ...] = setting((), "entries without a picture")
    seconds: float = setting(0.0, "that an entry takes")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures of one shade and other sizes, as many in each split."""

    options: Shades
    splits: tuple[str, ...] = ("train", "test")
    fields: tuple[str, ...] = ("image", "caption")

    def parts(self, split):
        return [(split, k) for k in range(0, COUNT, 8)]

    def entries(self, part):
        split, start = part
        for k in range(start, start + 8):
            if k == 13:  # an entry that the files have twice
                yield Entry(key=f"{split} 12", raw=12)
            yield Entry(key=f"{split} {k}", raw=k, ids=(f"id{k}",))

    def make(self, raw):
        if self.options.shade == 200:
            raise KeyboardInterrupt
        time.sleep(self.options.seconds)
        pixels = np.full((4 + raw, 6, 3), self.options.shade, np.uint8)
        data = b"no picture" if raw in self.options.bad else png_bytes(pixels)
        return dict(image=data, caption=f"number {raw}")


DATASET = Dataset(
    name="shades",
    summary="pictures of one shade",
    tasks=("t2i",),
    options=Shades,
    open=lambda options: {"shades": Pictures(options)},
    license="CC0",
)


def run(out, *, processes=1, shard_bytes=SMALL, **options) -> None:
    options = DATASET.make_options(options)
    build(DATASET, out, options, processes=processes, shard_bytes=shard_bytes)


def captions(folder, split: str, name: str = "shades") -> list[str]:
    source = open_source(name, split, data_dir=str(folder))
    return [source.read(i)["caption"] for i in range(len(source))]


def numbers(*left_out: int) -> list[str]:
    return [f"number {k}" for k in range(COUNT) if k not in left_out]


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(pathlib.Path(folder).iterdir())}


def skipped(folder) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / dataset_files.SKIPPED).read_text().splitlines()]


def test_every_record_is_there_in_order_in_shards_of_the_size(tmp_path):
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shades"]
    for split in ("train", "test"):
        assert captions(tmp_path, split) == numbers()
    files = list((tmp_path / "shades").glob("*array_record*"))
    assert len(files) > 10
    sizes = [[4 + k, 6] for k in range(COUNT)]
    assert np.load(tmp_path / "shades" / "train.sizes.npy").tolist() == sizes
    about = json.loads((tmp_path / "shades" / "build.json").read_text())
    assert about["records"] == dict(train=COUNT, test=COUNT)
    assert about["skipped"] == 2
    assert sum(f.get("records", 0) for f in about["files"].values()) == 2 * COUNT
    assert list(dataset_files.verify(tmp_path / "shades")) == []


def test_tfds_reads_what_is_built(tmp_path):
    run(tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "shades")
    assert builder.info.splits["train"].num_examples == COUNT
    found = builder.as_data_source("train")[3]
    assert found["image"].shape == (7, 6, 3)
    assert found["caption"] == b"number 3"


def test_processes_and_shards_change_no_record_and_processes_no_byte(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "three", processes=3)
    assert content(tmp_path / "one" / "shades") == content(tmp_path / "three" / "shades")
    run(tmp_path / "large", shard_bytes=2**20)
    assert captions(tmp_path / "large", "train") == numbers()
    assert len(list((tmp_path / "large" / "shades").glob("*array_record*"))) == 2


def test_an_interrupted_build_does_not_look_complete_and_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, shade=200)
    assert [path.name for path in tmp_path.iterdir()] == [".shades.build"]
    with pytest.raises(UserError, match=r"was built with shade=200, not 7: choose another dir"):
        run(tmp_path)
    with pytest.raises(UserError, match="its build is not finished: build it again"):
        open_source("shades", "train", data_dir=str(tmp_path))


KILLED = """
import sys, test_build as t
if __name__ == "__main__":
    t.run(sys.argv[1], processes=2, bad=(3, 30), seconds=0.02)
"""


@pytest.mark.slow
@pytest.mark.parametrize("least", [3, *nightly(10)])
def test_a_build_that_was_killed_equals_the_undisturbed_one(tmp_path, least):
    (tmp_path / "program.py").write_text(KILLED)
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    command = [sys.executable, "-u", tmp_path / "program.py", tmp_path / "killed"]
    rng, kills = random.Random(0), 0
    while True:
        program = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
        try:
            # A start takes a second or two, the work about one: some are killed in each.
            code = program.wait(rng.uniform(0.5, 6) if kills < least else None)
        except subprocess.TimeoutExpired:
            program.send_signal(signal.SIGKILL)
            program.wait()
            kills += 1
            continue
        assert code == 0
        if kills >= least:
            break
        # It ended before it was killed so often: away with it, and once more.
        for file in (tmp_path / "killed" / "shades").iterdir():
            file.unlink()
        (tmp_path / "killed" / "shades").rmdir()
    run(tmp_path / "whole", bad=(3, 30), seconds=0.0001)
    killed, whole = (content(tmp_path / name / "shades") for name in ("killed", "whole"))
    for files in (killed, whole):  # which names the seconds
        files["build.json"] = files["build.json"].replace(b"0.0001", b"0.02")
    assert killed == whole
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["shades"]


def test_what_cannot_be_used_is_left_out_by_name(tmp_path):
    run(tmp_path, bad=(5, 22))
    assert captions(tmp_path, "train") == numbers(5, 22)
    found = {(row["split"], row["key"]): row for row in skipped(tmp_path / "shades")}
    twice = [("train", "train 12"), ("test", "test 12")]
    assert set(found) == {("train", "train 5"), ("train", "train 22"), *twice} | {
        ("test", "test 5"),
        ("test", "test 22"),
    }
    assert found["train", "train 12"]["reason"] == "is there twice"
    row = found["train", "train 5"]
    assert row["dataset"] == "shades"
    assert row["part"] == "('train', 0)"
    assert "'image' is not a readable image" in row["reason"]
    with pytest.raises(UserError, match=r"no entry of split 'train' can be used; .*"):
        run(tmp_path / "none", bad=tuple(range(COUNT)))
    assert not (tmp_path / "none" / "shades").exists()


def test_limit_split_and_exclusions(tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("id4\n\ntrain 7\nnobody\n")
    run(tmp_path / "a", limit=9, split=("train",), exclude_ids=str(ids))
    assert captions(tmp_path / "a", "train") == numbers(4, 7)[:9]
    with pytest.raises(UserError, match="unknown split"):
        captions(tmp_path / "a", "test")
    with pytest.raises(UserError, match=r"shades has no split 'validation' \(it has train, test\)"):
        run(tmp_path / "b", split=("validation",))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.txt has no ids: expected one in each line"):
        run(tmp_path / "b", exclude_ids=str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match=r"nothing\.txt: No such file"):
        run(tmp_path / "b", exclude_ids=str(tmp_path / "nothing.txt"))
    # Other ids are another dataset.
    ids.write_text("id5\n")
    with pytest.raises(UserError, match="was built with excluded="):
        run(tmp_path / "a", limit=9, split=("train",), exclude_ids=str(ids))


def test_a_share_is_held_out_by_the_key_alone(tmp_path):
    run(tmp_path / "a", hold_out=0.3)
    held = captions(tmp_path / "a", "validation")
    kept = captions(tmp_path / "a", "train")
    assert 5 <= len(held) <= 20
    assert sorted(held + kept) == sorted(numbers())
    run(tmp_path / "b", hold_out=0.3, split=("validation",), bad=(0, 1), limit=3)
    usable = [caption for caption in held if caption not in ("number 0", "number 1")]
    assert captions(tmp_path / "b", "validation") == usable[:3]


def test_a_build_into_a_bucket_goes_there(bucket, tmp_path):
    run(bucket / "data")
    run(tmp_path / "local")
    for file in (tmp_path / "local" / "shades").iterdir():
        assert (bucket / "data" / "shades" / file.name).read_bytes() == file.read_bytes()
    run(bucket / "data")
    with pytest.raises(UserError, match="shade=7, not 8"):
        run(bucket / "data", shade=8)


def test_a_damaged_file_is_found(tmp_path):
    run(tmp_path)
    folder = tmp_path / "shades"
    file = sorted(folder.glob("*array_record*"))[2]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (folder / "test.sizes.npy").unlink()
    assert sorted(dataset_files.verify(folder)) == [
        (file.name, "has another checksum"),
        ("test.sizes.npy", "is missing"),
    ]
    (folder / "test.sizes.npy").mkdir()
    assert ("test.sizes.npy", "cannot be read: Is a directory") in dataset_files.verify(folder)


@pytest.mark.parametrize("entry", [{"../x": {}}, {"a\0b": {}}, {"a\nb": {}}, {"a": 3}])
def test_an_entry_of_no_file_is_refused(tmp_path, entry):
    (tmp_path / "build.json").write_text(json.dumps({"files": entry}))
    with pytest.raises(
        UserError, match=r"^.*build\.json is damaged: '.*' in it is no file's entry$"
    ):
        list(dataset_files.verify(tmp_path))


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path / "file")


def picture(shade: int, **fields) -> dict:
    return dict(image=png_bytes(np.full((4, 4, 3), shade, np.uint8)), **fields)


def test_records_of_ones_own_become_a_dataset(tmp_path):
    def train():
        yield from (picture(k, caption=f"shade {k}") for k in range(5))

    write_dataset(tmp_path / "mine", dict(train=train(), validation=[picture(9, caption="nine")]))
    mine = open_source("mine", "train", data_dir=str(tmp_path))
    found = {record["caption"]: record["image"][0, 0, 0] for record in map(mine.read, range(5))}
    assert found == {f"shade {k}": k for k in range(5)}
    assert captions(tmp_path, "validation", "mine") == ["nine"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    write_dataset(tmp_path / "mine", dict(train=train(), validation=[picture(9, caption="nine")]))
    with pytest.raises(AlreadyExistsError, match="mine has other records; choose another folder"):
        write_dataset(tmp_path / "mine", dict(train=[picture(1, caption="one")]))
    assert captions(tmp_path, "validation", "mine") == ["nine"]


def test_records_of_ones_own_go_into_a_bucket(bucket):
    write_dataset(bucket / "mine", dict(train=[picture(1, caption="one")]))
    assert (bucket / "mine" / "dataset_info.json").exists()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "no records"),
        (dict(train=[]), "split 'train' has no records"),
        (
            dict(train=[picture(1), dict(image=b"GIF89a")]),
            r"train\[1\]: .*'image' is not a readable",
        ),
        (
            dict(train=[picture(1), picture(2, caption="")]),
            r"train\[1\] has the fields image, capt",
        ),
        (dict(train=[picture(1)], test=[dict(depth=b"")]), r"test\[0\] has the fields depth"),
        (dict(train=[picture(1, captoin="")]), "'captoin'; did you mean 'caption'"),
    ],
)
def test_records_that_cannot_be_used_are_named_and_nothing_is_left(tmp_path, splits, message):
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "data" / "mine", splits)
    assert not list(tmp_path.rglob("*.*"))
