"""The examples of docs/serving.md do what they say, with a real server."""

import pathlib
import re
import shutil
import subprocess
import time

import httpx2
import pytest

from tests.serving.conftest import running
from univg_jax import images
from univg_jax.serving.server import read_keys

pytestmark = pytest.mark.xdist_group("pipeline")

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CURL = [
    line for language, code in BLOCKS if language == "bash" for line in code.splitlines()
    if line.startswith("curl")
]  # fmt: skip
PYTHON = [code for language, code in BLOCKS if language == "python"]


def test_every_other_command_says_what_it_needs():
    commands = [code for language, code in BLOCKS if not language]
    assert any("benchmarks/serving.py" in code for code in commands)
    for code in commands:
        assert re.match(r"# (needs: .+|run by tests/\S+)\n", code), code


def address(client):
    return str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def folder(client, tmp_path_factory):
    """A folder with the picture that the first command makes."""
    folder = tmp_path_factory.mktemp("examples")
    given = dict(prompt="a pig on grass", seed=7)
    response = client.post("/v1/generate", json=given, headers={"accept": "image/png"})
    (folder / "scene.png").write_bytes(response.content)
    return folder


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("line", [line for line in CURL if ":8000" in line])
def test_every_curl_gets_what_it_asks_for(client, folder, line):
    command = line.replace("http://127.0.0.1:8000", address(client)) + " --fail --silent"
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, check=True
    )
    if named := re.search(r"-o (\S+)", line):
        assert images.size_of((folder / named[1]).read_bytes()) >= (32, 32)
    else:
        assert '"b64_json"' in done.stdout


@pytest.mark.filterwarnings("ignore:unclosed file")  # they are short
@pytest.mark.parametrize("code", PYTHON)
def test_every_example_in_python_runs_as_written(client, folder, code, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(code.replace("http://127.0.0.1:8000", address(client)), "serving.md", "exec"), {})


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_a_key_of_a_file_is_taken(pipeline, tmp_path):
    make, _ = next(code for _, code in BLOCKS if "secrets" in code).splitlines()
    subprocess.run(make, shell=True, cwd=tmp_path, check=True)
    (line,) = [line for line in CURL if ":8001" in line]
    with running(pipeline, wait=False, api_keys=read_keys(str(tmp_path / "keys"))) as (_, client):
        command = line.replace("http://127.0.0.1:8001", address(client)) + " --fail --silent"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=True)
        assert b'"univg"' in done.stdout


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_nginx_shares_requests_out_and_asks_the_next_where_one_is_not_ready(
    served, client, pipeline, monkeypatch, tmp_path
):
    (site,) = [code for language, code in BLOCKS if language == "nginx"]
    monkeypatch.setattr("univg_jax.serving.batching.Batching._compile", lambda _: time.sleep(5))
    with running(pipeline, wait=False) as (_, slow):  # answers 503 for a while
        port = 18080
        for old, new in {
            "127.0.0.1:8001": address(client).removeprefix("http://"),
            "127.0.0.1:8002": address(slow).removeprefix("http://"),
            "127.0.0.1:8080": f"127.0.0.1:{port}",
        }.items():
            site = site.replace(old, new)
        paths = "".join(
            f"{kind}_temp_path {tmp_path}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = tmp_path / "nginx.conf"
        config.write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; {paths}\n{site} }}\n"
        )
        nginx = subprocess.Popen(["nginx", "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as proxy:
                while True:
                    try:
                        assert proxy.get("/health").status_code == 200
                        break
                    except httpx2.ConnectError:
                        assert nginx.poll() is None
                        time.sleep(0.05)
                given = dict(prompt="a pig on grass", seed=7)
                made = [proxy.post("/v1/generate", json=given) for _ in range(4)]
        finally:
            nginx.terminate()
            nginx.wait()
    assert [response.status_code for response in made] == [200] * 4
    assert len({response.json()["data"][0]["b64_json"] for response in made}) == 1
