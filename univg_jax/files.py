"""One way to write a file: whole, or not at all."""

import os
import uuid

from etils import epath


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file so that a reader, or a killed run, never sees half of it; makes its folder.

    The content goes to a file of another name in the same folder, which then takes the final name.
    Two processes that write the same path at once do not mix: the last one stays. Paths may be
    `gs://`.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
