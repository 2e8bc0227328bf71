"""Buckets, `gs://`: how epath, and so orbax, reaches them, in place of gcsfs's own class.

It differs from that in what a run needs. A request that fails is sent again, with a warning that
counts; one that fails for good is one line. A folder in which nothing was written is empty, as on a
disk, though a bucket knows no such folder. Nothing is remembered of a listing, since other
processes write, too. `files` registers it.
"""

import asyncio
import http
import itertools
import urllib.parse
from typing import Any

from absl import logging

from univg_jax import files
from univg_jax.errors import UnreachableError, needs_extra

with needs_extra("gcs", "a path gs://"):
    from gcsfs import core, retry

_ERRORS = (OSError, retry.HttpError, *retry.RETRIABLE_EXCEPTIONS)


class FileSystem(core.GCSFileSystem):
    """Google Cloud Storage. Raises UnreachableError, which is an OSError, where it refuses."""

    failures = 0  # of requests, in this process

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"use_listings_cache": False, **options})

    async def _request(self, method: str, path: str, *args: str, **options: Any) -> Any:
        for attempt in itertools.count(1):
            try:
                # gcsfs decorates it: that would send it again and say nothing.
                request = super()._request.__wrapped__
                return await request(self, method, path, *args, **options)
            except (FileNotFoundError, FileExistsError):
                raise
            except _ERRORS as error:
                told = f"{_cause(error)}: {_file(path, args)}"
                if not retry.is_retriable(error):
                    raise UnreachableError(told) from error
                if attempt > files.RETRIES:
                    raise UnreachableError(f"{told}, {attempt} times") from error
                FileSystem.failures += 1
                logging.warning(
                    "%s; sent again, as were %d requests before", told, FileSystem.failures - 1
                )
                await asyncio.sleep(min(2.0 ** (attempt - 1), files.MAX_DELAY))
        raise AssertionError("an attempt ends or is the last")

    def listdir(self, path: str, *args: Any, **options: Any) -> list:
        """What is in a folder; nothing where nothing was written."""
        try:
            return super().listdir(path, *args, **options)
        except FileNotFoundError:
            return []


def _file(path: str, parts: tuple[str, ...]) -> str:
    """The file or folder that a request is for: its parts, or those in the address of an upload."""
    url = urllib.parse.urlsplit(path)
    if not parts and "/b/" in url.path:
        bucket = url.path.partition("/b/")[2].split("/")[0]
        parts = (bucket, *urllib.parse.parse_qs(url.query).get("name", []))
    return f"gs://{'/'.join(parts)}" if parts else path


def _cause(error: Exception) -> str:
    """What the store said, or why it said nothing."""
    code = getattr(error, "code", None)
    if isinstance(code, int) and code in http.HTTPStatus._value2member_map_:
        return f"{code} {http.HTTPStatus(code).phrase}"
    return str(error) or type(error).__name__
