"""What a client sees of a server: every task, both kinds of bodies, OpenAI's client, refusals."""

import base64
import dataclasses
import io
import json
import re
import socket
import threading
import time
import urllib.request
import zlib

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.conftest import running
from univg_jax import images
from univg_jax.errors import NonFiniteError
from univg_jax.serving.schema import ROUTES

pytestmark = pytest.mark.xdist_group("pipeline")


def png(height=40, width=50, mode="RGB"):
    bands = {"RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, bands), dtype=np.uint8)
    return images.png_bytes(pixels)


def hole(height=40, width=50):
    pixels = np.zeros((height, width), np.uint8)
    pixels[10:30, 20:40] = 255
    return images.png_bytes(pixels)


def decode(found):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found["b64_json"]))))


# What each route needs, and what `Pipeline` is asked for the same.
ASKED = {
    "generate": dict(prompt="a pig on grass", size="48x32"),
    "edit": dict(image=png(), prompt="remove the pig", image_guidance=2.0),
    "inpaint": dict(image=png(), mask=hole(), prompt="a pig"),
    "outpaint": dict(image=png(), prompt="a pig", margins=[0, 0, 30, 0]),
    "layout": dict(
        prompt="a pig on grass", boxes=[{"name": "a pig", "corners": [0.1, 0.5, 0.5, 0.9]}]
    ),
    "depth": dict(image=png()),
    "pose": dict(image=png()),
    "segment": dict(image=png(), prompt="the pig", guidance=3.0),
    "identity": dict(face=png(), prompt="a portrait of <p>", negative_prompt="red", guidance=2.0),
}


def as_json(fields):
    return {
        k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in fields.items()
    }


def as_form(fields):
    files = {k: (k, v, "image/png") for k, v in fields.items() if isinstance(v, bytes)}
    texts = {
        k: json.dumps(v) if isinstance(v, list) else str(v)
        for k, v in fields.items()
        if not isinstance(v, bytes)
    }
    return files, texts


def directly(pipeline, name, fields, *, seed):
    """The same from `Pipeline`, in a batch of the same size."""
    task, _ = ROUTES[name]
    given = dict(fields)
    for key in ("image", "mask", "face"):
        if key in given:
            given[key] = images.open_picture(given[key])
    if "size" in given:
        given["size"] = tuple(map(int, given["size"].split("x")))
    if "margins" in given:
        given["margins"] = tuple(given["margins"])
    if "boxes" in given:
        given["boxes"] = [(box["name"], tuple(box["corners"])) for box in given["boxes"]]
    # A callback makes the steps programs of their own, as they are in the server.
    return pipeline.run(task, **given, seed=seed, callback=lambda *_: None)


def wait_for(condition):
    while not condition():
        time.sleep(0.01)


