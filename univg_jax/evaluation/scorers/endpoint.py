"""`vqa` and `judge`: questions about pictures to a vision-language model that the user serves.

`judge` asks for a text about pictures, `vqa` for the probability of each answer of one token
(`scorers.chat` is how a server is asked).

Every answer is kept in a folder, by the hash of all that it depends on: the model, the prompt, how
it is asked, and the bytes of the pictures. So a killed run asks nothing twice, and replies can be
read again by another rule. What is not answered is not kept, and asked again by the next run.
"""

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import UInt8

from univg_jax.errors import NotFoundError, UnreachableError, UserError
from univg_jax.evaluation.scorers.chat import ONE_TOKEN, Chat, Reply, Sampling
from univg_jax.files import read_sealed, write_sealed
from univg_jax.images import data_uri, jpeg_bytes, png_bytes

MOST_FAILED = 20  # questions in a row, after which the server is taken for broken

Picture = UInt8[np.ndarray, "_ _ 3"] | bytes  # pixels, or a file as it is


class _State:
    """What the threads of an endpoint share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking: dict[str, Future] = {}
        self._served: set[str] = set()
        self._failed_in_a_row = 0
        self._stopping = threading.Event()

    def once(self, name: str, ask: Callable[[], Reply]) -> Reply:
        """`ask()`; the result of the thread that is asking the same, if one is."""
        with self._lock:
            asking = self._asking.get(name)
            if asking is None:
                mine = self._asking[name] = Future()
        if asking is not None:
            return asking.result()
        try:
            mine.set_result(ask())
        except BaseException as error:
            mine.set_exception(error)
        finally:
            with self._lock:
                del self._asking[name]
        return mine.result()

    def serve(self, reply: Reply) -> None:
        with self._lock:
            self._served |= {reply.model} - {""}

    @property
    def served(self) -> list[str]:
        with self._lock:
            return sorted(self._served)

    def count_failed(self, reply: Reply) -> int:
        """How many questions in a row have failed, this one included."""
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if reply.kind == "failed" else 0
            return self._failed_in_a_row

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises CancelledError in a block of `stopping_all`."""
        if self._stopping.wait(seconds):
            raise CancelledError

    @contextlib.contextmanager
    def stopping_all(self) -> Iterator[None]:
        """A block in which whoever waits stops waiting."""
        self._stopping.set()
        try:
            yield
        finally:
            self._stopping.clear()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint(Chat):
    """A model behind an address, whose answers are kept. Any number of threads may ask.

    `cache` is the folder of answers. `snapshot` says which version of `model` is served where the
    name does not, such as a date.
    """

    cache: epath.PathLike
    snapshot: str = ""
    _state: _State = dataclasses.field(
        default_factory=_State, init=False, repr=False, compare=False
    )

    @property
    def digest(self) -> str:
        """Which model it is, for results that depend on it."""
        return f"{self.model} {self.snapshot}".strip()

    def judge(
        self, images: Sequence[Picture], prompt: str, *, sampling: Sampling, again: int = 0
    ) -> Reply:
        """What the model says about pictures. `again` is the number of an answer to one question.

        Raises what `ask` raises, and UnreachableError for a server that failed for MOST_FAILED
        questions in a row.
        """
        kind = sampling.encoding
        encode = png_bytes if kind == "png" else lambda x: jpeg_bytes(x, quality=sampling.quality)
        # The label of files is PNG whatever they are: the official scripts of ImgEdit do so.
        sent = [(i, "png") if isinstance(i, bytes) else (encode(i), kind) for i in images]
        question = {
            "model": self.model,
            "snapshot": self.snapshot,
            "prompt": prompt,
            "sampling": dataclasses.asdict(sampling),
            "images": [hashlib.sha256(content).hexdigest() for content, _ in sent],
            "again": again,
        }
        text = json.dumps(question, sort_keys=True)
        file = epath.Path(self.cache) / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

        def ask() -> Reply:
            if (kept := _read(file)) is None:
                uris = [data_uri(content, kind=kind) for content, kind in sent]
                kept, said = self.ask(uris, prompt, sampling, wait=self._state.wait)
                self._check_failed(kept)
                if kept.kind != "failed":
                    write_sealed(
                        file, {"question": question, "reply": dataclasses.asdict(kept), **said}
                    )
            self._state.serve(kept)
            return kept

        return self._state.once(file.name, ask)

    def vqa(self, image: Picture, question: str, *, sampling: Sampling = ONE_TOKEN) -> Reply:
        """The most probable first token of the answer, as `text`, and the probabilities `p`.

        Raises what `judge` raises, and UserError for a server that gives no probabilities.
        """
        return self.judge([image], question, sampling=sampling)

    def interrupted(self) -> contextlib.AbstractContextManager[None]:
        """A block in which threads that wait to ask again give up, by a CancelledError."""
        return self._state.stopping_all()

    @property
    def served(self) -> list[str]:
        """The names by which the server called what answered: results store them."""
        return self._state.served

    def _check_failed(self, reply: Reply) -> None:
        if self._state.count_failed(reply) >= MOST_FAILED:
            raise UnreachableError(
                f"{self.url} answered none of {MOST_FAILED} questions in a row, the last one since "
                f"{reply.text}; answers so far are kept"
            )


def _read(file: epath.Path) -> Reply | None:
    """The reply in a file; None if there is none, or a damaged one."""
    try:
        return Reply(**read_sealed(file)["reply"])
    except NotFoundError:
        return None
    except (UserError, KeyError, TypeError) as error:
        logging.warning("an answer is asked for again: %s", error)
        return None
