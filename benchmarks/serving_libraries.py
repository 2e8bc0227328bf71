"""What libraries for serving do with two programs of a second each: the table of docs/decisions.md.

    python benchmarks/serving_libraries.py [NAME ...]

Installs each library into an environment of its own, below a temporary folder, starts a service of
it, and asks: 15 pictures at once where 12 may wait, 10 of program a and 5 of b; then 5 of a, of
which one leaves while it waits; then one, and SIGTERM while it is made, and another.
"""

import argparse
import concurrent.futures
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv

import httpx2
import psutil

FASTAPI = """
import asyncio, time
from batched.aio.batch_processor import AsyncBatchProcessor
from fastapi import FastAPI, HTTPException, Request
import uvicorn
app, lock, waiting, queues = FastAPI(), asyncio.Lock(), 0, {}
def queue(name):
    async def run(items):
        async with lock:
            print("batch", [name + str(i) for i in items], flush=True)
            await asyncio.to_thread(time.sleep, 1)
        return [len(items)] * len(items)
    return AsyncBatchProcessor(run, batch_size=4, timeout_ms=50)
@app.post("/run")
async def run(request: Request, body: dict):
    global waiting
    if waiting >= 12:
        raise HTTPException(429)
    waiting += 1
    queues.setdefault(body["name"], queue(body["name"]))
    work = asyncio.ensure_future(queues[body["name"]](body["i"]))
    left = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        waiting -= 1
        work.cancel(), left.cancel()
uvicorn.run(app, port=PORT)
"""
LITSERVE = """
import time
import litserve
class Api(litserve.LitAPI):
    def setup(self, device): pass
    def decode_request(self, request): return request["name"] + str(request["i"])
    def predict(self, items):
        print("batch", items, flush=True)
        time.sleep(1)
        return [len(items)] * len(items)
    def encode_response(self, output): return output
if __name__ == "__main__":
    api = Api(max_batch_size=4, batch_timeout=0.05, api_path="/run")
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False)
"""
BENTOML = """
import time
import bentoml
def batch(name):
    def run(self, items: list[int]) -> list[int]:
        print("batch", [name + str(i) for i in items], flush=True)
        time.sleep(1)
        return [len(items)] * len(items)
    run.__name__ = name
    batches = dict(batchable=True, max_batch_size=4, max_latency_ms=60_000)
    return bentoml.api(run, route="/" + name, **batches)
@bentoml.service(traffic={"timeout": 60, "max_concurrency": 12}, workers=1)
class Service:
    a, b = batch("a"), batch("b")
if __name__ == "__main__":
    import os, sys
    bentoml = os.path.join(os.path.dirname(sys.executable), "bentoml")
    os.execv(bentoml, [bentoml, "serve", "service:Service", "--host=127.0.0.1", "--port=PORT"])
"""
RAY = """
import asyncio, signal, time
import ray
from fastapi import FastAPI, HTTPException
from ray import serve
from ray.serve.exceptions import BackPressureError
app = FastAPI()
def batcher(name, lock):
    async def run(items):
        async with lock:
            print("batch", [name + str(i) for i in items], flush=True)
            await asyncio.to_thread(time.sleep, 1)
        return [len(items)] * len(items)
    return serve.batch(max_batch_size=4, batch_wait_timeout_s=0.05)(run)
@serve.deployment(max_ongoing_requests=8, max_queued_requests=4)
class Model:
    def __init__(self):
        lock = asyncio.Lock()
        self.queues = {name: batcher(name, lock) for name in "ab"}
    async def __call__(self, name, i):
        return await self.queues[name](i)
@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(app)
class Api:
    def __init__(self, model):
        self.model = model
    @app.post("/run")
    async def run(self, body: dict):
        try:
            return await self.model.remote(body["name"], body["i"])
        except BackPressureError:
            raise HTTPException(429)
def stop(*_):
    serve.shutdown()
    raise SystemExit
ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Api.bind(Model.bind()))
signal.signal(signal.SIGTERM, stop)
while True:
    time.sleep(0.1)
"""
SERVICES = {
    "fastapi": (["fastapi", "uvicorn", "batched"], "fastapi", FASTAPI),
    "litserve": (["litserve"], "litserve", LITSERVE),
    "bentoml": (["bentoml"], "bentoml", BENTOML),
    "ray": (["ray[serve]"], "ray.serve", RAY),
}


