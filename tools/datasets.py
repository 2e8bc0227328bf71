"""All datasets of the recipe in miniature, from native files to trained steps: `make datasets`.

    python -m tools.datasets OUT

Writes a tiny dataset in each native layout (`tests/native`), and from there on runs the program's
own commands, which it prints: builds each, looks at what each stage trains on, and trains the three
stages in buckets. Each stage makes its first steps on eight virtual devices and its last ones as
two processes of four, which go on from the checkpoint.
"""

import argparse
import os
import pathlib
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests import native

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 20
BUCKETS = "((64,64),(48,80))"  # each is a program to compile
STAGES = ("stage1_t2i", "stage2_multitask", "stage3_identity")


def univg(*arguments: str, devices: int = 8, processes: int = 1) -> None:
    """Runs a command, or exits with its code; several processes join over TCP, as on a pod."""
    print("$ univg " + shlex.join(arguments), flush=True)
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    joined: Sequence[Sequence[str]] = [()]
    if processes > 1:
        joined = [
            (f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={i}")
            for i in range(processes)
        ]
    command = [sys.executable, "-m", "univg_jax", *arguments]
    running = [subprocess.Popen([*command, *more], cwd=ROOT, env=environment) for more in joined]
    if code := max((process.wait() for process in running), key=abs):
        sys.exit(f"univg {arguments[0]} ended with code {code}")


def main() -> None:
    """Writes, builds, inspects and trains below the folder that is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out.absolute()
    data = out / "data"
    for name, options in native.write_all(out / "native").items():
        given = [f"--{option}={value}" for option, value in options.items()]
        univg("data", "build", f"--dataset={name}", *given, f"--out={data}")
    parent = ""
    for stage in STAGES:
        spec = f"--config=experiments/{stage}.py:size=tiny,res=64,data=recipe"
        config = [
            spec + (f",init_from={parent}" if parent else ""),
            f"--config.data.dir={data}",
            f"--config.data.buckets={BUCKETS}",
            "--config.model.overrides.depth=2",
            "--config.train.eval_examples=0",
            "--config.train.sample_examples=0",
            "--config.train.log_every=5",
            f"--config.train.save_every={STEPS // 2}",
        ]
        univg("data", "inspect", *config, f"--out={out / stage}.html", "--examples=2")
        workdir = f"--workdir={out / stage}"
        univg("train", *config, workdir, f"--config.train.steps={STEPS // 2}")
        univg("train", *config, workdir, f"--config.train.steps={STEPS}", devices=4, processes=2)
        parent = str(out / stage)
    print(f"{out} has the records, a page and a trained model of each stage")


if __name__ == "__main__":
    main()
