"""Host memory that loading a large SD3 folder onto 8 devices takes, in units of the largest shard.

    python benchmarks/load_weights.py [--gigabytes=4] [--folder=DIR]

Writes a random folder (or reads `--folder`), then loads it in two separate processes, streamed and
whole, each with 8 virtual CPU devices and `fsdp=8`. The arrays of virtual devices are in the same
memory. So what loading itself needs is the peak of the process's own memory (RssAnon, which does
not count mapped files), minus what it had before, minus the parameters. The limit is 1.3 times the
largest shard, plus a constant for allocators and threads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

DEVICES = 8
CONSTANT = 64 * 2**20  # bytes


def own_memory() -> int:
    """Bytes of this process that belong to no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def write(folder: str, gigabytes: float) -> None:
    """Writes a transformer of about so many gigabytes of float32."""
    import jax
    import numpy as np

    from univg_jax.interop.diffusers import save_transformer
    from univg_jax.models.mmdit import MMDiT

    width = 1536
    depth = max(2, round(gigabytes * 1e9 / 4 / (36 * width**2)))
    model = MMDiT(hidden_dim=width, depth=depth, num_heads=24, in_channels=16)
    inputs = [(1, 2, 2, 16), (1, 1, model.text_dim), (1, model.pooled_dim), (1,)]
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), *(jax.ShapeDtypeStruct(s, np.float32) for s in inputs)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape, dtype=np.float32), shapes["params"]
    )
    save_transformer(model, params, folder, max_file_bytes=10**9)


def load(folder: str, mode: str) -> None:
    """Prints the figures of one load. `mode`: streamed, or whole (all tensors are read first)."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    import jax
    import numpy as np

    from univg_jax.interop.diffusers import open_transformer
    from univg_jax.sharding import make_mesh, tree_shardings

    mesh = make_mesh(data=1, fsdp=DEVICES)
    stored = open_transformer(folder)
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32), jax.devices()[0]))
    before = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    if mode == "streamed":
        params = stored.read(mesh=mesh)
    else:
        names = {name: w for path, w in stored.weights.items() for name in w.names}
        host = {name: stored.tensors.read(name) for name in names}
        params = jax.device_put(stored.read(), tree_shardings(stored.abstract, mesh))
        del host
    jax.block_until_ready(params)
    seconds = time.monotonic() - begin
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    total = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    shard = max(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    print(
        json.dumps(
            dict(mode=mode, total=total, shard=shard, extra=peak - before - total, seconds=seconds)
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="of the random folder, in float32"
    )
    parser.add_argument("--folder", help="of an SD3Transformer2DModel; default: a random one")
    parser.add_argument("--measure", choices=("streamed", "whole"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        load(args.folder, args.measure)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or scratch
        if not args.folder:
            write(folder, args.gigabytes)
        results = {}
        for mode in ("streamed", "whole"):
            command = [sys.executable, __file__, f"--folder={folder}", f"--measure={mode}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[mode] = json.loads(done.stdout)
    shard, total = results["streamed"]["shard"], results["streamed"]["total"]
    gib = 2**30
    print(
        f"{total / gib:.2f} GiB of parameters on {DEVICES} devices, "
        f"the largest shard {shard / gib:.3f} GiB"
    )
    for result in results.values():  # beside the parameters themselves
        extra = result["extra"]
        print(
            f"{result['mode']:9}{extra / gib:7.3f} GiB = {extra / shard:.2f} shards, "
            f"{result['seconds']:.1f} s"
        )
    extra, limit = results["streamed"]["extra"], 1.3 * shard + CONSTANT
    verdict = "kept" if extra <= limit else "MISSED"
    print(f"limit    {limit / gib:7.3f} GiB = 1.3 shards + {CONSTANT // 2**20} MiB: {verdict}")
    print(f"whole needs {results['whole']['extra'] / max(extra, 1):.0f} times as much as streamed")
    sys.exit(extra > limit)


if __name__ == "__main__":
    main()
