"""Flags that make a command one of several processes: what is wrong with them, in one line, before
anything starts.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import yaml

from univg_jax import distributed
from univg_jax.cli import flags
from univg_jax.cli.main import main

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


def parse(*arguments):
    parser = argparse.ArgumentParser()
    flags.add_processes(parser)
    return parser.parse_args(arguments)


def test_help_names_the_variable_that_does_the_same():
    parser = argparse.ArgumentParser()
    flags.add_processes(parser)
    assert f"{distributed.ENVIRONMENT}=1" in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes=2"], "go together; missing: --coordinator, --process_id"),
        (["--coordinator=a:1", "--num_processes=2"], "missing: --process_id"),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2: expected 0 to 1",
        ),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=-1"],
            "--process_id=-1: expected a whole number >= 0",
        ),
        (
            ["--coordinator=a:1", "--num_processes=0", "--process_id=0"],
            "--num_processes=0: expected a whole number >= 1",
        ),
        (
            ["--coordinator=host", "--num_processes=2", "--process_id=1"],
            "--coordinator=host: expected HOST:PORT",
        ),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=0", "--distributed"],
            "give one or the other",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_flags_that_do_not_fit_together(tmp_path, capsys, command, arguments, message):
    needed = {
        "train": ["--config=experiments/emoji.py:preset=smoke", f"--workdir={tmp_path / 'w'}"],
        "sample": [
            f"--checkpoint={tmp_path}",
            "--task=t2i",
            "--prompt=x",
            f"--out={tmp_path}/o.png",
        ],
        "evaluate": [
            f"--checkpoint={tmp_path}",
            "--benchmark=emoji_scenes",
            f"--out={tmp_path / 'e'}",
        ],
    }
    assert main([command, *needed[command], *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_without_flags_there_is_one_process(monkeypatch):
    monkeypatch.delenv(distributed.ENVIRONMENT, raising=False)
    distributed.start()
    assert not distributed.is_one_of_several()
    distributed.exit_now(3, "")  # returns: the exit code is the caller's business


def test_a_coordinator_that_does_not_answer():
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("localhost", 0))
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"--coordinator={where} does not answer for 1 s"):
            distributed.start(coordinator=where, num_processes=2, process_id=1, timeout=1)


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_an_environment_that_says_nothing(tmp_path, how):
    # Without the query of Google's metadata server, which a machine with libtpu would wait for.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "TPU"))} | {
        "TPU_SKIP_MDS_QUERY": "1"
    }
    command = [
        sys.executable,
        "-m",
        "univg_jax",
        "train",
        "--config=experiments/emoji.py",
        f"--workdir={tmp_path / 'w'}",
    ]
    if how == "flag":
        command.append("--distributed")
    else:
        env[distributed.ENVIRONMENT] = "1"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "univg train: error: --distributed: the environment does not say who the other"
    )
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConnectionError, match=f"port {port} of this host cannot be had: Address already in use"
        ):
            distributed.start(coordinator=f"localhost:{port}", num_processes=2, process_id=0)


def test_the_files_for_launching_use_our_flags():
    """They parse, and the command in each is one that `univg train` takes."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 * 4 * 4 // 4  # 4x4x4 chips, 4 a host
    (container,) = job["template"]["spec"]["containers"]
    program, command, *arguments = container["command"]
    assert (program, command) == ("univg", "train")
    assert parse(*(a for a in arguments if not a.startswith(("--config", "--workdir")))).distributed

    script = LAUNCH / "tpu_vm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert "--distributed" in script.read_text()


def test_the_ssh_script_quotes_what_it_passes_on(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    arguments = ["train", "--config=e.py:a=1,b=2", "--config.tasks.t2i.sources=('scenes',)"]
    done = subprocess.run(
        [LAUNCH / "tpu_vm.sh", "NAME", "ZONE", *arguments],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        text=True,
    )
    remote = next(line for line in done.stdout.splitlines() if line.startswith("--command="))
    _, _, command = remote.partition("&& ")
    echoed = subprocess.run(
        ["bash", "-c", command.replace(".venv/bin/univg", "printf '%s\\n'")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert echoed.stdout.splitlines() == [*arguments, "--distributed"]
