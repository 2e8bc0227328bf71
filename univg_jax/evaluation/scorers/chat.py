"""A question to a server that speaks OpenAI's chat protocol over HTTP, as vLLM and SGLang do.

It has one of three ends. The model *answered*, whatever it said; it *refused*, as the server itself
says; or it *failed*, after all attempts. None is turned into a score here.
"""

import collections
import dataclasses
import datetime
import email.utils
import json
import math
import os
import socket
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import requests
from absl import logging
from requests.adapters import HTTPAdapter

from univg_jax.errors import UnreachableError, UserError, quote
from univg_jax.files import MAX_JSON_BYTES, parse_json

CONNECT_SECONDS = 10.0  # for a server to accept a connection
MAX_RETRY_AFTER = 600.0  # seconds; a server that asks for more is asked again by another run
RETRIED = (408, 409, 425, 429, *range(500, 600))  # HTTP's: later it may work
REFUSING_CODES = ("content_filter", "content_policy_violation")
RESERVED = ("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs")
SECRET_CHARACTERS = 8  # a shorter key is none, such as "EMPTY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a benchmark asks. It moves scores, so results store it, and answers are kept by it.

    Pictures that are arrays are sent as `encoding`; those that are bytes of a file are sent as they
    are. None leaves the choice to the server. `extra` are more fields of the request, such as
    `{"chat_template_kwargs": {"enable_thinking": False}}`.
    """

    images_first: bool
    encoding: Literal["png", "jpeg"] = "png"
    quality: int = 75  # of JPEG
    temperature: float | None = None
    max_tokens: int | None = None
    top_logprobs: int | None = None  # how many tokens have a probability
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := [name for name in self.extra if name in RESERVED]:
            raise UserError(
                f"{taken[0]!r} is not an extra field of a request: it has its own place"
            )

    def fields(self) -> dict[str, Any]:
        """The fields of a request beside the model and the message."""
        named = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.top_logprobs is not None:
            named |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {k: v for k, v in named.items() if v is not None} | dict(self.extra)


# One token, the most probable one, and as many probabilities as servers give.
ONE_TOKEN = Sampling(images_first=True, temperature=0.0, max_tokens=1, top_logprobs=20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """How a question ended. `text` is what the model said, or why there is no answer.

    `p` has, of `vqa`, the probability of each first token that the server tells, by its text with
    its spaces; a token that is not there counts as 0.
    """

    kind: Literal["answered", "refused", "failed"]
    text: str
    p: Mapping[str, float] = dataclasses.field(default_factory=dict)
    model: str = ""  # as the server calls what answered, often with its date


class _Unusable(Exception):
    """An attempt without an answer, for a reason that may pass.

    `wait` is in seconds, where the server says it. `is_nobody`: no server was there at all.
    """

    def __init__(self, why: str, *, wait: float = 0.0, is_nobody: bool = False) -> None:
        super().__init__(why)
        self.wait, self.is_nobody = wait, is_nobody


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """A model behind an address. Any number of threads may ask.

    `url` is the base, such as http://localhost:8000/v1. The key, if the server wants one, is in the
    environment variable `key_variable`; it goes to this server alone, into no log and no file.

    A question is asked at most `attempts` times, `backoff` seconds after the first time, twice
    as long after each further time, at most `max_wait`, and never before the server's
    `Retry-After`. `timeout` is for a whole answer, in seconds. `concurrency` is how many questions
    are asked at once.

    Raises UserError for an address that is none, or that has a password in it.
    """

    url: str
    model: str
    key_variable: str = "UNIVG_ENDPOINT_KEY"
    concurrency: int = 16
    timeout: float = 300.0
    attempts: int = 8
    backoff: float = 1.0
    max_wait: float = 60.0
    _session: requests.Session = dataclasses.field(
        default_factory=requests.Session, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if set(self.url) & set("@?#"):
            # The address itself is not shown: what is too much in it may be secret.
            raise UserError(
                "the address of a model must have no user, password or query: put its key into the "
                f"environment variable {self.key_variable}"
            )
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_base = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_base = False
        if not is_base:
            raise UserError(f"{quote(self.url)} is no address of a server: expected http://HOST/v1")
        for name in ("concurrency", "attempts", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} of {self.url} is {getattr(self, name)}: expected above 0")
        adapter = HTTPAdapter(pool_maxsize=self.concurrency, max_retries=0)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def ask(
        self,
        uris: Sequence[str],
        prompt: str,
        sampling: Sampling,
        *,
        wait: Callable[[float], None] = time.sleep,
    ) -> tuple[Reply, Mapping[str, Any]]:
        """The reply after all attempts that it takes, and what else it says of itself.

        `uris` are pictures, and `wait(seconds)` passes the time between two attempts. Raises
        UserError where no question can be answered: no server (UnreachableError), a key that is
        refused, a model that is not there, no probabilities where they are asked for.
        """
        images = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
        text = [{"type": "text", "text": prompt}]
        content = images + text if sampling.images_first else text + images
        message = {"role": "user", "content": content}
        fields = {"model": self.model, "messages": [message], **sampling.fields()}
        body = json.dumps(fields).encode()
        delay = 0.0
        for attempt in range(self.attempts):
            wait(delay)
            try:
                reply, said = self._attempt(body, sampling)
                break
            except _Unusable as error:
                reply, said = Reply(kind="failed", text=str(error)), {}
                is_nobody = error.is_nobody
                delay = max(min(self.backoff * 2**attempt, self.max_wait), error.wait)
        else:
            if is_nobody:
                raise UnreachableError(f"{self.url}: {reply.text}")
        if reply.kind == "failed":
            logging.warning("%s does not answer a question: %s", self.url, reply.text)
        return reply, said

    def _attempt(self, body: bytes, sampling: Sampling) -> tuple[Reply, Mapping[str, Any]]:
        """Asks once. Raises _Unusable where another attempt may help."""
        try:
            status, headers, content = self._post(body)
        except requests.Timeout:
            raise _Unusable(f"there is no whole answer after {self.timeout:g} s") from None
        except requests.RequestException as error:
            if _is_nobody(error):
                raise _Unusable("no server answers at this address", is_nobody=True) from None
            raise _Unusable(f"the connection broke ({_short(error)})") from None
        if status != 200:
            return self._refusal(status, headers, content, sampling), {}
        try:
            value = parse_json(content, where="the answer")
        except UserError as error:
            raise _Unusable(str(error)) from None
        try:
            choice = value["choices"][0]
            reply = _reply(value, choice, with_p=sampling.top_logprobs is not None)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise _Unusable(f"the answer has no text: {_short(content.decode())}") from None
        if reply is None:
            raise self._no_probabilities("")
        return reply, {"finish_reason": choice.get("finish_reason"), "usage": value.get("usage")}

    def _refusal(
        self, status: int, headers: Mapping[str, str], content: bytes, sampling: Sampling
    ) -> Reply:
        """What an answer other than 200 means. Raises _Unusable, or UserError where it is final."""
        code, message = _error_of(content)
        why = f"HTTP {status}: {message}"
        if status in RETRIED:
            wait = _retry_after(headers.get("Retry-After"))
            if wait > MAX_RETRY_AFTER:
                raise UnreachableError(
                    f"{self.url} asks to wait for {wait:.0f} s: evaluate again then, answers so "
                    "far are kept"
                )
            raise _Unusable(why, wait=wait)
        if status in (401, 403):
            raise UserError(
                f"{self.url} refuses the key in the environment variable {self.key_variable} "
                f"({'which is set' if self._key() else 'which is not set'}): {why}"
            )
        if status in (404, 405) or status < 400:
            raise UserError(
                f"{self.url} has no model {quote(self.model)} to chat with, expected an address "
                f"such as http://HOST/v1 and a model that is served there: {why}"
            )
        if code in REFUSING_CODES:
            return Reply(kind="refused", text=message)
        if sampling.top_logprobs is not None and "logprob" in message:
            raise self._no_probabilities(f" ({why})")
        return Reply(kind="failed", text=why)

    def _no_probabilities(self, why: str) -> UserError:
        return UserError(
            f"{self.url} gives no probabilities of tokens of {quote(self.model)}{why}: vqa needs "
            "`logprobs` with 20 `top_logprobs`, as vLLM and SGLang give them; a plain yes or no is "
            "no stand-in"
        )

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and content. Raises requests' errors, Timeout at the deadline."""
        deadline = time.monotonic() + self.timeout
        key = self._key()

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            # Given always: without it requests would look for a password in ~/.netrc.
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        with self._session.post(
            self.url.rstrip("/") + "/chat/completions",
            data=body,
            headers={"Content-Type": "application/json"},
            auth=authorize,
            timeout=(min(CONNECT_SECONDS, self.timeout), self.timeout),
            allow_redirects=False,  # the key and the pictures go nowhere else
            stream=True,
        ) as response:
            content = bytearray()
            # requests' timeout is for each arrival of bytes; a few at a time let us see the clock.
            for chunk in response.iter_content(16):
                content += chunk
                if time.monotonic() > deadline:
                    raise requests.Timeout
                if len(content) > MAX_JSON_BYTES:
                    break
            found = bytes(content)
            if len(key) >= SECRET_CHARACTERS:  # a server may quote it when it complains
                found = found.replace(key.encode(), b"***")
            return response.status_code, response.headers, found

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {self.key_variable} holds no key: odd text")
        return key


