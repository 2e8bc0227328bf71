"""Builds: resumable, never half done in appearance, on disk or in a bucket."""

import functools
import json
import os
import socket
import subprocess

import numpy as np
import pytest

from data_pipelines import build
from data_pipelines.build import Family, build_families, write_dataset
from data_pipelines.sources import open_source
from univg_jax.errors import AlreadyExistsError, UserError
from univg_jax.images import png_bytes

ARGUMENTS = dict(shade=7, version="1.0.0")


def make(shade: int, split: str, indices: range) -> list[dict]:
    png = png_bytes(np.full((4, 4, 3), shade, np.uint8))
    return [dict(image=png, caption=f"{split} {index}") for index in indices]


def families(make=make) -> list[Family]:
    counts = dict(train=70, validation=3)
    return [
        Family(
            name=name,
            fields=("image", "caption"),
            counts=counts,
            make=functools.partial(make, shade),
        )
        for name, shade in (("dark", 7), ("light", 200))
    ]


def run(out, *, make=make, shade=7, processes=1) -> None:
    build_families(
        out,
        families(make),
        dataset="shades",
        version="1.0.0",
        description="Pictures of one shade.",
        license="CC0",
        arguments=dict(shade=shade),
        processes=processes,
    )


def captions(folder, name: str, split: str) -> list[str]:
    source = open_source(name, split, data_dir=str(folder))
    return sorted(source.read(i)["caption"] for i in range(len(source)))


def interrupt(shade: int, split: str, indices: range) -> list[dict]:
    if shade == 200:
        raise KeyboardInterrupt
    return make(shade, split, indices)


def test_every_record_of_every_family_is_there(tmp_path):
    run(tmp_path / "new")
    assert captions(tmp_path / "new", "dark", "train") == sorted(f"train {k}" for k in range(70))
    assert len(captions(tmp_path / "new", "light", "validation")) == 3
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == ["build.json", "dark", "light"]


def test_an_interrupted_family_does_not_look_complete_and_the_others_stay(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, make=interrupt)
    assert build.is_complete(tmp_path, "dark")
    assert not build.is_complete(tmp_path, "light")
    stamp = (tmp_path / "dark" / "dataset_info.json").stat().st_mtime_ns
    # What a killed process leaves, which has no time to clean up; and what a living one works in.
    killed = subprocess.Popen(["true"])
    killed.wait()
    host = socket.gethostname()
    (tmp_path / f".light.{host}-{killed.pid}-abc.unfinished" / "rest").mkdir(parents=True)
    (tmp_path / f".light.{host}-{os.getpid()}-abc.unfinished").mkdir()
    (tmp_path / "light").mkdir()
    run(tmp_path)
    assert len(captions(tmp_path, "light", "train")) == 70
    assert (tmp_path / "dark" / "dataset_info.json").stat().st_mtime_ns == stamp
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [f".light.{host}-{os.getpid()}-abc.unfinished", "build.json", "dark", "light"]


def race(out, others, shade: int, split: str, indices: range) -> list[dict]:
    """Another process makes the whole dataset while this one is at its first records."""
    if not build.is_complete(out, "dark"):
        (out / "build.json").unlink()  # as if both had looked for it before either wrote it
        run(out, shade=others)
    return make(shade, split, indices)


def test_of_two_builds_at_once_both_end_well(tmp_path):
    run(tmp_path, make=functools.partial(race, tmp_path, 7))
    assert captions(tmp_path, "dark", "train") == sorted(f"train {k}" for k in range(70))
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["build.json", "dark", "light"]


def test_of_two_builds_by_other_arguments_at_once_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="was built with shade=8, not 7"):
        run(tmp_path, make=functools.partial(race, tmp_path, 8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json", "dark", "light"]


def test_other_arguments_are_refused(tmp_path):
    build.claim(tmp_path, ARGUMENTS)
    build.claim(tmp_path, ARGUMENTS)
    with pytest.raises(UserError, match="was built with shade=7, not 8: choose another directory"):
        build.claim(tmp_path, ARGUMENTS | dict(shade=8))
    (tmp_path / "build.json").write_text("{")
    with pytest.raises(UserError, match=r"build\.json is not JSON.*; remove .* and build again"):
        build.claim(tmp_path, ARGUMENTS)


def test_a_build_into_a_bucket_goes_there(bucket):
    out = bucket / "data"
    with pytest.raises(KeyboardInterrupt):
        run(out, make=interrupt)
    assert build.is_complete(out, "dark")
    assert not build.is_complete(out, "light")
    run(out)
    assert json.loads((out / "build.json").read_text()) == ARGUMENTS
    for name in ("dark", "light"):
        files = sorted(file.name for file in (out / name).iterdir())
        assert files == [
            "LICENSE",
            "dataset_info.json",
            "features.json",
            "shades-train.array_record-00000-of-00001",
            "shades-validation.array_record-00000-of-00001",
        ]
    with pytest.raises(UserError, match="shade=7, not 8"):
        run(out, shade=8)


def test_what_a_bucket_gets_are_the_files_of_a_local_build(bucket, tmp_path):
    run(tmp_path / "local")
    run(bucket / "data")
    for file in (tmp_path / "local" / "dark").iterdir():
        assert (bucket / "data" / "dark" / file.name).read_bytes() == file.read_bytes()


def picture(shade: int, **fields) -> dict:
    return dict(image=png_bytes(np.full((4, 4, 3), shade, np.uint8)), **fields)


def test_records_of_ones_own_become_a_dataset(tmp_path):
    def train():
        yield from (picture(k, caption=f"shade {k}") for k in range(5))

    write_dataset(tmp_path / "mine", dict(train=train(), validation=[picture(9, caption="nine")]))
    mine = open_source("mine", "train", data_dir=str(tmp_path))
    found = {record["caption"]: record["image"][0, 0, 0] for record in map(mine.read, range(5))}
    assert found == {f"shade {k}": k for k in range(5)}
    assert captions(tmp_path, "mine", "validation") == ["nine"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    write_dataset(tmp_path / "mine", dict(train=train(), validation=[picture(9, caption="nine")]))
    with pytest.raises(AlreadyExistsError, match="mine has other records; choose another folder"):
        write_dataset(tmp_path / "mine", dict(train=[picture(1, caption="one")]))
    assert captions(tmp_path, "mine", "validation") == ["nine"]


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
