"""Every number of a flag has its range, every path may be in the home, every output is tried."""

import argparse
import importlib
import os

import pytest

from univg_jax import files
from univg_jax.cli import flags
from univg_jax.cli.main import COMMANDS, main
from univg_jax.cli.parser import Parser


def all_flags():
    """(command with its action, flag) for every flag that takes a value."""
    found = []

    def walk(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    walk(sub, (*words, name))
            elif action.nargs != 0:
                found.append((words, action))

    for command in COMMANDS:
        parser = Parser(prog=command, description="")
        importlib.import_module(f"univg_jax.cli.{command}").add_arguments(parser)
        walk(parser, (command,))
    return found


FLAGS = all_flags()
NUMBERS = [(words, action) for words, action in FLAGS if isinstance(action, flags.Number)]
OUTPUTS = [(words, action) for words, action in FLAGS if isinstance(action, flags.Output)]


def named(pairs):
    return [
        f"{' '.join(words)} {(action.option_strings or [action.dest])[0]}"
        for words, action in pairs
    ]


def refused(capsys, words, flag, text):
    assert main([*words, f"{flag}={text}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"univg {words[0]}: error: {flag}")
    return line


def test_servers_listen_to_this_machine_alone_by_default():
    hosts = {words[0]: action.default for words, action in FLAGS if action.dest == "host"}
    assert hosts == dict.fromkeys(["serve", "demo"], "127.0.0.1")


@pytest.mark.parametrize(("words", "action"), FLAGS, ids=named(FLAGS))
def test_numbers_and_paths_are_of_their_kinds(words, action):
    assert action.type not in (int, float)
    # X is also a share of `data build`, which the dataset's own settings read.
    is_number, metavar = isinstance(action, flags.Number), str(action.metavar)
    assert metavar in ("N", "I", "X", "HOURS") if is_number else metavar not in ("N", "I")
    if any(word in str(action.metavar) for word in ("DIR", "FILE")) and action.dest not in (
        "config",  # expanded where it is read
        *("stages", "evaluation"),  # lists of paths
    ):
        assert isinstance(action, flags.Output) or action.type is flags.path


@pytest.mark.parametrize(("words", "action"), NUMBERS, ids=named(NUMBERS))
def test_a_number_out_of_range_is_one_line_before_anything_else(capsys, words, action):
    flag = action.option_strings[0]
    assert action.rule.range
    for text in ("-1", "nan", "inf", "word", "None", "True", "1.5", "", "1e400"):
        if action.kind is float and text == "1.5":
            continue
        number = "a whole" if action.kind is int else "a finite"
        bound = ">=" if action.rule.above is None else ">"
        assert f"expected {number} number {bound} " in refused(capsys, words, flag, text)
    if action.rule.least == 1:
        assert "=0: expected" in refused(capsys, words, flag, "0")


@pytest.mark.parametrize(("words", "action"), OUTPUTS, ids=named(OUTPUTS))
def test_an_output_that_cannot_be_is_one_line_before_anything_else(tmp_path, capsys, words, action):
    flag = action.option_strings[0]
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    wrong = ["file/below", "file/deep/below", "/proc/nowhere/out"]
    wrong += ["file"] if action.folder else ["folder", "new/"]
    for name in wrong:
        refused(capsys, words, flag, name if name.startswith("/") else f"{tmp_path}/{name}")
    refused(capsys, words, flag, "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_another_address_than_a_buckets_is_one_line(capsys):
    for command in (["checkpoint", "list"], ["sample", "--task=t2i", "--prompt=x", "--checkpoint"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "s3://b/x"])
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert "s3://b/x: expected a local path or gs://, not s3://" in line
        assert line.count("\n") == 1


def test_every_command_that_writes_says_where():
    assert {" ".join(words) for words, _ in OUTPUTS} == {
        *("train", "evaluate", "report", "plan", "export"),
        *("data build", "data inspect", "data cache", "checkpoint copy"),
    }  # and sample, which looks at its other flags first


def test_the_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(files, "check_output", lambda path, **_: seen.append(path))
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", action=flags.Output, folder=True)
    parser.add_argument("--data", type=flags.path)
    args = parser.parse_args(["--out=~/a", "--data=~/b"])
    assert (args.out, args.data) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert seen == [f"{tmp_path}/a"]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--config.train.steps", "10"], "--config.train.steps 10: write --config.train.steps=10"),
        (["preset=smoke"], "arguments of a config follow it, --config=CONFIG:preset=smoke"),
        (["10"], "unexpected argument '10'"),
    ],
)
def test_a_space_too_many_is_named(capsys, arguments, meant):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config=emoji", "--workdir=w", *arguments])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert meant in line
