"""`univg plan`: the tables that it prints, the file that it writes, and what it refuses."""

import contextlib
import json
import statistics

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import pods
from univg_jax.buckets import standard
from univg_jax.cli import plan_tables
from univg_jax.cli.main import main
from univg_jax.cli.plan import topology_name
from univg_jax.planning import plan
from univg_jax.planning.calibration import REACHED

pytestmark = pytest.mark.xdist_group("libtpu")  # the compiler takes both cores: one after another

COMMAND = ["plan", "--config=experiments/stage1_t2i.py:size=tiny,res=256"]


@pytest.fixture(scope="module", autouse=True)
def _cache_comes_back():
    """The command turns the cache of compiled programs off for its whole process."""
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()  # or JAX would keep to what it found at its first program


def test_it_prints_a_column_for_each_topology_and_writes_their_plans(tmp_path, capsys):
    out = tmp_path / "plan.json"
    overrides = ["--config.model.overrides.depth=2", "--config.model.overrides.dtype=bfloat16"]
    topologies = ["--topology=v6e:2x2", "--topology=v5e:2x2"]
    assert main([*COMMAND, *overrides, *topologies, f"--json={out}", "--quick", "--traffic"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "v6e:2x2",
        "v5e:2x2",
        "MFU at most",
        "train: HBM traffic",
        "attention",
        "pad",
        "expect",
    ):
        assert word in printed
    plans = json.loads(out.read_text())["plans"]
    assert [plan["chip"]["kind"] for plan in plans] == ["TPU v6 lite", "TPU v5 lite"]
    assert all(plan["fits"] for plan in plans)
    (first,), (second,) = (plan["programs"] for plan in plans)
    assert first["model_flops"] == second["model_flops"] > 0
    hopes = first["expected"]
    reached = first["roofline_seconds"] / hopes["seconds"]
    assert 1 > reached == pytest.approx(statistics.median(REACHED))
    assert first["roofline_seconds"] < hopes["least"] < hopes["seconds"] < hopes["most"]
    assert hopes["source"] in printed
    assert first["expected_mfu"] == pytest.approx(first["mfu_bound"] * statistics.median(REACHED))
    traffic = first["traffic"]
    assert traffic == sorted(traffic, key=lambda one: -one["bytes"])
    assert sum(one["bytes"] for one in traffic) == pytest.approx(first["memory_bytes"])
    assert sum(one["seconds"] for one in traffic) == pytest.approx(first["seconds"]["HBM"])
    assert {one["part"] for one in traffic} >= {"attention", "MLP", "norms", "optimizer"}
    fields = {"kind", "group", "count", "bytes", "wire_bytes"}
    assert first["collectives"][0].keys() >= fields


def test_a_pod_is_understood_by_the_name_that_configs_take():
    for pod, shape in pods.TOPOLOGIES.items():
        assert topology_name(pod) == topology_name(shape) == shape
        assert topology_name(f"{pod}*2") == topology_name(f"{shape}*2") == f"{shape}*2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5p:"], "topology 'v5p:' should read GENERATION:AxB"),
        (["--topology=v5p-9"], "'v5p-9'; did you mean 'v5p-8'?"),
        (["--topology=v5p"], "(else GENERATION:AxB, as v5e:16x16) 'v5p'; did you mean 'v5p-8'?"),
        (["--topology=v5f:4x4"], "unknown TPU generation 'v5f'; did you mean 'v5p'?"),
        (
            ["--topology=v5p:4x4"],
            "topology 'v5p:4x4': a slice of v5p is AxBxC; N slices are v5p:AxBxC*N",
        ),
        (
            ["--topology=v5e:4x4", "--topology=v6e:16x16x2"],
            "a slice of v6e is AxB; N slices are v6e:AxB*N",
        ),
        (["--topology=v5e:3x5"], "libtpu knows no topology v5e:3x5"),
        (["--topology=v5e:2x2", "--include=encoder"], "did you mean 'encoders'?"),
        (["--topology=v5e:2x2", "--slices=0"], "--slices=0: expected a whole number >= 1"),
        (
            ["--topology=v5e:2x2", "--config.data.batch_size=6"],
            "data.batch_size=6 does not divide over data x fsdp",
        ),
        (
            ["--topology=v5e:2x2", "--config.mesh.fsdp=3"],
            "the product must be the number of devices, 4",
        ),
        (
            ["--topology=v5e:2x2*2", "--config.mesh.data=1", "--config.mesh.fsdp=8"],
            "multiple of the number of slices",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main([*COMMAND, *arguments]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_config_in_buckets_is_planned_by_its_largest(tmp_path, capsys):
    out = tmp_path / "plan.json"
    shapes = "((128,256),(320,192),(256,128))"
    overrides = ["--config.model.overrides.depth=1", f"--config.data.buckets={shapes}"]
    command = [*COMMAND, *overrides, "--topology=v5e:2x2", f"--json={out}", "--quick", "--buckets"]
    assert main(command) == 0
    assert "320x192 px, the largest of 3 buckets" in capsys.readouterr().out
    (plan,) = json.loads(out.read_text())["plans"]
    assert (plan["picture"], plan["buckets"]) == ([320, 192], 3)


def test_without_buckets_of_its_own_the_standard_ones_are_planned(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(plan, "compile_plan", lambda config, *_, **__: seen.append(config))
    monkeypatch.setattr(plan_tables, "print_plans", lambda plans: None)
    for flags in ([], ["--buckets"]):
        with contextlib.suppress(AttributeError):
            main([*COMMAND, "--topology=v5e:2x2", *flags])
    assert [config.data.buckets for config in seen] == [(), standard(256)]