def line_of(response):
    """The message of a refusal, which is one line."""
    problem = response.json()["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert problem["message"]
    assert "\n" not in problem["message"]
    return problem["message"]


@pytest.mark.parametrize("name", ASKED)
def test_every_task_answers_json_and_forms_as_the_pipeline_does(client, pipeline, name):
    fields = ASKED[name]
    of_json = client.post(f"/v1/{name}", json={**as_json(fields), "seed": 7})
    assert of_json.status_code == 200, of_json.text
    files, texts = as_form(fields)
    if files:
        of_form = client.post(f"/v1/{name}", data=texts | {"seed": "7"}, files=files)
    else:  # a form without files
        parts = {k: (None, v) for k, v in (texts | {"seed": "7"}).items()}
        of_form = client.post(f"/v1/{name}", files=parts)
    assert of_form.status_code == 200, of_form.text
    a, b = of_json.json(), of_form.json()
    expected = directly(pipeline, name, fields, seed=7)
    (made,) = a["data"]
    # The batch has the same size as the pipeline's, and so it is the same program.
    np.testing.assert_array_equal(decode(made), np.asarray(expected.image))
    assert a["data"] == b["data"]
    assert a["task"] == expected.task
    assert made["seed"] == 7
    assert [made["prompt"]] == expected.prompts
    assert made["size"] == "{}x{}".format(*expected.image.size)
    settings = {k: v for k, v in expected.settings.items() if k != "checkpoint"}
    assert a["settings"] == json.loads(json.dumps(settings))
    if expected.answer is None:
        assert made["answer"] is None
    else:
        array = made["answer"]
        data = base64.b64decode(array["data"])
        np.testing.assert_array_equal(
            np.frombuffer(data, array["dtype"]).reshape(array["shape"]), expected.answer
        )


def test_every_task_has_a_route(pipeline, client):
    assert {task for task, _ in ROUTES.values()} == set(pipeline.tasks)
    assert set(ASKED) == set(ROUTES)
    paths = client.get("/openapi.json").json()["paths"]
    assert {f"/v1/{name}" for name in ROUTES} <= set(paths)
    for name in ROUTES:
        content = paths[f"/v1/{name}"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}


def test_several_pictures_have_seeds_one_after_the_other(client):
    given = dict(prompt="a pig on grass", n=3, seed=5)
    several = client.post("/v1/generate", json=given).json()["data"]
    assert [made["seed"] for made in several] == [5, 6, 7]
    for made in several:
        alone = client.post("/v1/generate", json=given | dict(n=1, seed=made["seed"])).json()
        # Float32 in another order may carry a value over the edge between two of the 256 levels.
        assert np.abs(decode(made).astype(int) - decode(alone["data"][0])).max() <= 1


def test_a_seed_that_is_not_given_is_told(client):
    given = dict(prompt="a pig on grass")
    first, second = (client.post("/v1/generate", json=given).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post("/v1/generate", json=given | dict(seed=first["seed"])).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_answer_can_be_the_file_itself(client, kind):
    given = dict(prompt="a pig on grass", seed=1, output_format=kind)
    response = client.post("/v1/generate", json=given, headers={"accept": "image/*"})
    assert response.status_code == 200
    assert response.headers["content-type"] == f"image/{kind}"
    assert response.headers["x-seed"] == "1"
    made = Image.open(io.BytesIO(response.content))
    assert (made.format.lower(), made.size) == (kind, (32, 32))


@pytest.mark.parametrize(
    ("accept", "output_format", "kind"),
    [
        (None, None, "application/json"),
        ("*/*", None, "application/json"),
        ("text/html,image/avif,*/*", None, "application/json"),  # a browser's
        ("application/json, image/png", None, "application/json"),
        ("application/json;q=0.5, image/png", None, "image/png"),
        ("image/png;q=0.5, application/json", None, "application/json"),
        ("image/png", None, "image/png"),
        ("image/*", None, "image/png"),
        ("image/jpeg", None, "image/jpeg"),
        ("image/jpeg;q=0.9, image/webp", None, "image/webp"),
        ("image/jpeg, */*;q=0.1", "webp", "application/json"),
        ("image/webp", "webp", "image/webp"),
        ("image/jpeg", "png", None),
        ("text/html", None, None),
        ("image/", None, None),
    ],
)
def test_the_kind_of_the_answer_is_what_the_client_likes_best(client, accept, output_format, kind):
    given = dict(prompt="a pig on grass", seed=1)
    given |= {} if output_format is None else {"output_format": output_format}
    request = client.build_request("POST", "/v1/generate", json=given)
    del request.headers["accept"]
    if accept is not None:
        request.headers["accept"] = accept
    response = client.send(request)
    if kind is None:
        assert response.status_code == 406
        assert "there is application/json, image/png" in line_of(response)
        return
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    if kind != "application/json":
        assert f"image/{Image.open(io.BytesIO(response.content)).format.lower()}" == kind


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
def test_head_answers_as_get_without_a_body(client, path):
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


# OpenAI's own client.


@pytest.fixture(scope="module")
def official(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)


def test_openai_generates(official, client):
    made = official.images.generate(
        model="univg",
        prompt="a pig on grass",
        n=2,
        size="32x32",
        response_format="b64_json",
        extra_body={"seed": 3},
    )
    assert made.created > 0
    ours = client.post("/v1/generate", json=dict(prompt="a pig on grass", n=2, seed=3)).json()
    assert [image.b64_json for image in made.data] == [image["b64_json"] for image in ours["data"]]
    (model,) = official.models.list()
    assert model.id == "univg"
    assert official.models.retrieve("univg") == model
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-image-1'"):
        official.models.retrieve("gpt-image-1")


def test_openai_edits_and_inpaints(official, client):
    edited = official.images.edit(
        model="univg", image=png(), prompt="remove the pig", extra_body={"seed": 3}
    )
    ours = client.post("/v1/edit", json=as_json(dict(image=png(), prompt="remove the pig", seed=3)))
    assert edited.data[0].b64_json == ours.json()["data"][0]["b64_json"]

    mask = np.full((40, 50, 4), 255, np.uint8)  # theirs is transparent where ours is white
    mask[10:30, 20:40, 3] = 0
    for image in (png(), [png()]):
        filled = official.images.edit(
            image=image,
            mask=images.png_bytes(mask),
            prompt="a pig",
            size="auto",
            extra_body={"seed": 3},
        )
        fields = as_json(dict(image=png(), mask=hole(), prompt="a pig", seed=3))
        ours = client.post("/v1/inpaint", json=fields)
        assert filled.data[0].b64_json == ours.json()["data"][0]["b64_json"]


def test_openai_gets_a_data_url(official):
    given = dict(prompt="a pig on grass", extra_body={"seed": 3})
    (as_url,) = official.images.generate(**given, response_format="url").data
    (as_text,) = official.images.generate(**given).data
    assert as_url.b64_json is None
    assert as_text.url is None
    with urllib.request.urlopen(as_url.url) as file:
        assert file.headers["content-type"] == "image/png"
        assert file.read() == base64.b64decode(as_text.b64_json)


def test_openai_gets_its_own_errors(official):
    with pytest.raises(openai.BadRequestError, match="unknown model 'gpt-image-1'"):
        official.images.generate(model="gpt-image-1", prompt="a pig")
    with pytest.raises(openai.BadRequestError, match="quality: Input should be 'auto'"):
        official.images.generate(prompt="a pig", quality="hd")
    with pytest.raises(openai.BadRequestError, match="an edit has the size of its image, 50x40"):
        official.images.edit(image=png(), prompt="a pig", size="512x512")


# What is refused, and how.

FORM = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na pig\r\n--x--\r\n'


def bomb(side):
    """A PNG that says that it has so many pixels a side."""
    small = bytearray(images.png_bytes(np.zeros((1, 1, 3), np.uint8)))
    small[16:24] = side.to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(small[12:29]).to_bytes(4, "big")
    return bytes(small)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("generate", dict(prompt=""), "prompt: String should have at least 1 character"),
        ("generate", dict(), "prompt: Field required"),
        ("generate", dict(prompt="a pig", size="axb"), "size: expected WIDTHxHEIGHT"),
        (
            "generate",
            dict(prompt="a pig", size="99999x99999"),
            "size=99999x99999: expected at most",
        ),
        ("generate", dict(prompt="a pig", size="9000x3000"), "expected at most 16777216"),
        ("generate", dict(prompt="a pig", steps=3), "steps=3: this server is compiled for 2"),
        ("generate", dict(prompt="a pig", solver="heun"), "this server is compiled for euler"),
        ("generate", dict(prompt="a pig", solver="dpm"), "solver: Input should be 'euler' or"),
        (
            "generate",
            dict(prompt="a pig", promt="x"),
            "promt: no such field; did you mean 'prompt'?",
        ),
        ("generate", dict(prompt="a pig", n=11), "n: Input should be less than or equal to 10"),
        ("generate", dict(prompt="a pig", guidance=-1), "guidance: Input should be greater"),
        ("edit", dict(prompt="x", image=b"no picture"), "image is not a readable image"),
        ("edit", dict(prompt="x", image=png()[:200]), "image is not a readable image"),
        ("edit", dict(prompt="x", image=bomb(20_000)), "taken for a decompression bomb"),
        (
            "edit",
            dict(prompt="x", image=bomb(9000)),
            "image has 9000 x 9000 pixels: expected at most",
        ),
        ("inpaint", dict(image=png(), mask=png(8, 8)), "mask"),
        ("inpaint", dict(image=png()), "mask: Field required"),
        ("outpaint", dict(image=png()), "outpainting needs one of margins, aspect and size"),
        ("identity", dict(face=png(), prompt="a man"), "has no <p>"),
        ("layout", dict(prompt="a pig"), "a layout needs an image or boxes"),
        ("depth", dict(image=png(), prompt="a pig"), "prompt: no such field"),
    ],
)
def test_what_cannot_be_made_is_one_line(client, name, fields, says):
    files, texts = as_form(fields)
    parts = files | {k: (None, v) for k, v in texts.items()} or {"nothing": (None, "")}
    for response in (
        client.post(f"/v1/{name}", json=as_json(fields)),
        client.post(f"/v1/{name}", files=parts),
    ):
        assert response.status_code == 400, response.text
        if fields:
            assert says in line_of(response)


