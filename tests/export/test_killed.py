"""An export that is killed leaves nothing that looks whole, whichever file it was at."""

import signal
import subprocess
import sys

import pytest

from tests.sd3_folder import write_image_encoder, write_sd3
from tests.sd3_run import write_run
from univg_jax.export.formats import FORMATS

pytestmark = pytest.mark.slow

# Strikes when the command opens or names its n-th file of the export, or never (0); then prints how
# often it did so. The first export also writes a cache of digests, which is none of them. The
# pictures, which are compared in between, are blank.
EXPORT = """
import dataclasses, os, signal, sys
import numpy as np
from univg_jax.cli.main import main
from univg_jax.export import compare, run

n, seen = int(sys.argv[1]), 0
blank = lambda _, cases: [np.zeros((8, 8, 3), np.uint8) for _ in cases]
compare.answer, open_format = blank, run.open_format
run.open_format = lambda name: dataclasses.replace(
    open_format(name), reload=lambda job, folder: lambda cases: blank(job, cases)
)

def strike(event, args):
    global seen
    is_file = event == "os.rename" or event == "open" and "w" in str(args[1])
    if is_file and "/.out." in str(args[0]):
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(strike)
code = main(sys.argv[2:])
print(seen)
sys.exit(code)
"""


@pytest.fixture
def checkpoint(request):
    """A run that the format serves."""
    if request.node.callspec.params["name"] != "diffusers":
        return request.getfixturevalue("root") / "stage1"
    tmp_path = request.getfixturevalue("tmp_path_factory").mktemp("sd3")
    folder = write_sd3(tmp_path / "pipeline")
    write_image_encoder(folder / "image_encoder")
    return write_run(tmp_path / "run", folder=folder)


def of_group(name):
    """The worker that has the run already; one format in CI, since all go through one function."""
    marks = [pytest.mark.xdist_group("sd3" if name == "diffusers" else "pipeline")]
    marks += [] if name == "safetensors" else [pytest.mark.nightly]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [of_group(name) for name in FORMATS])
def test_whenever_it_is_killed_nothing_has_the_exports_name(name, checkpoint, tmp_path):
    def export(parent, n):
        flags = [f"--checkpoint={checkpoint}", f"--format={name}", f"--out={parent / 'out'}"]
        command = [sys.executable, "-c", EXPORT, str(n), "export", *flags]
        return subprocess.run(command, capture_output=True, text=True)

    done = export(tmp_path / "whole", 0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "whole" / "out" / "checksums.json").exists()
    count = int(done.stdout.split()[-1])
    for n in (1, count // 2, count):  # the last is the folder's own name
        parent = tmp_path / str(n)
        assert export(parent, n).returncode == -signal.SIGKILL
        assert [child.name[:5] for child in parent.iterdir()] == [".out."]
