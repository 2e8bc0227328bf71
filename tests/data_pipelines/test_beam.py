"""Builds by Apache Beam: the files of a local build, byte for byte, and its messages."""

import json

import pytest

from data_pipelines import beam
from data_pipelines.build import build
from data_pipelines.datasets import DATASETS
from tests.data_pipelines import test_build
from tests.data_pipelines.test_build import DATASET, SMALL, content, numbers, skipped
from tests.native import captions, coco_pose
from univg_jax.errors import UserError


def run(out, dataset=DATASET, **options) -> None:
    beam.build(dataset, out, dataset.make_options(options), shard_bytes=SMALL)


def names(folder) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("writer", [captions, coco_pose])
def test_a_native_dataset_is_that_of_a_local_build(tmp_path, writer):
    options = writer.write(tmp_path / "native")
    dataset = DATASETS[writer.__name__.rpartition(".")[2]]
    run(tmp_path / "beam", dataset, **options)
    build(
        dataset,
        tmp_path / "local",
        dataset.make_options(options),
        processes=1,
        shard_bytes=SMALL,
    )
    assert names(tmp_path / "beam") == names(tmp_path / "local")
    for family in names(tmp_path / "local"):
        assert content(tmp_path / "beam" / family) == content(tmp_path / "local" / family)


@pytest.mark.parametrize(
    "options",
    [
        dict(bad=(5, 22)),
        dict(limit=9, split=("train",)),
        dict(hold_out=0.3, split=("validation",)),
    ],
)
def test_shards_limits_and_shares_are_those_of_a_local_build(tmp_path, options):
    run(tmp_path / "beam", **options)
    test_build.run(tmp_path / "local", **options)
    ours, theirs = (content(tmp_path / name / "shades") for name in ("beam", "local"))
    assert ours == theirs
    assert names(tmp_path / "beam") == ["shades"]
    if "bad" in options:
        assert len([name for name in ours if "array_record" in name]) > 10
        assert {row["key"] for row in skipped(tmp_path / "beam" / "shades")} >= {"train 5"}


def test_a_bucket_gets_the_same_files(bucket, tmp_path):
    run(bucket / "data")
    test_build.run(tmp_path / "local")
    for name, data in content(tmp_path / "local" / "shades").items():
        assert (bucket / "data" / "shades" / name).read_bytes() == data
    assert names(bucket / "data") == ["shades"]
    run(bucket / "data")  # is complete
    with pytest.raises(UserError, match="shade=7, not 8"):
        run(bucket / "data", shade=8)


def test_an_error_is_one_line_and_the_build_goes_on_from_what_is_staged(tmp_path, monkeypatch):
    entries = test_build.Pictures.entries

    def broken(self, part):
        if part == ("train", 16):
            raise UserError("images.zip is truncated: expected 3 members")
        return entries(self, part)

    monkeypatch.setattr(test_build.Pictures, "entries", broken)
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    assert str(caught.value) == "images.zip is truncated: expected 3 members"
    assert names(tmp_path) == [".shades.build"]
    staging = tmp_path / ".shades.build"
    kept = {file.name: file.stat().st_mtime_ns for file in staging.glob("train-*.npz")}
    assert len(kept) == 4

    # Only the part that is missing is read now, by a local build as well as by Beam.
    def only_that(self, part):
        assert part == ("train", 16) or part[0] == "test"
        return entries(self, part)

    monkeypatch.setattr(test_build.Pictures, "entries", only_that)
    test_build.run(tmp_path)
    assert test_build.captions(tmp_path, "train") == numbers()
    assert json.loads((tmp_path / "shades" / "build.json").read_text())["records"]["test"] == 40


def test_what_cannot_be_used_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no entry of split 'train' can be used; .*"):
        run(tmp_path, bad=tuple(range(40)))
    with pytest.raises(UserError, match=r"--beam_runner=DirctRunner: .*; known are DirectRunner, "):
        beam.build(DATASET, tmp_path, DATASET.make_options({}), runner="DirctRunner")
    flags = ["--direct_num_workers=x"]
    with pytest.raises(UserError, match=r"^--beam_options=--direct_num_workers=x: .*invalid int"):
        beam.build(DATASET, tmp_path, DATASET.make_options({}), pipeline_options=flags)
    assert names(tmp_path) == []


def test_flags_are_read_as_a_shell_does():
    assert beam.read_flags("--project=p  --labels='a b'") == ["--project=p", "--labels=a b"]
    with pytest.raises(UserError, match="--beam_options=region: expected flags such as --region="):
        beam.read_flags("region")
    with pytest.raises(UserError, match="No closing quotation"):
        beam.read_flags("--a='b")
