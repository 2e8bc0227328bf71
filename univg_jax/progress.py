"""What long work shows of itself: a bar in a terminal, a line a minute elsewhere.

A log with a bar in it would be one line of megabytes, since a bar draws itself anew by carriage
returns. All bars of the project are `Bar`s.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging
from tqdm import tqdm

LINE_SECONDS = 60  # between two lines, where standard error is not a terminal


class Bar(tqdm):
    """`tqdm` in a terminal. Elsewhere a line each `LINE_SECONDS`, and one at the end.

    It takes what `tqdm` takes. With `leave=False`, what has ended leaves nothing: no bar, no last
    line.
    """

    def __init__(
        self, iterable: Iterable | None = None, desc: str | None = None, **options: Any
    ) -> None:
        self._in_terminal = options.setdefault("file", sys.stderr).isatty()
        if self._in_terminal:
            # `tqdm` draws nothing in a terminal that says no size, as those of some containers do.
            size = shutil.get_terminal_size()
            options = dict(ncols=size.columns, nrows=size.lines) | options
        else:
            # Without a width `tqdm` draws no bar; with `miniters` it asks for the time every time.
            every = dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
            options |= dict(ncols=0, miniters=1, **every)
        super().__init__(iterable, desc, **options)
        self._next_line = getattr(self, "start_t", 0.0) + LINE_SECONDS  # not yet set if disabled

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Shows how far it is: always in a terminal, elsewhere when a line is due."""
        if self._in_terminal:
            return super().display(msg, pos)
        if (now := self._time()) >= self._next_line:  # a new description displays, too
            self._write_line()
            self._next_line = now + LINE_SECONDS
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Makes room for other output in a terminal."""
        if self._in_terminal:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        """Shows the end."""
        if self._in_terminal or self.disable:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        if self.leave:
            self._write_line()

    def _write_line(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()


def make_room() -> None:
    """Clears the bars of the terminal, before a line is written; they draw themselves again."""
    for bar in list(getattr(Bar, "_instances", ())):
        bar.clear()


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Logs what begins, and at its end the time that it took. For work without a bar."""
    logging.info("%s ...", what)
    start = time.perf_counter()
    yield
    logging.info("%s took %.1f s", what, time.perf_counter() - start)
