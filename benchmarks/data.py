"""What the data costs beside what it must: decoding and resizing pictures.

Photographs are synthesized (smooth noise, shapes, a little grain; JPEG of quality 90, 640 to 1536
pixels a side), packed into tars as img2dataset does, and built by `captions`. Then

    stream   pictures delivered by `Stream` with 2 reading threads, against two plain loops over the
             same files, with the same library: one decodes whole pictures and resizes them, the
             other decodes large ones at a part of their size, as the stream does for tasks of text
    open     memory of a process, and time to its first batch, with 1 source and with 40
    torch    the same pictures by WebDataset and PyTorch's DataLoader with 2 workers: with the
             stream's own decoding, and as usual (Pillow, bicubic)
    build    records of `univg data build`, against reading and writing the same bytes

What counts is CPU time, that of workers and threads too; what is compared alternates, and the
fastest round of each is taken. Other load on the machine still moves the ratios by some percent.
"torch" needs PyTorch and webdataset, of the environment for parity tests.

    python benchmarks/data.py
"""

import argparse
import gc
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import cv2
import numpy as np
from PIL import Image

from data_pipelines.build import build
from data_pipelines.collate import Collator
from data_pipelines.datasets import DATASETS
from data_pipelines.mixture import Stream
from data_pipelines.tokenizer import load_tokenizer
from data_pipelines.transforms import resize_and_crop
from univg_jax.batch import BatchShape
from univg_jax.images import decode_rgb
from univg_jax.settings import Config

BATCH, WORKERS, TARS, COPIES = 16, 2, 4, 4
SOURCES = (1, 40)
CAPTION = "a quiet lake below red mountains with old wooden boats and two people at noon"


