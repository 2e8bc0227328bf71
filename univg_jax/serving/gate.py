"""What guards a server: keys, limits, refusals of one shape, and a line of the log each request."""

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from univg_jax.errors import NonFiniteError, UserError
from univg_jax.serving import schema
from univg_jax.serving.batching import Batching, Busy
from univg_jax.serving.metrics import Metrics

DOCS = "/docs"
OPEN = ("/health", "/ready", DOCS, "/openapi.json")  # without a key, as is what lies below DOCS
LEFT = 499  # the status in log and metrics where the client left
logger = logging.getLogger("univg_jax.serving")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may cost."""

    body_bytes: int
    pixels: int  # of a picture that is given or asked for
    seconds: int  # from the first byte to the answer
    requests: int  # that are read or answered at a time


class ClientLeft(Exception):
    """Nobody reads the answer."""


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
}


def _refusal(
    status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """The answer that says in one line what is wrong."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    problem = schema.Problem(message=message, type=kind, param=param, code=None)
    body = schema.Refusal(error=problem).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)


def refuse_user_error(request: Request, error: UserError) -> JSONResponse:
    """The answer to what the client can mend, and to a model that cannot answer anybody."""
    if isinstance(error, Busy):
        return _refusal(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, NonFiniteError):  # whatever was asked for
        logger.error("%s", error)
        return _refusal(500, str(error))
    return _refusal(400, str(error), param=getattr(error, "field", None))


def refuse_http(request: Request, error: StarletteHTTPException) -> JSONResponse:
    """The answer to what has a status of its own."""
    message = str(UserError(str(error.detail)))  # in one line
    return _refusal(error.status_code, message, headers=dict(error.headers or {}))


class Gate:
    """Around the application: keys, limits, and a line in the log for every request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        limits: Limits,
        api_keys: Sequence[str],
        batching: Batching,
        paths: set[str],
    ):
        self.app, self.metrics, self.limits = app, metrics, limits
        self.batching, self.paths = batching, paths
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, received = time.monotonic(), 0, 0
        method = scope["method"]
        if method == "HEAD":  # the server, which has its own scope, sends no body
            scope = {**scope, "method": "GET"}
        headers = {name.lower(): value for name, value in scope["headers"]}
        name = _request_id(headers.get(b"x-request-id", b""))
        state = scope.setdefault("state", {})

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        async def receive_counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limits.body_bytes:
                raise self._too_large()
            return message

        counts = scope["method"] == "POST"
        self._active += counts
        error: BaseException | None = None
        try:
            self._check(scope, headers)
            await self.app(scope, receive_counting, send_noting)
        except (ClientLeft, ClientDisconnect):  # while it waits, or while it sends
            status = LEFT
        except StarletteHTTPException as refused:
            await refuse_http(Request(scope), refused)(scope, receive, send_noting)
        except asyncio.CancelledError:
            status = status or LEFT
            raise
        except Exception as bug:
            error = bug
            if not status:
                message = f"an error of the server: its log says more under {name}"
                await _refusal(500, message)(scope, receive, send_noting)
        finally:
            self._active -= counts
            seconds = time.monotonic() - begin
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            log = logger.error if error else logger.info
            log(
                "%s %s %d",
                method,
                path,
                status,
                exc_info=error,
                extra={
                    "request_id": name,
                    "method": method,
                    "path": path,
                    "status": status,
                    "seconds": round(seconds, 4),
                    "bytes": received,
                    "task": state.get("task"),
                    "pictures": state.get("pictures"),
                    "queue": self.batching.taken,
                },
            )

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        path = scope["path"]
        if self._keys and not (path in OPEN or path.startswith(f"{DOCS}/")):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            given = _digest(key.strip())
            # All are compared, each in constant time.
            known = [hmac.compare_digest(given, digest) for digest in self._keys]
            if kind.lower() != b"bearer" or not any(known):
                raise HTTPException(
                    401, "expected Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
                )
        if self._active > self.limits.requests:
            raise HTTPException(429, "too many requests at a time", {"Retry-After": "1"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            raise self._too_large()

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body has over {self.limits.body_bytes} bytes")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _request_id(given: bytes) -> str:
    """The client's or its proxy's name for a request, if it is one, or a new one."""
    text = given.decode("latin-1")
    return text if re.fullmatch(r"[\w.:-]{1,128}", text, re.ASCII) else uuid.uuid4().hex
