"""`univg data build|list|verify`, and the page of datasets."""

import pathlib
import sys

import pytest

from data_pipelines.datasets import DATASETS
from tests.native import captions
from univg_jax.cli.datasets import datasets_page
from univg_jax.cli.main import main


def test_the_page_of_datasets_is_of_this_version():
    """`univg data list --markdown > docs/datasets.md` renews it."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "datasets.md"
    assert page.read_text() == datasets_page()


def test_the_list_has_all_and_tells_all_of_one(capsys):
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{listed}" for name in DATASETS)
    assert main(["data", "list", "captions"]) == 0
    told = capsys.readouterr().out
    for quirk in DATASETS["captions"].quirks:
        assert " ".join(quirk.split()) in " ".join(told.split())
    assert main(["data", "list", "caption"]) == 1
    assert "did you mean 'captions'?" in capsys.readouterr().err


def test_a_folder_becomes_records_that_can_be_verified(tmp_path, capsys):
    options = captions.write(tmp_path / "native")
    command = ["data", "build", "--dataset=captions", f"--out={tmp_path}", "--processes=1"]
    command += [f"--{name}={value}" for name, value in options.items()]
    assert main(command) == 0
    assert f"--config.data.dir={tmp_path}" in capsys.readouterr().out
    folder = tmp_path / "captions"
    assert main(["data", "verify", str(folder)]) == 0
    shard = next(folder.glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["data", "verify", str(folder)]) == 1
    assert f"{shard.name} has another checksum; build it again" in capsys.readouterr().err
    assert main([*command, "--limit=1"]) == 1
    assert "was built with limit=None, not 1" in capsys.readouterr().err


def test_beam_makes_the_same_records(tmp_path, capsys, monkeypatch):
    options = captions.write(tmp_path / "native")
    command = ["data", "build", "--dataset=captions"]
    command += [f"--{name}={value}" for name, value in options.items()]
    assert main([*command, f"--out={tmp_path / 'local'}", "--processes=1"]) == 0
    beam = [*command, f"--out={tmp_path / 'beam'}", "--beam_runner=DirectRunner"]
    workers = "--beam_options=--direct_num_workers=1 --direct_running_mode=in_memory"
    assert main([*beam, workers]) == 0
    local, ours = (sorted((tmp_path / name / "captions").iterdir()) for name in ("local", "beam"))
    assert [file.name for file in local] == [file.name for file in ours]
    assert [file.read_bytes() for file in local] == [file.read_bytes() for file in ours]
    capsys.readouterr()
    assert main([*beam, "--processes=2"]) == 1
    assert "Beam's runners have flags of their own" in capsys.readouterr().err
    assert main([*beam[:-1], workers]) == 1
    assert "--beam_options needs --beam_runner" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert main(beam) == 1
    assert "needs the package apache_beam: pip install 'univg_jax[beam]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=caption"], "unknown dataset 'caption'; did you mean 'captions'?"),
        (["--dataset=captions", "--nouns=3"], "unknown option of dataset captions: '--nouns'"),
        (["--dataset=captions", "--hold_out=2"], "--hold_out=2: expected a finite number"),
        (["--dataset=captions", "--split=trian"], "unknown --split 'trian'; did you mean 'train'?"),
        (["--dataset=captions", "--source=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_built_is_one_line(tmp_path, capsys, flags, message):
    assert main(["data", "build", *flags, f"--out={tmp_path / 'out'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.glob("out/*"))
