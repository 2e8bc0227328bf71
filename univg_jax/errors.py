"""Errors that the user can mend: one readable line each, and the exit code of the command.

A function that checks input raises `UserError`, or the kind of it that says more. Whatever else is
raised is a bug of ours and keeps its traceback. Standard library only: any module may import it.
"""

import contextlib
import difflib
import re
import signal
from collections.abc import Collection, Iterator, Sequence
from typing import Any

# What ends a line, or moves a terminal's cursor, with the blanks around it.
_BREAKS = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*")
MAX_LISTED = 24  # longer lists of names, such as all keys of a config, are left out of a message


class UserError(ValueError):
    """Input that cannot be used. The message says what, where, and what was expected.

    It is one line, whatever stands in a file or in another library's message that it tells.
    """

    exit_code = 1
    is_expected = False  # whether the end is no fault: then the line has no "error:"

    def __init__(self, message: str = "") -> None:
        super().__init__(_BREAKS.sub(" ", message).strip())


class NotFoundError(UserError, FileNotFoundError):
    """A file, folder, checkpoint or package that does not exist."""


class AlreadyExistsError(UserError, FileExistsError):
    """Something is where new output should go."""


class UnsupportedError(UserError):
    """A task that the model does not have, or an input or option that the task does not take."""


class NonFiniteError(UserError, ArithmeticError):
    """The model made something that is no number, whatever it was asked for."""


class UnreachableError(UserError, ConnectionError):
    """Another process, or the storage, does not answer."""


class NonFiniteLossError(UserError, RuntimeError):
    """The loss or the gradient became NaN or infinite; no checkpoint holds that state."""


class Preempted(UserError):
    """SIGTERM or Ctrl-C ended the run; nothing is lost."""

    exit_code = 128 + signal.SIGTERM
    is_expected = True

    def __init__(self, message: str, *, signum: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


ENDED_BY = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


class Ended(KeyboardInterrupt):
    """A signal ended the command. No `Exception`, so that nothing on the way handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(ENDED_BY[signal.Signals(number)])
        self.number, self.exit_code = number, 128 + number


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports of packages that come with an extra of ours only.

    Raises NotFoundError with the pip command where one of them is not installed; `what` needs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise NotFoundError(
            f"{what} needs the package {str(error.name).partition('.')[0]}: "
            f"pip install 'univg_jax[{extra}]'"
        ) from None


def check_name(name: Any, names: Collection[str], *, what: str) -> str:
    """Returns `name` if it is one of `names`, else raises UserError with the nearest one."""
    if name not in names:
        raise UserError(f"unknown {what} {quote(name)}{suggestion(name, names)}")
    return name


def suggestion(name: object, names: Collection[str]) -> str:
    """The end of a message about an unknown name: `; did you mean 'b'? (known: a, b)`."""
    near = difflib.get_close_matches(str(name)[:200], names, n=1, cutoff=0.3)
    listed = f" (known: {', '.join(names) or 'none'})" if len(names) <= MAX_LISTED else ""
    return (f"; did you mean {near[0]!r}?" if near else "") + listed


def quote(value: object, most: int = 80) -> str:
    """A user's value for a message: its `repr`, cut in the middle where it is long."""
    text = repr(value)
    half = most // 2 - 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def shorten(lines: Sequence[str], most: int = 12) -> str:
    """The first `most` lines as one, and how many more there are."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more
