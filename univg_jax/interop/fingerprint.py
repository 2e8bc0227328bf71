"""The hash of a file's whole content, computed once and remembered.

Weights are gigabytes, and a run asks for their hash at every start. So the hash of a file is kept
in the user's cache, under a key of all by which a file system tells that a file was changed: path,
device, inode, size and the times of its content and of its inode. Where nothing can be written,
the file is hashed every time.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from univg_jax.errors import UserError
from univg_jax.files import write_whole

FOLDER = "~/.cache/univg_jax/sha256"
# A file that was changed so recently may be changed again without its times showing it.
SETTLED_SECONDS = 1.0


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    key = _key(path)
    try:
        remembered = Path(FOLDER).expanduser() / key
        digest, check = remembered.read_text().split()
        if check == _check(key, digest):
            return digest
    except (OSError, ValueError):  # not there, or not what was written
        pass
    except RuntimeError:  # this user has no home
        remembered = None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_settled = time.time() - path.stat().st_ctime > SETTLED_SECONDS
    if remembered is not None and is_settled and key == _key(path):
        with contextlib.suppress(UserError):  # it is only slower without
            write_whole(remembered, f"{digest} {_check(key, digest)}")
    return digest


def _key(path: Path) -> str:
    stat = path.stat()
    parts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr((os.path.realpath(path), *parts)).encode()).hexdigest()


def _check(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()
