"""A real HTTP server on this machine that answers chat requests by a rule of the test's."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CLOSE = object()  # an answer: the connection ends without one
HANG = object()  # nothing comes, until the client gives up
DRIBBLE = object()  # a space now and then, and never an end
MODEL = "rule-7b-2026-01-01"


def said(text, **message):
    """A whole answer with a text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}}
    return {"model": MODEL, "choices": [{**choice, "finish_reason": "stop"}]}


def with_tokens(first, logprobs):
    """A whole answer of one token, with the log-probabilities of several."""
    found = said(first)
    top = [{"token": token, "logprob": value} for token, value in logprobs]
    entry = {"token": first, "logprob": dict(logprobs).get(first, -1.0), "top_logprobs": top}
    found["choices"][0]["logprobs"] = {"content": [entry]}
    return found


class ChatServer:
    """`rule(request)` gives a text, a JSON value, bytes, (status, headers, value) or one of the
    above. `requests` are all that came, in order: body, headers and path.
    """

    def __init__(self, rule):
        self.rule, self.requests, self.headers, self.paths = rule, [], [], []
        self.most_at_once = self._now = 0
        self._lock, self._ending = threading.Lock(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def prompts(self):
        return [prompt_of(request) for request in self.requests]

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or each answer would wait for an acknowledgment

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = json.loads(body)
                with outer._lock:
                    outer.requests.append(request)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                try:
                    outer._answer(self, outer.rule(request))
                finally:
                    with outer._lock:
                        outer._now -= 1

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler, answer):
        if answer is CLOSE:
            handler.close_connection = True
            return
        if answer is HANG:
            self._ending.wait(5)
            handler.close_connection = True
            return
        with contextlib.suppress(OSError):  # the client has gone
            if answer is DRIBBLE:
                self._begin(handler, 200, {"Content-Length": 10**6})
                while not self._ending.wait(0.002):
                    handler.wfile.write(b" ")
                return
            status, headers = 200, {}
            if isinstance(answer, tuple):
                status, headers, answer = answer
            if isinstance(answer, str):
                answer = said(answer)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self._begin(handler, status, {"Content-Length": len(content), **headers})
            handler.wfile.write(content)

    def _begin(self, handler, status, headers):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, str(value))
        handler.end_headers()


def prompt_of(request):
    """The text of a request."""
    (message,) = request["messages"]
    return next(part["text"] for part in message["content"] if part["type"] == "text")


def images_of(request):
    """The kind and the bytes of each picture of a request."""
    (message,) = request["messages"]
    found = []
    for part in message["content"]:
        if part["type"] == "image_url":
            head, data = part["image_url"]["url"].split(",")
            found.append((head, base64.b64decode(data)))
    return found
