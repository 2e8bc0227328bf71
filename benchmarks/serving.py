"""Throughput and latency of `univg serve` for 1 to 32 clients, in batches and one at a time.

    python benchmarks/serving.py --checkpoint=runs/quickstart/stage3

Starts two servers, one that makes a picture at a time, and one with batches.
Each client asks for a picture, waits for it, and asks for the next. Every answer is compared with
that of `Pipeline` for its prompt and seed: a difference above 1 of 255 ends the benchmark. Then a
server with a short queue is asked by more clients than it takes, who come again when it says so.
Prints tables in Markdown. Other work on the machine slows all of it: the servers take turns,
what counts is their ratio, and the processor time of a picture is told, too, which waiting is no
part of.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx2
import numpy as np
from PIL import Image

from univg_jax import Pipeline

CLIENTS = (1, 2, 4, 8, 16, 32)
PROMPTS = tuple(f"{count} pigs on {ground}" for ground in ("grass", "sand") for count in range(16))


@contextlib.contextmanager
def served(checkpoint: str, **flags: int) -> Iterator[tuple[str, int]]:
    """The address of a server and the number of its process, once it is ready."""
    command = [sys.executable, "-m", "univg_jax", "serve", f"--checkpoint={checkpoint}", "--port=0"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = process.stdout.readline()
        if not line.startswith("serving at "):
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        address = line.split()[2].rstrip(",")
        while httpx2.get(f"{address}/ready", timeout=60).status_code != 200:
            time.sleep(0.5)
        yield address, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait():
            raise SystemExit(f"the server ended with {process.returncode}")


def processor_seconds(pid: int) -> float:
    """What a process has used of all cores."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(") ")[2].split()  # after the name, from the third field on
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def expect(checkpoint: str) -> list[np.ndarray]:
    """What `Pipeline` makes of each prompt with its number as the seed."""
    pipeline = Pipeline.load(checkpoint)
    made = pipeline(PROMPTS, seed=list(range(len(PROMPTS))), callback=lambda *_: None)
    return [np.asarray(image, int) for image in made.images]


async def ask(client: httpx2.AsyncClient, i: int, expected: list[np.ndarray]) -> tuple[float, int]:
    """The seconds that picture `i` took at its last try, and how many tries were refused."""
    refused = 0
    while True:
        begin = time.perf_counter()
        response = await client.post("/v1/generate", json={"prompt": PROMPTS[i], "seed": i})
        seconds = time.perf_counter() - begin
        if response.status_code != 429:
            break
        refused += 1
        await asyncio.sleep(float(response.headers["retry-after"]))
    response.raise_for_status()
    (made,) = response.json()["data"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))), int)
    if np.abs(pixels - expected[i]).max() > 1:
        raise SystemExit(f"the answer to {PROMPTS[i]!r}, seed {i}, is not its picture")
    return seconds, refused


async def load(
    address: str, clients: int, count: int, expected: list[np.ndarray]
) -> tuple[float, list[float], int]:
    """Seconds in all and of each of `count` pictures, and how many requests were refused."""
    numbers = iter(range(count))
    seconds, refused = [], 0
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=address, timeout=600, limits=limits) as client:

        async def work() -> None:
            nonlocal refused
            for number in numbers:
                took, tries = await ask(client, number % len(PROMPTS), expected)
                seconds.append(took)
                refused += tries

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        total = time.perf_counter() - begin
    if len(seconds) != count:
        raise SystemExit(f"{len(seconds)} answers to {count} requests")
    return total, seconds, refused


def row(rates: list[float], seconds: list[float], processor: float) -> str:
    """A line of the table; pictures a second are those of the round in the middle."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    rate, each = statistics.median(rates), processor / len(seconds)
    return f"{rate:.1f} | {cuts[9]:.3f} | {cuts[18]:.3f} | {each:.3f}"


def main() -> None:
    """Measures the checkpoint of the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--count", type=int, default=96, help="pictures of each round")
    parser.add_argument("--rounds", type=int, default=3, help="of each server, in turns")
    parser.add_argument("--max_batch", type=int, default=8)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    expected = expect(args.checkpoint)
    with (
        served(args.checkpoint, max_batch=1) as single,
        served(args.checkpoint, max_batch=args.max_batch) as batched,
    ):
        print(
            "| clients | one at a time: pictures/s | p50, s | p95, s | processor, s "
            f"| batches of up to {args.max_batch}: pictures/s | p50, s | p95, s | processor, s "
            "| ratio of pictures/s |"
        )
        print("|---" * 10 + "|")
        for clients in CLIENTS:
            rates, seconds, processor = [[], []], [[], []], [0.0, 0.0]
            for _ in range(args.rounds):
                for k, (address, pid) in enumerate((single, batched)):
                    before = processor_seconds(pid)
                    total, each, _ = asyncio.run(load(address, clients, args.count, expected))
                    rates[k].append(args.count / total)
                    seconds[k] += each
                    processor[k] += processor_seconds(pid) - before
            first, second = map(row, rates, seconds, processor)
            ratio = statistics.median(fast / slow for slow, fast in zip(*rates))
            print(f"| {clients} | {first} | {second} | {ratio:.2f} |", flush=True)
    with served(args.checkpoint, max_batch=args.max_batch, max_queue=4) as (busy, _):
        _, seconds, refused = asyncio.run(load(busy, 32, args.count, expected))
    print(
        f"\nOverload: 32 clients, a queue of 4: {len(seconds)} pictures were asked for, each came "
        f"and is its own; {refused} requests were told to come later."
    )


if __name__ == "__main__":
    main()