def _reply(value: Mapping[str, Any], choice: Mapping[str, Any], *, with_p: bool) -> Reply | None:
    """The reply that a choice is; None if it lacks the probabilities that it should have.

    Raises any error of a lookup where it is nothing of the kind.
    """
    message, model = choice["message"], str(value.get("model") or "")
    refusal, text = message.get("refusal"), message.get("content")
    if refusal or choice.get("finish_reason") in REFUSING_CODES:
        return Reply(kind="refused", text=str(refusal or text or ""), model=model)
    if not isinstance(text, str | None) or (text is None and "content" not in message):
        raise ValueError
    if not with_p:
        return Reply(kind="answered", text=text or "", model=model)
    tokens = (choice.get("logprobs") or {}).get("content")
    if tokens == [] and not text:  # the model ended before it said anything
        return Reply(kind="failed", text="the answer is empty", model=model)
    if not tokens or not tokens[0].get("top_logprobs"):
        return None
    # Two tokens may have one text, such as two halves of a character.
    p: dict[str, float] = collections.defaultdict(float)
    for entry in tokens[0]["top_logprobs"]:
        p[str(entry["token"])] += math.exp(entry["logprob"])
    first = str(tokens[0]["token"])
    if first not in p:
        p[first] = math.exp(tokens[0]["logprob"])
    if not all(math.isfinite(v) for v in p.values()):
        raise ValueError
    return Reply(kind="answered", text=first, p=dict(p), model=model)


def _error_of(content: bytes) -> tuple[str, str]:
    """The code and the message of an HTTP error, which may be anything."""
    try:
        value = parse_json(content, where="the error")
        error = value["error"] if isinstance(value.get("error"), dict) else value
        return str(error.get("code") or ""), _short(error["message"])
    except (UserError, KeyError):
        return "", _short(content.decode(errors="replace")) or "nothing more"


def _retry_after(text: str | None) -> float:
    """The seconds of a Retry-After, which may be a date; 0 for what is neither."""
    if not text:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _is_nobody(error: BaseException | None) -> bool:
    """Whether an error says that no server is there, and not that one gave up."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(what: object) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
