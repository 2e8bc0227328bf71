"""A trace of chosen steps, for xprof and TensorBoard's profile page."""

import tempfile
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from univg_jax.errors import UserError
from univg_jax.files import writing


def parse_steps(text: str, *, total: int) -> range:
    """'10:15', the updates that lead from step 10 to step 15, of a run of `total` steps.

    Raises UserError for anything else.
    """
    start, _, stop = text.partition(":")
    numbers = start.isdecimal() and stop.isdecimal()
    if not (numbers and int(start) < int(stop) <= total):
        raise UserError(
            f"--profile={text}: expected START:STOP with 0 <= START < STOP <= {total}, "
            "the run's steps"
        )
    return range(int(start), int(stop))


class Trace:
    """What host and devices do in the updates from step `steps.start` to step `steps.stop`.

    Every process writes its own `folder/plugins/profile/TIME/HOST.xplane.pb`, as the viewers expect
    it. Used as a context, so that a run that fails inside the steps leaves its trace. Without steps
    it does nothing.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        steps: range | None,
        start: int = 0,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` is the step that the run goes on from: a trace before it cannot be made.

        If `before_write()` raises nothing is written.
        """
        self._before_write = before_write
        self._folder, self._steps = epath.Path(folder), steps or range(0)
        if steps and start >= steps.stop:
            logging.info("no trace: step %d is past %d:%d", start, steps.start, steps.stop)
        # Where the running trace goes: the profiler writes to local disks only.
        self._local: tempfile.TemporaryDirectory[str] | None = None

    def is_due(self, step: int) -> bool:
        """Whether the trace begins or ends at `step`; a resumed run may begin it in the middle."""
        return step in self._steps if self._local is None else step >= self._steps.stop

    def toggle(self) -> None:
        """Begins the trace, or ends it and writes it. The step before must be waited for first."""
        if self._local is None:
            self._local = tempfile.TemporaryDirectory(prefix="univg_trace_")
            options = jax.profiler.ProfileOptions()
            # Tracing Python's calls hooks into every thread of the process. With threads that come
            # and go it has ended the process by a segmentation fault (Python 3.11, JAX 0.10.2).
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._local.name, profiler_options=options)
            return
        jax.profiler.stop_trace()
        with self._local as local, writing(self._folder):
            self._local = None
            self._before_write()
            for path in epath.Path(local).glob("plugins/profile/*/*"):
                target = self._folder / path.relative_to(local)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.copy(target, overwrite=True)
        logging.info(
            "trace of steps %d:%d in %s", self._steps.start, self._steps.stop, self._folder
        )

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._local is not None:
            self.toggle()
