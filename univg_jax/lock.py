"""A workdir is one process's at a time: `lock.json` says whose, as long as that process lives.

An owner on the same machine lives if its process id still has its start time. One on another
machine is watched: who lives changes the file every `BEAT` seconds, and who has not for `PATIENCE`
seconds is taken for dead. So no clocks are compared. What a dead owner left is taken over.

Two that start at once do not both get it where a folder can be locked: local disks, and most
network file systems. In a bucket (`gs://`) they might, within the moment between reading and
writing; the one whose file was overwritten ends at its next beat.

`takeover` takes a workdir from an owner that lives: it writes its name over the owner's, and waits
for two beats, within which the owner sees it and ends at its next step (`check`). One that was
stopped, or hangs, sees it whenever it goes on, because it looks right before it writes anything
(`confirm`). For that the new owner leaves its lock behind, marked as ended, where the one before
may still live. A lock that somebody deleted is written again by the owner.
"""

import atexit
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from absl import logging
from etils import epath

from univg_jax.errors import NotFoundError, UnreachableError, UserError
from univg_jax.files import read_json, write_whole
from univg_jax.trees import Json

FILE = "lock.json"
BEAT = 20.0  # seconds
PATIENCE = 3 * BEAT


class WorkdirLock:
    """Holds a workdir from construction to the end of its `with` block, or of the process.

    Another lock of the same process replaces it. Raises UserError if another process that lives has
    the workdir, and writes nothing then. With `active=False` (all processes of a run but the first)
    it does nothing. `takeover`: see above. A block that fails once another process has the workdir
    raises the error that says so.
    """

    def __init__(
        self, workdir: epath.PathLike, *, active: bool = True, takeover: bool = False
    ) -> None:
        self._file = epath.Path(workdir) / FILE
        self._owner: Json = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": _start_of(os.getpid()),
            "machine": _machine(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "token": uuid.uuid4().hex,
            "beats": 0,
            "stays": False,  # the file at the end, because an owner before may still live
        }
        self._released = threading.Event()
        self._writing = threading.Lock()
        self._lost_to = ""
        if not active:
            self._released.set()
        else:
            self._take(takeover)
            threading.Thread(target=self._beat, daemon=True).start()
            atexit.register(self.release)

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_failure = kind is not None and issubclass(kind, Exception)
        if is_failure:
            with contextlib.suppress(OSError, UserError):
                self._look()
        self.release()
        if is_failure:
            self.check()

    def release(self) -> None:
        """Gives the workdir back; does nothing the second time.

        A lock that the storage does not let go is left: it is a dead process's then.
        """
        atexit.unregister(self.release)
        with self._writing:
            if self._released.is_set():
                return
            self._released.set()
            try:
                if (_read(self._file) or {}).get("token") != self._owner["token"]:
                    return
                if self._owner["stays"]:
                    write_whole(self._file, json.dumps(self._owner | {"ended": True}))
                else:
                    self._file.unlink(missing_ok=True)
            except (OSError, UserError) as error:
                logging.warning("%s stays: %s", self._file, error)

    def check(self) -> None:
        """Raises UserError if another process has the workdir, by the newest beat: cheap."""
        if self._lost_to:
            raise UserError(f"{self._file.parent} was taken over by {self._lost_to}")

    def confirm(self) -> None:
        """`check` of this moment: call it right before anything is written into the workdir.

        Raises UserError also where the workdir is gone.
        """
        self._look()
        self.check()

    def _take(self, takeover: bool) -> None:
        watched, deadline = None, 0.0
        self._file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with _exclusive(self._file.parent):
                found = _read(self._file)
                is_dead = found == watched and time.monotonic() >= deadline
                is_free = found is None or self._is_ours(found) or is_dead or _is_gone(found)
                if is_free or takeover:
                    is_over = not found or self._is_ours(found) or _is_gone(found)
                    self._owner["stays"] = not is_over or bool(found and found.get("stays"))
                    write_whole(self._file, json.dumps(self._owner))
                    break
            if found.get("machine") == _machine() or watched not in (None, found):
                raise UserError(
                    f"{self._file.parent} is in use by {_name(found)}; end that first, or take it "
                    "over with --takeover"
                )
            if watched is None:
                watched, deadline = found, time.monotonic() + PATIENCE
                logging.warning("%s: seeing if %s lives", self._file, _name(found))
            time.sleep(BEAT / 10)
        if found is None or self._is_ours(found) or found.get("ended"):
            return
        state = "which is gone" if is_free else "which ends now"
        logging.warning("%s: taken over from %s, %s", self._file, _name(found), state)
        if not is_free:
            time.sleep(2 * BEAT)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            # What a full disk, or a bucket that does not answer, refuses ends the run elsewhere.
            with contextlib.suppress(OSError, UserError):
                self._look(beats=1)

    def _look(self, *, beats: int = 0) -> None:
        """Sees whose the workdir is, and writes the lock again where it is gone, or for a beat."""
        folder = self._file.parent
        gone = UserError(f"{folder} is gone: who moved or deleted it?")
        with self._writing, contextlib.ExitStack() as stack:
            if self._released.is_set():
                return
            try:
                stack.enter_context(_exclusive(folder))
            except FileNotFoundError:
                raise gone from None
            found = _read(self._file)
            if not found and not folder.exists():  # a bucket
                raise gone
            if found and found.get("token") != self._owner["token"]:
                if not self._is_ours(found):
                    logging.error("%s: %s HAS TAKEN OVER THIS RUN", self._file, _name(found))
                    self._lost_to = _name(found)
                self._released.set()
            elif beats or not found:
                if not found:
                    logging.warning("%s is gone, it is written again", self._file)
                self._owner["beats"] += beats
                write_whole(self._file, json.dumps(self._owner))

    def _is_ours(self, found: Json) -> bool:
        """Whether a lock is this process's."""
        return all(found.get(key) == self._owner[key] for key in ("machine", "pid", "start"))


@contextlib.contextmanager
def _exclusive(folder: epath.Path) -> Iterator[None]:
    """A block in which no other process is for the same folder, which must be there.

    One that was stopped in its block is not waited for.
    """
    if "://" in os.fspath(folder):
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(100):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _read(file: epath.Path) -> Json | None:
    """What a lock says; nothing of a torn one, which is nobody's; None where there is none."""
    try:
        return read_json(file)
    except NotFoundError:
        return None
    except UnreachableError:
        raise
    except UserError as error:
        logging.warning("%s", error)
        return {}


def _is_gone(owner: Json) -> bool:
    """Whether the owner is known to have ended: it said so, or was a process of this machine."""
    if not owner or owner.get("ended"):
        return True
    return owner.get("machine") == _machine() and _start_of(owner.get("pid")) != owner.get("start")


def _name(owner: Json) -> str:
    if not owner:
        return "nobody"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def _machine() -> str:
    """What process ids belong to: a boot of a machine, and a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(pid: object) -> str | None:
    """When a process of this machine started, in ticks; None if it does not live.

    Empty where there is no `/proc` and it lives.
    """
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        if not os.path.isdir("/proc/self"):
            os.kill(pid, 0)
            return ""
        # The name, in parentheses, may have anything in it.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return ""
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
