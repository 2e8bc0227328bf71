"""Inputs and situations that failed once, as scripts in the folder that UNIVG_CASES names.

The law behind each has its own test beside what it is about; this one keeps the inputs themselves,
and is nightly.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = os.environ.get("UNIVG_CASES", "")
INTERVALS = ("sample_every 0", "save_every 0", "log_every -1", "sample_every -1")
CASES = [
    "border_boxes_stream",
    "coco_boxes",
    "cosine_extended",
    "half_precision",
    "mixed_sizes",
    "mixed_sizes same",
    "p_in_caption",
    "records_files",
    *(f"intervals {key_value}" for key_value in INTERVALS),
    *(f"one_bad_picture {where}" for where in ("train", "validation", "odd")),
    # These share the run that they resume.
    *(
        pytest.param(f"resume_cases {case}", marks=pytest.mark.xdist_group("resume_cases"))
        for case in ("plain", "jsonl_empty", "extra_files", "config_cut")
    ),
]


@pytest.mark.nightly
@pytest.mark.skipif(not FOLDER, reason="UNIVG_CASES names no folder: the scripts lie elsewhere")
@pytest.mark.parametrize("case", CASES)
def test_what_failed_once_does_not_fail_again(case):
    name, *arguments = case.split()
    script = pathlib.Path(ROOT, FOLDER, f"{name}.py").resolve()
    command = [sys.executable, ROOT / "tests" / "run_case.py", script, *arguments]
    result = subprocess.run(
        command,
        cwd=ROOT,
        # One device: the suite's virtual ones do not divide the scripts' batches.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    said = f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    assert result.returncode == 0, said
    assert "Traceback" not in said
