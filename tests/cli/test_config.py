"""`univg config`: all of a config without a workdir, and the page of settings."""

import json
import pathlib
import subprocess
import sys

from univg_jax import configs
from univg_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_of_settings_is_in_step(capsys):
    """`univg config > docs/config.md` renews it."""
    assert main(["config"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "config.md").read_text()


def test_what_is_printed_is_the_same_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["config", "--config=emoji:stage=3,preset=smoke", "--config.train.keep=None"]
    assert main(command) == 0
    (tmp_path / "c.json").write_text(capsys.readouterr().out)
    printed = configs.load("c.json")
    assert printed == configs.load("emoji:stage=3,preset=smoke", ["train.keep=None"])
    assert printed.train.keep is None
    assert configs.load("c.json", ["optim.freeze=('a',)"]).optim.freeze == ("a",)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_config_is_printed_without_jax(tmp_path):
    code = "import sys; from univg_jax.cli.main import main; main(['config', '--config=base'])"
    code += "; print('jax' in sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.strip() == "False"
    assert json.loads(done.stdout)["train"]["steps"] == 400_000
