"""The image: what can be known of it without building it."""

import configparser
import fnmatch
import json
import pathlib
import re

from univg_jax import version

ROOT = pathlib.Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def instructions():
    """(name, arguments) of each instruction of the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(x.split(maxsplit=1)) for x in lines if x.strip() and not x.startswith("#")]


def of(name):
    return [arguments for found, arguments in instructions() if found == name]


def test_all_that_is_copied_is_in_the_repository_and_not_ignored():
    *rules, caches = (ROOT / ".dockerignore").read_text().split("\n*\n")[1].split()
    assert all(rule.startswith("!") for rule in rules)  # everything else is ignored
    assert fnmatch.fnmatch("univg_jax/cli/__pycache__", caches)
    shown = {rule.removeprefix("!") for rule in rules}
    copied = {source for arguments in of("COPY") for source in arguments.split()[:-1]}
    assert copied == shown
    assert all((ROOT / path).exists() for path in copied)


def test_it_has_what_an_installation_needs():
    copied = {source for arguments in of("COPY") for source in arguments.split()[:-1]}
    metadata = SETUP["metadata"]
    named = {
        metadata["long_description"].removeprefix("file: "),
        *metadata["license_files"].split(),
    }
    packages = {name.rstrip("*") for name in SETUP["options.packages.find"]["include"].split()}
    assert named | packages | {"setup.cfg", "pyproject.toml", "requirements.lock"} == copied
    (extras,) = re.findall(r"'\.\[(.*)\]'", "\n".join(of("RUN")))
    assert set(extras.split(",")) <= set(SETUP["options.extras_require"])
    assert {"tpu", "gcs"} <= set(extras.split(","))


def test_it_runs_the_command_as_a_user_who_is_not_root():
    (entry,) = of("ENTRYPOINT")
    scripts = SETUP["options.entry_points"]["console_scripts"]
    assert json.loads(entry) == [scripts.split("=")[0].strip()]
    (user,) = of("USER")
    assert f"useradd --uid 1000 --home-dir {of('WORKDIR')[-1]} {user}" in "\n".join(of("RUN"))


def test_its_python_is_one_that_the_project_takes():
    (image,) = of("FROM")
    newest = re.match(r"python:(\d+)\.(\d+)-", image).groups()
    assert tuple(map(int, newest)) >= (3, 11)
    assert (
        f"Programming Language :: Python :: {'.'.join(newest)}" in SETUP["metadata"]["classifiers"]
    )


def test_it_says_its_revision_where_there_is_no_repository(monkeypatch, tmp_path):
    assert f"{version.ENVIRONMENT}=$REVISION" in of("ENV")
    monkeypatch.setattr(version, "_ROOT", tmp_path)
    monkeypatch.setattr(version, "_of_installation", lambda: None)
    monkeypatch.setenv(version.ENVIRONMENT, "0123456789ab")
    assert version.revision() == "0123456789ab"
    monkeypatch.setenv(version.ENVIRONMENT, "")
    assert version.describe() == f"{version.__version__} (revision unknown)"