def install(folder: pathlib.Path, packages: list[str]) -> tuple[pathlib.Path, float, int]:
    """The environment's Python, its MiB of packages, and how many there are."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *packages], check=True, stderr=subprocess.DEVNULL)
    listed = subprocess.run(
        [*pip, "list", "--format=json"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    (site,) = (folder / "lib").glob("python*/site-packages")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    return python, size / 2**20, len(json.loads(listed.splitlines()[0]))


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and all that it started."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def ask(name: str, port: int, program: str, i: int, *, timeout: float = 60) -> str:
    """The status of an answer, or what came instead of one."""
    bento = name == "bentoml"
    path, body = (program, {"items": [i]}) if bento else ("run", {"name": program, "i": i})
    try:
        return str(
            httpx2.post(f"http://127.0.0.1:{port}/{path}", json=body, timeout=timeout).status_code
        )
    except httpx2.TimeoutException:
        return "left"
    except httpx2.TransportError as error:
        return type(error).__name__


def measure(name: str, folder: pathlib.Path) -> dict[str, object]:
    """What is in the table about one library."""
    packages, module, code = SERVICES[name]
    python, size, count = install(folder / "env", packages)
    begin = time.perf_counter()
    subprocess.run([python, "-c", f"import {module}"], check=True, stderr=subprocess.DEVNULL)
    importing = time.perf_counter() - begin
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "service.py").write_text(code.replace("PORT", str(port)))
    log = folder / "log"
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [python, "service.py"], cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
    while ask(name, port, "a", 0, timeout=60) != "200":
        if process.poll() is not None or time.perf_counter() - begin > 300:
            raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)
    starting = time.perf_counter() - begin - 1  # of which the program took one
    members = family(process)
    memory = sum(member.memory_full_info().pss for member in members) / 2**20
    outside = {
        connection.laddr.port
        for member in members
        for connection in member.net_connections("inet")
        if connection.status == "LISTEN" and "127.0.0.1" not in connection.laddr.ip
    }
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        pool.submit(ask, name, port, "a", 0).result()
        all_at_once = [
            pool.submit(ask, name, port, "b" if i % 3 == 0 else "a", i) for i in range(1, 16)
        ]
        answers = [one.result() for one in all_at_once]
        some = [pool.submit(ask, name, port, "a", i) for i in range(21, 25)]
        time.sleep(0.3)
        pool.submit(ask, name, port, "a", 99, timeout=0.3).result()  # leaves while it waits
        for one in some:
            one.result()
        time.sleep(3)
        last = pool.submit(ask, name, port, "a", 31)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        ending = time.perf_counter()
        time.sleep(0.2)
        new = ask(name, port, "a", 32)
        code = process.wait(120)
        ending = time.perf_counter() - ending
    time.sleep(2)
    remain = [member for member in members if member.is_running()]
    for member in remain:
        member.kill()
    batches = re.findall(r"batch (\[.*?\])", log.read_text())
    return {
        "packages": count,
        "MiB installed": round(size),
        "import, s": round(importing, 1),
        "start, s": round(starting, 1),
        "processes": len(members),
        "MiB in memory": round(memory),
        "ports on all interfaces": len(outside),
        "15 at once, 12 may wait: refused": answers.count("429"),
        "batches with both programs": sum("a" in batch and "b" in batch for batch in batches),
        "made though its client left": "yes" if any("a99" in batch for batch in batches) else "no",
        "SIGTERM: what was begun": last.result(),
        "SIGTERM: what is new": new,
        "SIGTERM: exit code": code,
        "SIGTERM: seconds": round(ending, 1),
        "SIGTERM: processes that remain": len(remain),
    }


def main() -> None:
    """Measures the libraries of the arguments, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SERVICES))
    names = parser.parse_args().names or list(SERVICES)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found[name] = measure(name, pathlib.Path(folder))
        print(name, found[name], file=sys.stderr)
    print("| |", " | ".join(found), "|")
    print("|---" * (len(found) + 1) + "|")
    for about in next(iter(found.values())):
        print(f"| {about} |", " | ".join(str(each[about]) for each in found.values()), "|")


if __name__ == "__main__":
    main()