@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "Invalid JSON"),
        (b"[]", "application/json", 400, "should be an object"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "Invalid JSON"),
        (b"\xff", "application/json", 400, "JSON"),
        (b"[" * 100_000, "application/json", 400, "JSON"),
        (b'{"prompt": "a", "seed": "3"}', "application/json", 400, "seed: "),
        (b'{"prompt": "a", "guidance": NaN}', "application/json", 400, "guidance: "),
        (b'{"prompt": "a", "guidance": 1e999}', "application/json", 400, "guidance: "),
        (b"a=b", "application/x-www-form-urlencoded", 415, "expected application/json or"),
        (b"a", "", 415, "content-type ''"),
        (b"a", "multipart/form-data", 400, "oundary"),
        (b"a", "multipart/form-data; boundary=x", 400, ""),
        (FORM, "multipart/form-data; boundary=x; charset=undefined", 415, "charset 'undefined'"),
        (FORM, "multipart/form-data; boundary=x; charset=idna", 415, "expected utf-8"),
        (b"{}", "application/json; charset=utf-16", 415, "expected utf-8"),
    ],
)
def test_broken_bodies_are_one_line(client, content, kind, status, says):
    response = client.post("/v1/generate", content=content, headers={"content-type": kind})
    assert response.status_code == status, response.text
    assert says in line_of(response)


