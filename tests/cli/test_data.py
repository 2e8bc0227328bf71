"""A folder of data in a bad state ends each command in one line, before anything is made."""

import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest

from data_pipelines.build import write_dataset
from tests.smoke_run import CONFIG, FAST
from univg_jax import assembly, configs
from univg_jax.cli.main import main
from univg_jax.images import png_bytes

pytestmark = pytest.mark.xdist_group("pipeline")

SHARD = "records-{}.array_record-00000-of-00001"


def records(shade: int, count: int) -> list[dict]:
    image = png_bytes(np.full((32, 32, 3), shade, np.uint8))
    return [dict(image=image, caption=f"shade {shade}, {k}") for k in range(count)]


def write(folder: pathlib.Path, shade: int = 7) -> None:
    splits = dict(train=records(shade, 20), validation=records(9, 4), test=records(9, 4))
    write_dataset(folder / "mine", splits)


def own(data: pathlib.Path) -> list[str]:
    return [
        f"--config={CONFIG}1",
        "--config.data.dataset=own",
        f"--config.data.dir={data}",
        "--config.tasks.t2i.sources=mine",
        *(f"--config.{override}" for override in FAST),
    ]


def a_file(data):
    data.write_text("")


def empty(data):
    data.mkdir()


def unfinished(data):
    write(data)
    (data / "mine").rename(data / ".mine.build")


def without_info(data):
    write(data)
    (data / "mine" / "dataset_info.json").unlink()


def cut(split):
    def damage(data):
        write(data)
        shard = data / "mine" / SHARD.format(split)
        shard.write_bytes(shard.read_bytes()[:1000])

    return damage


def unreadable(data):
    write(data)
    (data / "mine" / "features.json").unlink()
    (data / "mine" / "features.json").mkdir()  # root may read what forbids it, so no permissions


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (a_file, "{data} is a file, expected a folder of datasets"),
        (empty, "no dataset at {data}/mine: {data} has no datasets"),
        (unfinished, "no dataset at {data}/mine: its build is not finished: build it again"),
        (without_info, "no dataset at {data}/mine: it has no dataset_info.json; an unfinished"),
        (cut("train"), "{data}/mine/records-train.array_record-00000-of-00001 is truncated"),
        (cut("validation"), "{data}/mine/records-validation.array_record-00000-of-00001 is trunc"),
        (unreadable, "{data}/mine/features.json is not a file"),
    ],
)
def test_train_names_what_is_wrong_with_its_data_and_claims_nothing(
    tmp_path, capsys, damage, message
):
    data = tmp_path / "data"
    damage(data)
    assert main(["train", *own(data), f"--workdir={tmp_path / 'run'}"]) == 1
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
    assert message.format(data=data) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/nowhere"])
def test_a_build_where_nothing_can_be_written_is_refused(tmp_path, capsys, folder):
    (tmp_path / "file").write_text("")
    out = tmp_path / folder
    build = ["data", "build", "--dataset=emoji_scenes", "--num_scenes=16", f"--out={out}"]
    assert main(build) == 1
    assert re.search(f"error: --out={out}.*(not a folder|cannot be)", capsys.readouterr().err)
    train = ["train", f"--config={CONFIG}1", f"--config.data.dir={out}"]
    assert main([*train, f"--workdir={tmp_path / 'run'}"]) == 1
    assert re.search(f"error: data.dir={out}.*(not a folder|cannot be)", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_config_takes_what_data_build_makes_as_it_says(tmp_path, capsys):
    out = tmp_path / "built here"
    command = ["data", "build", "--dataset=emoji_scenes", f"--out={out}"]
    assert main([*command, "--resolution=16", "--num_scenes=16", "--nouns=4"]) == 0
    flags = shlex.split(capsys.readouterr().out.partition("To train on it: ")[2])
    overrides = [flag.removeprefix("--config.") for flag in flags]
    config = configs.load(f"{CONFIG}3", overrides)
    assert config.data.dir == str(out)
    stamp = (out / "scenes" / "dataset_info.json").stat().st_mtime_ns
    assembly.prepare_data(config)
    assembly.check_data(config, "validation")
    assert (out / "scenes" / "dataset_info.json").stat().st_mtime_ns == stamp


def test_a_run_goes_on_with_its_pictures_wherever_they_lie_and_with_no_others(tmp_path, capsys):
    write(tmp_path / "data")
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main(["train", *own(tmp_path / "data"), workdir]) == 0
    before = main(["data", "inspect", *own(tmp_path / "data"), f"--out={tmp_path / 'page.html'}"])
    assert before == 0
    shutil.move(tmp_path / "data", tmp_path / "moved")
    more = ["--config.train.steps=3", workdir]
    write(tmp_path / "data", shade=8)
    capsys.readouterr()
    assert main(["train", *own(tmp_path / "data"), *more]) == 1
    assert "mine/train has other records than those of the saved" in capsys.readouterr().err
    assert main(["train", *own(tmp_path / "moved"), *more]) == 0