def photograph(number: int) -> bytes:
    """A JPEG that costs about as much as a photograph of its size."""
    rng = np.random.default_rng(number)
    height, width = (int(side) for side in rng.integers(640, 1537, 2))
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 90), (16, 50), (64, 25)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        pixels += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels += 128
    for _ in range(12):
        center = tuple(int(rng.integers(side)) for side in (width, height))
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        cv2.circle(pixels, center, int(rng.integers(10, 150)), color, -1, cv2.LINE_AA)
    pixels += rng.normal(0, 3, pixels.shape).astype(np.float32)
    whole = np.clip(pixels, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", whole, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def write_tars(folder: pathlib.Path, files: list[bytes]) -> None:
    """Pictures and captions, as img2dataset packs them."""
    folder.mkdir()
    per_tar = -(-len(files) // TARS)
    for start in range(0, len(files), per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w") as tar:
            for k, file in enumerate(files[start : start + per_tar], start):
                text = " ".join(np.random.default_rng(k).permutation(CAPTION.split())).encode()
                for suffix, content in (("jpg", file), ("txt", text)):
                    info = tarfile.TarInfo(f"{k:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def build_captions(tars: pathlib.Path, out: pathlib.Path) -> None:
    """What `univg data build --dataset=captions` does, in this process."""
    dataset = DATASETS["captions"]
    build(dataset, out, dataset.options(source=str(tars)), processes=1)


def make_stream(data_dir: pathlib.Path, resolution: int, sources: int = 1) -> Stream:
    """Text-to-image of so many sources, which lie in folders of their own."""
    names = tuple(sorted(path.name for path in data_dir.iterdir() if path.is_dir())[:sources])
    config = Config.of(
        dict(
            tasks=dict(t2i=dict(weight=1.0, sources=names)),
            data=dict(
                dir=str(data_dir),
                resolution=resolution,
                num_tokens=128,
                batch_size=BATCH,
                read_threads=WORKERS,
                prefetch=2,
            ),
        )
    )
    shape = BatchShape.of(config.data)
    return Stream(config, collator=Collator(tokenizer=load_tokenizer(), shape=shape))


def picture(
    file: bytes, resolution: int, rng: np.random.Generator, *, whole: bool = False
) -> np.ndarray:
    """The least that the stream must do: decode, crop, resize."""
    pixels = decode_rgb(file, least=None if whole else (2 * resolution, 2 * resolution))
    return resize_and_crop({"image": pixels}, resolution=resolution, rng=rng)["image"]


def usual_picture(file: bytes, resolution: int) -> np.ndarray:
    """What training scripts do with Pillow."""
    whole = Image.open(io.BytesIO(file)).convert("RGB")
    scale = resolution / min(whole.size)
    size = tuple(max(resolution, round(side * scale)) for side in whole.size)
    whole = whole.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return np.asarray(whole.crop((left, top, left + resolution, top + resolution)))


def best(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The least result of each run; they alternate."""
    found = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()
            found[name] = min(found[name], run())
    return found


def compare_stream(data_dir: pathlib.Path, files: list[bytes], resolution: int, rounds: int):
    """CPU ms a picture of the stream and of the plain loops."""
    stream = make_stream(data_dir, resolution)
    steps = len(files) // BATCH

    def streamed() -> float:
        for _ in range(4):  # what is read ahead is then a constant
            next(stream)
        begin = time.process_time()
        for _ in range(steps):
            next(stream)
        spent = time.process_time() - begin
        stream.close()
        return 1e3 * spent / (steps * BATCH)

    def looped(whole: bool) -> float:
        rng = np.random.default_rng(0)
        begin = time.process_time()
        for file in files:
            picture(file, resolution, rng, whole=whole)
        return 1e3 * (time.process_time() - begin) / len(files)

    loops = dict(whole=lambda: looped(True), reduced=lambda: looped(False))
    return best(dict(**loops, stream=streamed), rounds)


def compare_builds(tars: pathlib.Path, work: pathlib.Path, count: int, rounds: int):
    """CPU ms a record of a build, and of a copy of the tars."""

    def built() -> float:
        begin = time.process_time()
        build_captions(tars, work / "built")
        spent = time.process_time() - begin
        shutil.rmtree(work / "built")
        return 1e3 * spent / count

    def copied() -> float:
        begin = time.process_time()
        for tar in sorted(tars.iterdir()):
            (work / "copy").write_bytes(tar.read_bytes())
        return 1e3 * (time.process_time() - begin) / count

    return best(dict(copy=copied, build=built), rounds)


def cpu_seconds(pids: list[int]) -> float:
    """CPU time so far of other processes, which still run."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def torch_milliseconds(tars: pathlib.Path, count: int, resolution: int, way: str) -> float:
    """CPU ms a picture of a DataLoader with 2 workers on the tars, forever shuffled."""
    import torch
    import webdataset

    rng = np.random.default_rng(0)

    def decoded(sample: tuple[bytes, bytes]) -> tuple["torch.Tensor", str]:
        file, text = sample
        pixels = (
            picture(file, resolution, rng) if way == "same" else usual_picture(file, resolution)
        )
        return torch.from_numpy(np.array(pixels)), text.decode()

    names = [str(tar) for tar in sorted(tars.iterdir())]
    dataset = webdataset.WebDataset(names, shardshuffle=len(names), resampled=True, seed=0)
    dataset = dataset.shuffle(100).to_tuple("jpg", "txt").map(decoded)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)
    rows = iter(loader)
    for _ in range(8):
        next(rows)
    pids = [worker.pid for worker in rows._workers]
    begin, theirs = time.process_time(), cpu_seconds(pids)
    steps = 2 * count // BATCH
    for _ in range(steps):
        next(rows)
    spent = time.process_time() - begin + cpu_seconds(pids) - theirs
    del rows, loader
    return 1e3 * spent / (steps * BATCH)


def in_child(*arguments: object) -> dict[str, float]:
    """What a fresh process of this program finds."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def child(kind: str, *arguments: str) -> dict[str, float]:
    """The work of such a process."""
    if kind == "torch":
        tars, count, resolution, way = arguments
        return dict(ms=torch_milliseconds(pathlib.Path(tars), int(count), int(resolution), way))
    data_dir, resolution, sources = arguments
    begin = time.perf_counter(), time.process_time()
    stream = make_stream(pathlib.Path(data_dir), int(resolution), int(sources))
    next(stream)
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    for _ in range(40):
        next(stream)
    stream.close()
    # Not getrusage's: its maximum is that of the parent process, too.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return dict(first=wall, first_cpu=cpu, peak=peak)


def lines(work: pathlib.Path, count: int, resolution: int, rounds: int) -> Iterator[str]:
    """The results, one a line."""
    # Some records are of one picture: with few records their shuffled order costs more than usual.
    files = [photograph(k) for k in range(count)] * COPIES
    count = len(files)
    tars, data = work / "tars", work / "data"
    write_tars(tars, files)
    build_captions(tars, data)
    size = sum(map(len, files)) / count / 1e3
    yield f"{count} photographs of {size:.0f} kB, rows of {resolution} px, batches of {BATCH}"
    ms = compare_stream(data, files, resolution, rounds)
    yield (
        f"stream: {ms['stream']:.2f} ms of CPU a picture, plain loop {ms['whole']:.2f}: "
        f"{ms['whole'] / ms['stream']:.3f} of the loop's pictures a CPU second; of a loop that "
        f"decodes as the stream does, {ms['reduced']:.2f}: {ms['reduced'] / ms['stream']:.3f}"
    )
    (built,) = data.iterdir()
    many = work / "many"
    for k in range(max(SOURCES)):  # hard links: the files of each are opened on their own
        shutil.copytree(built, many / f"source_{k:02d}", copy_function=os.link)
    for sources in SOURCES:
        found = in_child("open", many, resolution, sources)
        yield (
            f"open {sources} source(s): first batch after {found['first']:.2f} s "
            f"({found['first_cpu']:.2f} s of CPU), peak memory {found['peak']:.0f} MiB"
        )
    if all(importlib.util.find_spec(name) for name in ("torch", "webdataset")):
        for way in ("same", "usual"):
            found = min(in_child("torch", tars, count, resolution, way)["ms"] for _ in range(2))
            yield (
                f"torch ({way} decoding): {found:.2f} ms of CPU a picture, "
                f"{found / ms['stream']:.2f} x the stream's"
            )
    else:
        yield "torch: left out, as torch or webdataset is not installed"
    ms = compare_builds(tars, work, count, rounds)
    yield (
        f"build: {ms['build']:.2f} ms of CPU a record ({1e3 / ms['build']:.0f} a second), "
        f"copy {ms['copy']:.2f}: {ms['build'] / ms['copy']:.1f} x"
    )


def main() -> None:
    """Runs all, and prints a line for each result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=320)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    with tempfile.TemporaryDirectory() as work:
        for line in lines(pathlib.Path(work), args.pictures, args.resolution, args.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
