"""Which code this is: the version, and the revision of the repository. Loads without JAX."""

import importlib.metadata
import json
import os
import pathlib
import subprocess

__version__ = "0.1.0"
ENVIRONMENT = "UNIVG_REVISION"  # says it where nothing else does: in an image
_ROOT = pathlib.Path(__file__).parents[1]


def revision() -> str | None:
    """The commit that this code is of, with `-dirty` where files were changed; None if unknown.

    It is found in the checkout that the code is in, in what pip recorded when it installed from a
    repository, or in the environment.
    """
    return _of_checkout() or _of_installation() or os.environ.get(ENVIRONMENT) or None


def describe() -> str:
    """Version and revision in a few words: `0.1.0 (revision 730225a1c0de)`."""
    return f"{__version__} (revision {revision() or 'unknown'})"


def _of_checkout() -> str | None:
    # Only this project's own: an environment may lie within the checkout of something else.
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    command += ["--exclude=*"]  # tags: always the commit
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _of_installation() -> str | None:
    try:
        recorded = importlib.metadata.distribution("univg_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id")
    return found and found[:12]
