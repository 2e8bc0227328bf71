"""The runner: the same numbers however the cases are batched or sharded, files where promised,
nothing done twice.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from tests.evaluation import evaluation_cases as data
from univg_jax.evaluation.benchmarks import draw_cases
from univg_jax.evaluation.runner import evaluate
from univg_jax.evaluation.scorers import Scorers

TASKS = ("ie", "seg", "depth")


def run(out, *, batch_size=4, count=7, settings=None, model=data.blurred, **systems):
    records = [data.scene(i) for i in range(20)]
    return evaluate(
        {t: draw_cases(t, records[:count], resolution=48) for t in TASKS},
        train={t: draw_cases(t, records[10:], resolution=48) for t in TASKS},
        systems={
            "model": model,
            "untrained": data.noise,
            "real": lambda batch: batch.target,
            **systems,
        },
        collate=data.stack,
        scorers=Scorers(),
        settings=settings or {"checkpoint_step": 3, "seed": 0},
        out=out,
        batch_size=batch_size,
        samples=2,
        progress=False,
    )


def test_results_and_files(tmp_path):
    results = run(tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == {"checkpoint_step": 3, "seed": 0, "scorers": "none"}
    edit = results["tasks"]["ie"]
    assert edit["beats"] == {"untrained": True, "trivial": True}
    assert edit["systems"]["real"]["l1_changed"]["value"] == 0
    assert edit["systems"]["model"]["l1_changed"]["count"] == 7
    assert edit["systems"]["model"]["l1_changed"]["stderr"] > 0
    assert len(list((tmp_path / "ie").glob("???.png"))) == 7
    assert edit["samples"][1] == {
        "prompt": edit["samples"][1]["prompt"],
        "input": "ie/001_input.png",
        "target": "ie/001_target.png",
        "output": "ie/001.png",
    }
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "ie/001_target.png")), data.scene(1)["image"]
    )


def test_a_model_that_copies_the_source_does_not_beat_it(tmp_path):
    before = {i: data.scene(i)["source"] for i in range(7)}
    results = run(tmp_path, model=lambda batch: np.stack([before[int(i)] for i in batch.sample_id]))
    assert results["tasks"]["ie"]["trivial"]["chosen"] == "a copy of the source"
    assert not results["tasks"]["ie"]["beats"]["trivial"]  # a tie is not a victory


def test_batching_and_padding_change_nothing(tmp_path):
    results = [run(tmp_path / str(b), batch_size=b) for b in (1, 4, 16)]
    assert results[0]["tasks"] == results[1]["tasks"] == results[2]["tasks"]


def test_results_of_the_same_settings_are_kept(tmp_path):
    calls = []

    def counted(batch):
        calls.append(len(batch.sample_id))
        return data.blurred(batch)

    first = run(tmp_path, model=counted)
    done = len(calls)
    assert run(tmp_path, model=counted) == first
    assert len(calls) == done
    run(tmp_path, model=counted, settings={"checkpoint_step": 4, "seed": 0})
    assert len(calls) == 2 * done
    run(tmp_path, model=counted, settings={"checkpoint_step": 4, "seed": 0}, count=8)
    assert len(calls) > 2 * done


def test_bad_calls_are_named(tmp_path):
    with pytest.raises(ValueError, match="'model'"):
        evaluate(
            {},
            train={},
            systems={},
            collate=data.stack,
            scorers=Scorers(),
            settings={},
            out=tmp_path,
            batch_size=1,
        )


@pytest.mark.slow
def test_two_processes_agree_with_one_bitwise(tmp_path):
    program = textwrap.dedent(
        """
        import sys, jax
        from univg_jax.evaluation import runner
        from tests.evaluation.test_runner import run
        rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        run(out)
        """
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port), str(tmp_path / "two")],
            env=environment,
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    run(tmp_path / "one")
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert one == two
    images = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.png"))
    assert images == sorted(
        p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.png")
    )
    assert all(
        (tmp_path / "one" / p).read_bytes() == (tmp_path / "two" / p).read_bytes() for p in images
    )