def test_a_form_may_not_name_a_field_twice_or_send_text_as_a_file(client):
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert "twice" in line_of(client.post("/v1/generate", files=twice))
    as_file = {"prompt": ("a.txt", b"a pig", "text/plain")}
    assert "expected text" in line_of(client.post("/v1/generate", files=as_file))


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(client):
    def parts():
        for _ in range(64):
            yield b" " * 2**15

    for content in (b" " * 2**21, parts()):
        response = client.post(
            "/v1/generate", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert "over 1048576 bytes" in line_of(response)


def test_unknown_paths_and_methods(client):
    assert "Not Found" in line_of(client.get("/v1/nothing"))
    response = client.get("/v1/generate")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    line_of(response)


def test_a_request_keeps_its_name(client):
    assert (
        client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    new = client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert len(new) == 32


def test_metrics_count(client):
    def value(name):
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    counted = 'univg_requests_total{route="/v1/generate",status="200"}'
    before = (
        value('univg_pictures_total{task="t2i"}'),
        value("univg_batch_size_count"),
        value(counted),
    )
    client.post("/v1/generate", json=dict(prompt="a pig", n=2))
    assert value('univg_pictures_total{task="t2i"}') == before[0] + 2
    assert value("univg_batch_size_count") > before[1]
    wait_for(lambda: value(counted) > before[2])
    assert value("univg_queue_pictures") == 0
    assert value("univg_ready") == 1
    for name in ("univg_queue_seconds_sum", "univg_request_seconds_sum", "univg_batch_seconds_sum"):
        assert value(name) > 0


def test_a_bug_is_a_500_with_its_traceback_in_the_log_only(served, monkeypatch, caplog):
    server, client = served

    def broken(*_, **__):
        raise RuntimeError("secret")

    caplog.set_level("ERROR", logger="univg_jax.serving")
    with monkeypatch.context() as patched:
        patched.setattr(type(server.batching.pipeline), "answer", broken)
        response = client.post("/v1/generate", json=dict(prompt="a pig"))
    assert response.status_code == 500
    assert "secret" not in response.text
    name = response.headers["x-request-id"]
    assert name in line_of(response)
    # The line is written once the answer is sent.
    wait_for(lambda: [r for r in caplog.records if getattr(r, "request_id", "") == name])
    (record,) = [r for r in caplog.records if getattr(r, "request_id", "") == name]
    assert "secret" in str(record.exc_info[1])
    assert client.post("/v1/generate", json=dict(prompt="a pig")).status_code == 200


def test_a_model_that_makes_no_numbers_is_a_500_that_says_so(served, monkeypatch, caplog):
    """Not the client's fault, whatever it asked for."""
    server, client = served

    def broken(*_, **__):
        raise NonFiniteError("t2i: the picture of seed 3 is not finite: weights are damaged")

    caplog.set_level("ERROR", logger="univg_jax.serving")
    with monkeypatch.context() as patched:
        patched.setattr(type(server.batching.pipeline), "answer", broken)
        response = client.post("/v1/generate", json=dict(prompt="a pig"))
    assert response.status_code == 500
    assert "is not finite" in line_of(response)
    assert any("weights are damaged" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_leaves_while_it_sends_is_no_error(client, caplog, kind):
    def left():
        lines = client.get("/metrics").text.splitlines()
        name = 'univg_requests_total{route="/v1/generate",status="499"}'
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = left()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as sending:
        head = f"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
        sending.sendall(f"{head}content-length: 1000\r\n\r\n--x\r\n".encode())
        time.sleep(0.2)  # so that it is read
    wait_for(lambda: left() > before)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_edit_by_a_model_that_only_inpaints_hides_where_it_lies(pipeline):
    tasks = {name: task for name, task in pipeline.config.tasks.items() if name != "ie"}
    config = dataclasses.replace(pipeline.config, tasks=tasks)
    only = dataclasses.replace(pipeline, config=config)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("univg_jax.serving.batching.Batching._compile", lambda _: None)
        with running(only) as (_, client):
            files = {"image": ("a.png", png(), "image/png"), "prompt": (None, "a pig")}
            response = client.post("/v1/images/edits", files=files)
    assert response.status_code == 400
    assert line_of(response).startswith("the model has no task 'ie' (it has t2i, ip, ")
    assert pipeline.path not in response.text


def page_with_scripts(client):
    """What a browser gets at /docs, without a key; and what the page loads."""
    page = client.get("/docs").text
    found = re.findall(r'(?:src|href)="([^"]+)"', page)
    for path in found:
        response = client.get(path)
        assert response.status_code == 200
        assert response.content
    return page, found


def test_the_page_of_the_schema_loads_nothing_from_elsewhere(client):
    page, scripts = page_with_scripts(client)
    assert any(path.endswith(".js") for path in scripts)
    assert "://" not in page


def test_keys(pipeline):
    keys = ["0123456789abcdef", "another-key-of-a-client"]
    with running(pipeline, wait=False, api_keys=keys) as (_, client):
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code in (200, 503)
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {keys[0]}"},
        ):
            for path in ("/v1/models", "/metrics"):
                response = client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                line_of(response)
        for key in keys:
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == 200
        _, scripts = page_with_scripts(client)
        assert len(scripts) >= 3
        schema = client.get("/openapi.json").json()
        assert schema["paths"]["/v1/generate"]["post"]["security"] == [{"key": []}]


def test_it_lives_before_it_is_ready(pipeline, monkeypatch):
    compiling = threading.Event()
    monkeypatch.setattr(
        "univg_jax.serving.batching.Batching._compile", lambda _: compiling.wait(60)
    )
    with running(pipeline, wait=False) as (_, client):
        assert client.get("/health").json() == {"status": "ok"}
        response = client.get("/ready")
        assert (response.status_code, response.json()) == (503, {"status": "compiling"})
        response = client.post("/v1/generate", json=dict(prompt="a pig"))
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        compiling.set()
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)


def test_overload_is_429_and_no_answer_is_lost_or_mixed_up(pipeline, client):
    """Each of many clients gets its own picture, or is told to come later."""
    alone = {
        seed: client.post("/v1/generate", json=dict(prompt=f"{seed} pigs", seed=seed)).json()
        for seed in range(6)
    }
    answers = []
    with running(pipeline, max_batch=8, max_queue=4, max_wait_ms=5) as (server, busy):

        def ask(seed):
            given = dict(prompt=f"{seed} pigs", seed=seed)
            answers.append(
                (seed, httpx2.post(f"{busy.base_url}/v1/generate", json=given, timeout=60))
            )

        threads = [threading.Thread(target=ask, args=[i % 6]) for i in range(36)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.batching.taken == 0
    assert len(answers) == 36
    assert {response.status_code for _, response in answers} == {200, 429}
    for seed, response in answers:
        if response.status_code == 429:
            assert "are waiting, of at most 4" in line_of(response)
            assert int(response.headers["retry-after"]) > 0
        else:
            made, expected = decode(response.json()["data"][0]), decode(alone[seed]["data"][0])
            assert np.abs(made.astype(int) - expected).max() <= 1


@pytest.fixture
def held(served, monkeypatch):
    """Pictures that are begun once it is set; and what was begun."""
    gate, begun = threading.Event(), []
    answer = type(served[0].batching.pipeline).answer

    def hold(self, requests, **options):
        begun.append(requests)
        gate.wait(60)
        return answer(self, requests, **options)

    monkeypatch.setattr(type(served[0].batching.pipeline), "answer", hold)
    yield gate, begun
    gate.set()


def test_a_client_that_leaves_frees_its_place(served, held):
    server, client = served
    gate, begun = held
    given = dict(prompt="a pig", n=3)
    with pytest.raises(httpx2.ReadTimeout):
        client.post("/v1/generate", json=given, timeout=0.5)  # is being made
    with pytest.raises(httpx2.ReadTimeout):
        client.post("/v1/generate", json=given, timeout=0.5)  # waits
    wait_for(lambda: server.batching.taken == 0)
    gate.set()
    assert client.post("/v1/generate", json=dict(prompt="a cat")).status_code == 200
    assert len(begun) == 2  # nobody made what nobody waited for
    lines = client.get("/metrics").text.splitlines()
    assert any('status="499"' in line for line in lines)


def test_an_answer_that_takes_too_long_is_told(pipeline, held):
    gate, _ = held
    compile = "univg_jax.serving.batching.Batching._compile"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compile, lambda _: None)
        with running(pipeline, timeout_s=1) as (server, client):
            response = client.post("/v1/generate", json=dict(prompt="a pig"))
            assert response.status_code == 504
            assert "too long" in line_of(response)
            assert server.batching.taken == 0
            gate.set()


def test_a_file_that_takes_too_long_to_make_is_told(pipeline, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def encode(*_):
        begun.set()
        go_on.wait(60)
        return b""

    monkeypatch.setattr("univg_jax.serving.app._encode", encode)
    with running(pipeline, timeout_s=3) as (server, client):
        response = client.post("/v1/generate", json=dict(prompt="a pig"))
        assert response.status_code == 504
        assert begun.is_set()
        assert server.batching.taken == 0
        go_on.set()
