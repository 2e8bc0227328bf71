"""Runs the parity tests and writes what they measured to docs/parity.md.

`make parity` runs it in the environment that has PyTorch.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

PACKAGES = ("jax", "torch", "diffusers", "transformers", "torch_fidelity")
HEAD = """# Parity with PyTorch

Every network against its PyTorch reference, float32 on CPU, with random weights. The error is the
largest absolute one. Of an output it is relative to the reference's standard deviation (at most
2e-5), of a gradient to its largest entry (at most 1e-4), of a whole pipeline it is that of images
in [0, 1] (at most 1e-3; 2e-2 where diffusers fills the hole of an inpainting, with another gray).
Written by `make parity` with
{versions}.

| network | configuration | error |
|---|---|---|
"""


def rows(report: str) -> list[dict]:
    """The rows that the passed tests recorded."""
    cases = ElementTree.parse(report).iter("testcase")
    return [
        json.loads(p.get("value"))
        for case in cases
        for p in case.iter("property")
        if p.get("name") == "parity"
    ]


def main() -> None:
    """Runs the tests; writes nothing if one fails."""
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/report.xml"
        # In one process: PyTorch's threads beside those of several workers' virtual devices starve
        # each other.
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "parity", f"--junitxml={report}", "tests"]
        )
        if done.returncode:
            sys.exit(done.returncode)
        measured = rows(report)
    table = HEAD.format(
        versions=", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES)
    )
    for network, group in itertools.groupby(
        sorted(measured, key=lambda row: row["network"]), lambda row: row["network"]
    ):
        for row in group:
            errors = ", ".join(f"{kind} {error:.1e}" for kind, error in row["errors"].items())
            table += f"| {network} | {row['configuration']} | {errors} |\n"
    Path("docs/parity.md").write_text(table)
    print(f"wrote docs/parity.md: {len(measured)} configurations")


if __name__ == "__main__":
    main()
