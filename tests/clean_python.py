"""A Python that has some packages alone: what we export has to run where our package is not."""

import importlib.metadata
import pathlib
import subprocess
import venv
from collections.abc import Sequence

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = pathlib.Path(__file__).parents[1] / "requirements.lock"


def make_python(folder: pathlib.Path, needs: Sequence[str], *, installed: bool = False) -> str:
    """The Python of an environment in `folder` with packages and what they need.

    They are links to the files of our own environment, or `installed` by pip.
    """
    venv.create(folder, with_pip=installed, symlinks=True)
    python = folder / "bin" / "python"
    if installed:
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", LOCK, *needs]
        subprocess.run(list(map(str, pip)), check=True)
    else:
        (site,) = folder.glob("lib/python*/site-packages")
        _link(site, needs)
    return str(python)


def _link(site: pathlib.Path, needs: Sequence[str]) -> None:
    wanted, done = list(needs), set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        requirements = map(Requirement, distribution.requires or ())
        wanted += [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
        for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (site / entry).symlink_to(distribution.locate_file(entry))
