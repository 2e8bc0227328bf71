"""A server's life: its socket, its log, the compiling, and a graceful end."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence

import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from univg_jax.errors import UserError
from univg_jax.pipeline import Pipeline
from univg_jax.serving.app import create_app
from univg_jax.serving.batching import Batching
from univg_jax.serving.gate import Limits
from univg_jax.serving.metrics import Metrics

KEYS = "UNIVG_API_KEYS"  # in the environment: keys with commas between them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is started with."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    max_wait_ms: int = 10
    max_queue: int = 64
    max_mib: int = 32
    max_pixels: int = 2**24
    timeout_s: int = 300
    steps: Sequence[int] = ()
    solvers: Sequence[str] = ()
    api_keys: Sequence[str] = ()


def read_keys(path: str | None) -> list[str]:
    """The API keys of a file, one a line, or else of the environment's UNIVG_API_KEYS.

    Raises UserError for a file that cannot be read, for what has no key, such as a variable that is
    set and empty, and for what is no key.
    """
    if path is None:
        where, lines = KEYS, os.environ.get(KEYS, "").split(",")
    else:
        where = f"--api_keys={path}"
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not text in UTF-8"
            raise UserError(f"{where}: {reason}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys and (path is not None or KEYS in os.environ):
        raise UserError(f"{where} has no key")
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"{where}: key {number} is none: expected at least 16 letters, digits and signs"
            )
    return keys


def log_as_json() -> None:
    """Makes every line of the log, whoever writes it, a JSON object."""
    formatter = JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's, for terminals
    )
    logging.captureWarnings(True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    logging.getLogger("univg_jax.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.INFO)


class Server(uvicorn.Server):
    """A model behind HTTP."""

    def __init__(self, pipeline: Pipeline, settings: Settings):
        self.metrics = Metrics()
        self.batching = Batching(
            pipeline,
            self.metrics,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
            steps=settings.steps,
            solvers=settings.solvers,
        )
        limits = Limits(
            body_bytes=settings.max_mib * 2**20,
            pixels=settings.max_pixels,
            seconds=settings.timeout_s,
            requests=settings.max_queue + 64,
        )
        self._failure: Exception | None = None
        app = create_app(self.batching, self.metrics, limits=limits, api_keys=settings.api_keys)
        app.router.lifespan_context = self._compiling
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # the application's own has more
            server_header=False,
            timeout_graceful_shutdown=settings.timeout_s,
        )
        super().__init__(config)

    def serve_on(self, listening: socket.socket) -> None:
        """Serves until SIGTERM or Ctrl-C: finishes what was begun, and takes nothing new.

        Raises what compiling raised. The signal that ended it is raised again, for the caller.
        """
        self.run(sockets=[listening])
        if self._failure is not None:
            raise self._failure

    @contextlib.asynccontextmanager
    async def _compiling(self, _: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(self._compile())
        try:
            yield
        finally:
            task.cancel()
            self.batching.stop()

    async def _compile(self) -> None:
        try:
            await self.batching.compile()
            self.metrics.ready.set(1)
        except Exception as error:
            self._failure, self.should_exit = error, True
