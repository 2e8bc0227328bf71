"""Questions to a model behind HTTP, asked of a real server that answers, fails, hangs and lies."""

import datetime
import email.utils
import json
import logging
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.evaluation.chat_server import (
    CLOSE,
    DRIBBLE,
    HANG,
    MODEL,
    ChatServer,
    images_of,
    prompt_of,
    said,
    with_tokens,
)
from univg_jax import images
from univg_jax.errors import UnreachableError, UserError
from univg_jax.evaluation.score_files import computed_ahead
from univg_jax.evaluation.scorers import endpoint as module
from univg_jax.evaluation.scorers import scorer_digests
from univg_jax.evaluation.scorers.chat import Sampling
from univg_jax.evaluation.scorers.endpoint import Endpoint

ROOT = pathlib.Path(__file__).parents[3]
SAMPLING = Sampling(images_first=False)
PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
SECRET = "sk-not-for-anybody-0123456789"
KEY = "UNIVG_TEST_KEY"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve():
    """Starts servers that end with the test."""
    servers = []

    def start(rule):
        servers.append(ChatServer(rule).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def opened(server, tmp_path, **options):
    options = {"timeout": 5.0, "attempts": 3, "backoff": 0.001, "concurrency": 4} | options
    return Endpoint(url=server.url, model="rule-7b", cache=tmp_path / "answers", **options)


def in_turn(*answers):
    """A rule that gives these answers one after another, and the last one for ever."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def ask(endpoint, prompt="How good?", **options):
    return endpoint.judge([PICTURE], prompt, sampling=SAMPLING, **options)


def ask_many(endpoint, function, items):
    with computed_ahead(function, items, [endpoint]) as results:
        return list(results)


# What is asked


def test_a_question_is_one_message_of_text_and_pictures(serve, tmp_path):
    server = serve(lambda request: "fine")
    file = b"any bytes at all"
    reply = opened(server, tmp_path).judge([PICTURE, file], "How good?", sampling=SAMPLING)
    assert (reply.kind, reply.text, reply.model) == ("answered", "fine", MODEL)
    (request,) = server.requests
    assert server.paths == ["/v1/chat/completions"]
    assert set(request) == {"model", "messages"}  # the rest is the server's choice
    (message,) = request["messages"]
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["text", "image_url", "image_url"]
    assert prompt_of(request) == "How good?"
    (head, png), (_, as_it_is) = images_of(request)
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(images.decode_rgb(png), PICTURE)
    assert as_it_is == file


def test_sampling_says_order_encoding_and_fields(serve, tmp_path):
    server = serve(lambda request: "fine")
    sampling = Sampling(
        images_first=True,
        encoding="jpeg",
        quality=30,
        temperature=0.0,
        max_tokens=7,
        extra={"seed": 3},
    )
    opened(server, tmp_path).judge([PICTURE], "How?", sampling=sampling)
    (request,) = server.requests
    (message,) = request["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    fields = {name: request[name] for name in ("temperature", "max_tokens", "seed")}
    assert fields == {"temperature": 0.0, "max_tokens": 7, "seed": 3}
    assert images_of(request) == [
        ("data:image/jpeg;base64", images.jpeg_bytes(PICTURE, quality=30))
    ]


def test_vqa_has_the_probability_of_each_first_token(serve, tmp_path):
    tokens = [("Yes", math.log(0.6)), (" yes", math.log(0.2)), ("no", -9999.0)]
    server = serve(lambda request: with_tokens("Yes", [*tokens, (" yes", math.log(0.1))]))
    reply = opened(server, tmp_path).vqa(PICTURE, "Is it?")
    assert reply.text == "Yes"
    assert dict(reply.p) == pytest.approx({"Yes": 0.6, " yes": 0.3, "no": 0.0})
    assert reply.p.get("No", 0.0) == 0
    (request,) = server.requests
    asked = {name: request[name] for name in ("temperature", "max_tokens", "logprobs")}
    assert asked == {"temperature": 0.0, "max_tokens": 1, "logprobs": True}
    assert request["top_logprobs"] == 20
    assert opened(server, tmp_path).vqa(PICTURE, "Is it?") == reply


def test_a_model_that_says_nothing_has_not_answered(serve, tmp_path):
    """It ends at once. The server does give probabilities, of other answers."""
    nothing = said("")
    nothing["choices"][0]["logprobs"] = {"content": []}
    server = serve(lambda request: nothing)
    reply = opened(server, tmp_path).vqa(PICTURE, "Is it?")
    assert (reply.kind, len(server.requests)) == ("failed", 1)


@pytest.mark.parametrize(
    "answer",
    [
        "yes",
        {**said("yes"), "choices": [{**said("yes")["choices"][0], "logprobs": None}]},
        with_tokens("yes", []),
        (400, {}, {"error": {"message": "logprobs is not supported by this model"}}),
        (400, {}, {"object": "error", "message": "Requested 20 sample logprobs, at most 5"}),
    ],
    ids=["nothing", "null", "no-tokens", "refused", "too-few"],
)
def test_a_server_without_probabilities_is_one_line(serve, tmp_path, answer):
    server = serve(lambda request: answer)
    with pytest.raises(UserError, match="gives no probabilities of tokens of 'rule-7b'") as error:
        opened(server, tmp_path).vqa(PICTURE, "Is it?")
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1
    assert not list(tmp_path.rglob("*.json"))


# What is kept


def test_two_runs_ask_once(serve, tmp_path):
    server = serve(lambda request: f"about {prompt_of(request)}")
    first = ask(opened(server, tmp_path))
    assert ask(opened(server, tmp_path)) == first
    assert len(server.requests) == 1


def test_the_same_question_at_the_same_time_is_asked_once(serve, tmp_path):
    go = threading.Event()

    def rule(request):
        go.wait(5)
        return "fine"

    server = serve(rule)
    endpoint = opened(server, tmp_path, concurrency=8)

    def question(item):
        if item == 7:
            go.set()
            return None
        return ask(endpoint)

    replies = ask_many(endpoint, question, range(8))
    assert {reply.text for reply in replies[:7]} == {"fine"}
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "changed",
    [
        dict(prompt="How bad?"),
        dict(again=1),
        dict(images=[PICTURE, PICTURE]),
        dict(images=[PICTURE + np.uint8(1)]),
        dict(sampling=Sampling(images_first=True)),
        dict(sampling=Sampling(images_first=False, temperature=0.0)),
        dict(sampling=Sampling(images_first=False, extra={"seed": 1})),
        dict(model="rule-8b"),
        dict(snapshot="2026-02"),
    ],
    ids=lambda changed: "-".join(changed),
)
def test_another_question_is_asked(serve, tmp_path, changed):
    server = serve(lambda request: "fine")
    ask(opened(server, tmp_path))
    of_model = {name: changed.pop(name) for name in ("model", "snapshot") if name in changed}
    endpoint = Endpoint(
        **{"url": server.url, "model": "rule-7b", "cache": tmp_path / "answers", **of_model}
    )
    asked = {"images": [PICTURE], "prompt": "How good?", "sampling": SAMPLING, **changed}
    endpoint.judge(asked.pop("images"), asked.pop("prompt"), **asked)
    assert len(server.requests) == 2


def test_an_answer_serves_another_address_of_the_model(serve, tmp_path):
    first, second = serve(lambda request: "fine"), serve(lambda request: "other")
    ask(opened(first, tmp_path))
    assert ask(opened(second, tmp_path)).text == "fine"
    assert not second.requests


def test_a_kept_answer_says_what_was_asked(serve, tmp_path):
    ask(opened(serve(lambda request: "fine"), tmp_path, snapshot="2026-01"))
    (file,) = (tmp_path / "answers").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["question"]["prompt"] == "How good?"
    assert kept["question"]["snapshot"] == "2026-01"
    assert kept["reply"] == {"kind": "answered", "text": "fine", "p": {}, "model": MODEL}
    assert kept["finish_reason"] == "stop"


def test_a_damaged_answer_is_asked_for_again(serve, tmp_path, caplog):
    server = serve(lambda request: "fine")
    ask(opened(server, tmp_path))
    (file,) = (tmp_path / "answers").glob("*.json")
    whole = file.read_text()
    for damaged in (whole[:20], whole.replace("fine", "vile"), "{}"):
        file.write_text(damaged)
        assert ask(opened(server, tmp_path)).text == "fine"
        assert file.read_text() == whole
    assert len(server.requests) == 4
    assert "an answer is asked for again" in caplog.text


# What goes wrong

RUBBISH = {
    "html": b"<html><h1>Bad gateway</h1></html>",
    "nothing": b"",
    "no-choices": {"choices": []},
    "no-message": {"choices": [{}]},
    "a-list": [1, 2],
    "no-text": {"choices": [{"message": {"content": 3}}]},
    "an-error": {"error": {"message": "overloaded"}},
    "not-utf-8": b'{"choices": "\xff"}',
    "torn": (200, {"Content-Length": 1000, "Connection": "close"}, b'{"choices": ['),
    "closed": CLOSE,
    "500": (500, {}, {"error": {"message": "out of memory"}}),
    "503": (503, {}, b"<html>later</html>"),
    "429": (429, {}, {"error": {"message": "slow down", "code": 429}}),
    "a-date": (429, {"Retry-After": email.utils.format_datetime(datetime.datetime.now())}, b""),
    "no-date": (503, {"Retry-After": "soon"}, b""),
}


@pytest.mark.parametrize("answer", RUBBISH.values(), ids=RUBBISH)
def test_what_may_pass_is_asked_again(serve, tmp_path, answer):
    server = serve(in_turn(answer, answer, "fine"))
    reply = ask(opened(server, tmp_path))
    assert (reply.kind, reply.text) == ("answered", "fine")
    assert len(server.requests) == 3


@pytest.mark.parametrize("answer", RUBBISH.values(), ids=RUBBISH)
def test_what_does_not_pass_is_a_failure_that_is_not_kept(serve, tmp_path, answer, caplog):
    server = serve(lambda request: answer)
    reply = ask(opened(server, tmp_path))
    assert reply.kind == "failed"
    assert "does not answer a question" in caplog.text
    assert len(server.requests) == 3
    server.rule = lambda request: "fine"
    assert ask(opened(server, tmp_path)).text == "fine"


@pytest.mark.parametrize("answer", [HANG, DRIBBLE], ids=["hangs", "dribbles"])
def test_a_server_that_does_not_come_to_an_end_is_left(serve, tmp_path, answer):
    server = serve(in_turn(answer, "fine"))
    # many attempts, since on a busy machine a good answer may be late, too
    assert ask(opened(server, tmp_path, timeout=0.2, attempts=30)).text == "fine"
    server.rule = lambda request: answer
    reply = ask(opened(server, tmp_path, timeout=0.1, attempts=1), "And now?")
    assert (reply.kind, reply.text) == ("failed", "there is no whole answer after 0.1 s")


@pytest.fixture
def waits(monkeypatch):
    """The waiting times, which are not waited."""
    times = []
    monkeypatch.setattr(module._State, "wait", lambda self, seconds: times.append(seconds))
    return times


def test_waits_are_twice_as_long_each_time_up_to_a_limit(serve, tmp_path, waits):
    server = serve(lambda request: (500, {}, b""))
    ask(opened(server, tmp_path, attempts=6, backoff=1.0, max_wait=5.0))
    assert waits == [0, 1, 2, 4, 5, 5]


def test_no_wait_is_shorter_than_the_server_asks_for(serve, tmp_path, waits):
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    stamp = email.utils.format_datetime(date, usegmt=True)
    answers = [(429, {"Retry-After": value}, b"") for value in ("7", "0.5", stamp, "-3", "nan")]
    server = serve(in_turn(*answers, "fine"))
    ask(opened(server, tmp_path, attempts=9, backoff=1.0, max_wait=3.0))
    assert waits[:3] == [0, 7, 2]
    assert 90 < waits[3] <= 100
    assert waits[4:] == [3, 3]


def test_a_server_that_asks_for_hours_ends_the_run(serve, tmp_path):
    server = serve(lambda request: (429, {"Retry-After": "7200"}, b""))
    with pytest.raises(UnreachableError, match="asks to wait for 7200 s"):
        ask(opened(server, tmp_path))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ((401, {}, {"error": {"message": "bad key"}}), "refuses the key in the environment"),
        ((403, {}, b""), "refuses the key"),
        ((404, {}, {"error": {"message": "no such model"}}), "no model 'rule-7b' to chat with"),
        ((405, {}, b""), "no model 'rule-7b' to chat with"),
        ((307, {"Location": "http://127.0.0.1:9/v1"}, b""), "no model 'rule-7b' to chat with"),
    ],
    ids=["401", "403", "404", "405", "307"],
)
def test_what_no_attempt_can_mend_ends_the_run(serve, tmp_path, answer, line):
    server = serve(lambda request: answer)
    with pytest.raises(UserError, match=line) as error:
        ask(opened(server, tmp_path))
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1


def test_a_request_that_is_too_large_is_not_tried_again(serve, tmp_path):
    server = serve(lambda request: (400, {}, {"error": {"message": "too many tokens"}}))
    reply = ask(opened(server, tmp_path))
    assert (reply.kind, reply.text) == ("failed", "HTTP 400: too many tokens")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        said(None, refusal="I will not"),
        {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
        (400, {}, {"error": {"code": "content_policy_violation", "message": "I will not"}}),
    ],
    ids=["refusal", "filtered", "policy"],
)
def test_a_refusal_is_no_answer_and_is_kept(serve, tmp_path, answer):
    server = serve(lambda request: answer)
    assert ask(opened(server, tmp_path)).kind == "refused"
    assert ask(opened(server, tmp_path)).kind == "refused"
    assert len(server.requests) == 1


def test_a_model_that_says_nothing_has_answered(serve, tmp_path):
    """As a model that thinks does, whose tokens end before it speaks."""
    server = serve(lambda request: said(None, reasoning_content="hm"))
    reply = ask(opened(server, tmp_path))
    assert (reply.kind, reply.text) == ("answered", "")


def test_nobody_there_ends_the_run(serve, tmp_path):
    server = serve(lambda request: "fine")
    server.__exit__()
    with pytest.raises(UnreachableError, match="no server answers at this address"):
        ask(opened(server, tmp_path))


def test_a_server_that_has_broken_ends_the_run(serve, tmp_path):
    """Or all that follows would count as failed, each after its attempts."""
    server = serve(lambda request: "fine" if prompt_of(request) == "0" else (500, {}, b"broken"))
    endpoint = opened(server, tmp_path, attempts=1)
    with pytest.raises(UnreachableError, match=r"none of 20 questions in a row.*HTTP 500: broken"):
        ask_many(endpoint, lambda i: ask(endpoint, str(i)), range(200))
    assert len(server.requests) < 40


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("localhost:8000", "'localhost:8000' is no address"),
        ("ftp://host/v1", "is no address"),
        ("http://", "is no address"),
        ("http://host:port/v1", "is no address"),
        (f"http://me:{SECRET}@host/v1", "must have no user, password or query"),
        (f"//me:{SECRET}@host/v1", "must have no user, password or query"),
        (f"http://host/v1?key={SECRET}", "must have no user, password or query"),
    ],
    ids=["no-scheme", "ftp", "no-host", "no-port", "password", "odd-password", "query"],
)
def test_an_address_that_is_none_is_one_line(tmp_path, url, line):
    with pytest.raises(UserError, match=line) as error:
        Endpoint(url=url, model="m", cache=tmp_path)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(("name", "zero"), [("concurrency", 0), ("attempts", 0), ("timeout", 0.0)])
def test_numbers_must_be_above_zero(tmp_path, name, zero):
    with pytest.raises(UserError, match=f"{name} of http://host/v1 is 0"):
        Endpoint(url="http://host/v1", model="m", cache=tmp_path, **{name: zero})


def test_extra_fields_do_not_replace_others():
    with pytest.raises(UserError, match="'messages' is not an extra field"):
        Sampling(images_first=True, extra={"messages": []})


# Many questions


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_results_are_in_the_order_of_items(serve, tmp_path, concurrency):
    def rule(request):
        time.sleep(0.002 * (int(prompt_of(request)) % 3))
        return f"about {prompt_of(request)}"

    server = serve(rule)
    endpoint = opened(server, tmp_path, concurrency=concurrency)
    replies = ask_many(endpoint, lambda i: ask(endpoint, str(i)).text, range(20))
    assert replies == [f"about {i}" for i in range(20)]
    assert server.most_at_once <= concurrency
    assert sorted(server.prompts, key=int) == [str(i) for i in range(20)]


def test_it_asks_as_many_at_once_as_it_may(serve, tmp_path):
    barrier = threading.Barrier(4, timeout=5)

    def rule(request):
        barrier.wait()
        return "fine"

    server = serve(rule)
    endpoint = opened(server, tmp_path, concurrency=4)
    ask_many(endpoint, lambda i: ask(endpoint, str(i)), range(8))
    assert server.most_at_once == 4


def test_an_error_stops_those_that_wait(serve, tmp_path):
    def rule(request):
        return (401, {}, b"") if prompt_of(request) == "5" else (429, {"Retry-After": "500"}, b"")

    endpoint = opened(serve(rule), tmp_path, concurrency=6)
    with pytest.raises(UserError, match="refuses the key"):
        ask_many(endpoint, lambda i: ask(endpoint, str(i)), range(50))
    server = serve(lambda request: "fine")
    endpoint = opened(server, tmp_path)
    assert ask_many(endpoint, lambda i: ask(endpoint, str(i)).text, [1]) == ["fine"]


KILLED = """
import sys
import numpy as np
from univg_jax.evaluation.score_files import computed_ahead
from univg_jax.evaluation.scorers.chat import Sampling
from univg_jax.evaluation.scorers.endpoint import Endpoint

endpoint = Endpoint(url=sys.argv[1], model="rule-7b", cache=sys.argv[2], concurrency=2)
picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
sampling = Sampling(images_first=False)
ask = lambda i: endpoint.judge([picture], str(i), sampling=sampling)
with computed_ahead(ask, range(12), [endpoint]) as replies:
    list(replies)
"""


def test_a_killed_run_asks_nothing_twice(serve, tmp_path):
    started = threading.Event()

    def rule(request):
        if int(prompt_of(request)) >= 6:
            started.set()
            return HANG
        return f"about {prompt_of(request)}"

    server = serve(rule)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, server.url, str(tmp_path / "answers")],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        assert started.wait(120)
        kept = tmp_path / "answers"
        deadline = time.monotonic() + 30
        while len(list(kept.glob("*.json"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert len(list(kept.glob("*.json"))) == 6
    server.rule = lambda request: f"about {prompt_of(request)}"
    server.requests.clear()
    endpoint = opened(server, tmp_path)
    replies = ask_many(endpoint, lambda i: ask(endpoint, str(i)).text, range(12))
    assert replies == [f"about {i}" for i in range(12)]
    assert len(server.requests) == 6
    assert len(list(kept.iterdir())) == 12  # no half file is left


# The key


def test_the_key_goes_to_the_server_and_nowhere_else(serve, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY, f" {SECRET}\n")

    def rule(request):
        complaint = {"error": {"message": f"what is {SECRET}?"}}
        return {
            "good": f"your key is {SECRET}",
            "busy": (500, {}, complaint),
            "large": (400, {}, complaint),
        }.get(prompt_of(request), (401, {}, complaint))

    server = serve(rule)
    endpoint = opened(server, tmp_path, key_variable=KEY)
    replies = [ask(endpoint, prompt) for prompt in ("good", "busy", "large")]
    with pytest.raises(
        UserError, match=re.escape("which is set): HTTP 401: what is ***?")
    ) as error:
        ask(endpoint, "bad")
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    kept = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    captured = capfd.readouterr()
    for place in (
        *(caplog.text, kept, repr(endpoint), repr(replies), str(error.value)),
        *(captured.out, captured.err),
    ):
        assert SECRET not in place


def test_a_short_key_is_no_secret_and_changes_no_answer(serve, tmp_path, monkeypatch):
    """Servers that want none are often given EMPTY, or 1."""
    monkeypatch.setenv(KEY, "1")
    server = serve(lambda request: "Score: 1")
    assert ask(opened(server, tmp_path, key_variable=KEY)).text == "Score: 1"


def test_without_a_key_no_header_is_sent_and_no_password_is_looked_up(serve, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv(KEY, raising=False)
    server = serve(lambda request: "fine")
    ask(opened(server, tmp_path, key_variable=KEY))
    assert "Authorization" not in server.headers[0]


def test_a_key_that_cannot_be_one_is_not_shown(serve, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, f"{SECRET}\nand more")
    with pytest.raises(UserError, match=f"{KEY} holds no key") as error:
        ask(opened(serve(lambda request: "fine"), tmp_path, key_variable=KEY))
    assert SECRET not in str(error.value)


def test_which_model_answered_is_known(serve, tmp_path):
    ask(opened(serve(lambda request: "fine"), tmp_path))
    endpoint = opened(serve(lambda request: "fine"), tmp_path, snapshot="2026-01")
    assert endpoint.served == []
    ask(endpoint)
    assert endpoint.served == [MODEL]
    assert scorer_digests({"judge": endpoint}) == {"judge": "rule-7b 2026-01"}
