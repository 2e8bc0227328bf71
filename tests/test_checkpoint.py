import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from tests import processes
from univg_jax import checkpoint, checksums, sharding
from univg_jax.batch import pytree_dataclass
from univg_jax.errors import NotFoundError, UserError
from univg_jax.settings import Optim, Train
from univg_jax.training import optim
from univg_jax.workdir import CHECKPOINTS, claim_workdir, list_steps


@pytree_dataclass
class State:
    """The shape of a trainer's state."""

    step: jax.Array
    params: dict
    opt_state: tuple
    ema: dict


OPTIMIZER = optim.make_optimizer(
    Optim(name="muon", mu_dtype="bfloat16", freeze=("frozen",)), total_steps=0
)


def init(key):
    k = jax.random.split(key, 3)
    params = {
        "blocks": {
            "q": {"kernel": jax.random.normal(k[0], (2, 16, 32)), "bias": jnp.zeros((2, 32))}
        },
        "frozen": {"kernel": jax.random.normal(k[1], (8, 16))},
    }
    ema = jax.tree.map(lambda p: p + 1, params)
    return State(step=jnp.int32(0), params=params, opt_state=OPTIMIZER.init(params), ema=ema)


@jax.jit
def advance(state):
    grads = jax.tree.map(jnp.sin, state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return State(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        ema=jax.tree.map(lambda e: e * 0.9, state.ema),
    )


def layout(**mesh):
    """The abstract state on a mesh, by the library's rules: kernels split, the rest whole."""
    number = int(np.prod(list(mesh.values())))
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:number])
    abstract = jax.eval_shape(init, jax.random.key(0))
    return sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh))


def make_state(seed=0, **mesh):
    out = jax.tree.map(lambda x: x.sharding, layout(**mesh or dict(data=1)))
    return advance(jax.jit(init, out_shardings=out)(jax.random.key(seed)))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(workdir, *steps, state=None, keep=3):
    with checkpoint.Checkpointer(workdir, Train(save_every=1, keep=keep)) as checkpointer:
        for step in steps:
            checkpointer.save(
                step, state or make_state(step), {"global_next_index": 10 * step}, {"seed": 1}
            )


def restore(workdir, step=None, **mesh):
    if step is not None:
        workdir = workdir / CHECKPOINTS / str(step)
        return checkpoint.restore(workdir, layout(**mesh or dict(data=1)))
    with checkpoint.Checkpointer(workdir) as checkpointer:
        return checkpointer.restore(layout(**mesh or dict(data=1)))


def payload(workdir, step):
    """The largest file of a step: its arrays."""
    files = [p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "mesh", [dict(data=1), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)]
)
def test_saved_on_eight_devices_restores_bitwise_on_any_mesh(tmp_path, mesh):
    state = make_state(data=1, fsdp=8)
    assert len(state.params["frozen"]["kernel"].sharding.device_set) == 8
    save(tmp_path, 2, state=state)
    restored = restore(tmp_path, **mesh)
    assert_equal(restored.state, state)
    assert restored.data_state == {"global_next_index": 20}
    placed = jax.tree.map(
        lambda x, want: x.sharding == want.sharding, restored.state, layout(**mesh)
    )
    assert all(jax.tree.leaves(placed))
    assert_equal(advance(restored.state).step, advance(state).step)


def test_donated_buffers_are_safe_while_the_save_goes_on(tmp_path):
    state = make_state(fsdp=8, data=1)
    expected = jax.device_get(state)
    expected = jax.tree.map(np.array, expected)  # a copy: on CPU device_get may alias
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, {})
        jax.block_until_ready(overwrite(state))
    assert_equal(jax.device_get(restore(tmp_path).state), expected)


def test_a_non_finite_state_is_never_saved(tmp_path):
    state = make_state()
    state.ema["frozen"]["kernel"] = state.ema["frozen"]["kernel"].at[0, 0].set(jnp.nan)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"step 3 is not finite.*ema/frozen/kernel"):
            checkpointer.save(3, state, {}, {})
        assert checkpointer.latest_step() is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "checksums", "json"])
def test_a_damaged_step_is_found_and_the_one_before_restored_when_asked_for(
    tmp_path, damage, caplog
):
    save(tmp_path, 2, 4)
    step_dir = tmp_path / "checkpoints" / "4"
    if damage == "flip":
        flip_a_bit(payload(tmp_path, 4))
    elif damage == "truncate":
        os.truncate(payload(tmp_path, 4), 100)
    elif damage == "remove":
        payload(tmp_path, 4).unlink()
    elif damage == "checksums":
        (step_dir / "checksums.json").write_text("{")
    else:
        (step_dir / "state" / "_METADATA").write_text("{")
    assert [bool(report.problems) for report in checkpoint.verify(tmp_path)] == [False, True]
    go_on = r"checkpoints/2, or continue the run with --fallback"
    for read in (restore, checkpoint.load_params, checkpoint.step_of):
        with pytest.raises(UserError, match=f"checkpoints/4 is damaged: .*{go_on}"):
            read(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged: [^;]*$"):
        restore(tmp_path, 4)
    assert list_steps(tmp_path) == (2, 4), "nothing is set aside unasked"
    checkpoint.fall_back(tmp_path)
    assert "checkpoints/4 IS DAMAGED: " in caplog.text
    assert "FALLING BACK TO STEP 2" in caplog.text
    assert checkpoint.load_config(tmp_path) == {"seed": 1}
    assert_equal(checkpoint.load_params(tmp_path, which="params"), make_state(2).params)
    restored = restore(tmp_path)
    assert_equal(restored.state, make_state(2))
    assert restored.data_state == {"global_next_index": 20}
    # The run goes on from 2, reaches 4 again and can save it.
    save(tmp_path, 4)
    assert_equal(restore(tmp_path).state, make_state(4))
    assert (tmp_path / "checkpoints" / "4.damaged").exists()


def test_where_nothing_is_sound_nothing_is_set_aside(tmp_path):
    checkpoint.fall_back(tmp_path)  # a run that has not begun
    save(tmp_path, 2, 4)
    checkpoint.fall_back(tmp_path)
    for step in (2, 4):
        flip_a_bit(payload(tmp_path, step))
    with pytest.raises(UserError, match="has no sound checkpoint to fall back to"):
        checkpoint.fall_back(tmp_path)
    assert list_steps(tmp_path) == (2, 4)


def test_sums_of_an_older_version_are_read(tmp_path):
    """They were BLAKE2b, a JSON object of names alone, and did not have orbax's two notes."""
    save(tmp_path, 2)
    folder = epath.Path(tmp_path / CHECKPOINTS / "2")
    notes = (checkpoint.COMMITTED, checkpoint.METADATA)
    names = [name for name in checksums.read(folder) if name not in notes]
    sums = {n: checksums.checksum(folder / n, "blake2b_128").partition(":")[2] for n in names}
    (folder / checksums.FILE).write_text(json.dumps(sums))
    assert checksums.find_problems(folder) == ()
    assert_equal(restore(tmp_path).state, make_state(2))
    flip_a_bit(payload(tmp_path, 2))
    assert len(checksums.find_problems(folder)) == 1


KILLED = """
import os, sys, signal, jax, jax.numpy as jnp
from univg_jax import checkpoint, checksums
state = {"params": {"a": jnp.arange(1000.0)}}
with checkpoint.Checkpointer(sys.argv[1]) as c:
    c.save(1, state, {"n": 1}, {})
    c.wait()
    checksums.combine = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    c.save(2, state, {"n": 2}, {})
"""


def test_killed_in_mid_save_leaves_the_step_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    assert (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").exists()
    assert list_steps(tmp_path) == (1,)
    abstract = {"params": {"a": jax.ShapeDtypeStruct((1000,), jnp.float32)}}
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(abstract)
        assert restored.data_state == {"n": 1}
        checkpointer.save(2, restored.state, {"n": 2}, {})
    assert list_steps(tmp_path) == (1, 2)
    assert not (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").exists()
    assert not any(report.problems for report in checkpoint.verify(tmp_path))


def test_a_failed_write_fails_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checksums, "checksum", full)
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(1, make_state(), {}, {})
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save(2, make_state(), {}, {})
    assert list_steps(tmp_path) == ()


def test_a_save_asks_nobody_for_preemptions(tmp_path, monkeypatch):
    """JAX's service takes each question as a place in the order that training asks in."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    save(tmp_path, 1, 2)
    assert list_steps(tmp_path) == (1, 2)
    assert asked == []


def test_retention(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, state=make_state(), keep=2)
    assert list_steps(tmp_path) == (4, 5)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 5
        checkpointer.save(5, make_state(9), {}, {})  # saved already: left as it is
    assert_equal(restore(tmp_path, 5).state, make_state())


def test_a_delete_that_fails_is_no_failure_of_the_run(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, 2, keep=2)
    kind = type(epath.Path(tmp_path))
    delete = kind.rmtree

    def refuse(path, *args, **options):
        if path.name == "1":
            raise PermissionError(13, "Permission denied", str(path))
        return delete(path, *args, **options)

    monkeypatch.setattr(kind, "rmtree", refuse)
    save(tmp_path, 3, 4, keep=2)
    assert list_steps(tmp_path) == (1, 3, 4)
    assert "checkpoint 1 cannot be deleted, it stays: " in caplog.text
    monkeypatch.undo()
    save(tmp_path, 5, keep=2)
    assert list_steps(tmp_path) == (4, 5), "the next save tries again"


def test_another_model_does_not_restore(tmp_path):
    save(tmp_path, 1)
    abstract = layout(data=1)
    abstract.params["blocks"]["q"]["kernel"] = jax.ShapeDtypeStruct((3, 16, 32), jnp.float32)
    abstract.params["new"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    del abstract.params["frozen"]
    with (
        pytest.raises(ValueError, match="does not fit") as error,
        checkpoint.Checkpointer(tmp_path) as checkpointer,
    ):
        checkpointer.restore(abstract)
    assert "params/blocks/q/kernel is float32[2,16,32], the model's float32[3,16,32]" in str(
        error.value
    )
    assert "params/new float32[1] is missing" in str(error.value)
    assert "params/frozen/kernel float32[8,16] is extra" in str(error.value)


@pytest.mark.parametrize("which", ["ema", "params"])
def test_parameters_alone(tmp_path, which):
    save(tmp_path, 2, 4)
    expected = getattr(make_state(4), which)
    assert_equal(checkpoint.load_params(tmp_path, which=which), expected)
    assert_equal(
        checkpoint.load_params(tmp_path / "checkpoints" / "2", which=which),
        getattr(make_state(2), which),
    )
    abstract = getattr(layout(data=1, fsdp=8), which)
    split = checkpoint.load_params(tmp_path, which=which, abstract=abstract)
    assert_equal(split, expected)
    assert split["frozen"]["kernel"].sharding == abstract["frozen"]["kernel"].sharding
    whole = checkpoint.load_params(
        tmp_path, which=which, shardings=sharding.replicated(sharding.make_mesh())
    )
    assert len(whole["frozen"]["kernel"].sharding.device_set) == 8


def test_load_says_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*/nowhere: it does not exist"):
        checkpoint.load_params(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it has no steps"):
        checkpoint.load_params(tmp_path)
    with pytest.raises(FileNotFoundError, match="it has no steps"):
        restore(tmp_path)
    save(tmp_path, 2, 4)
    with pytest.raises(FileNotFoundError, match=r"no step 7 in .*: steps are 2, 4"):
        checkpoint.load_config(tmp_path / "checkpoints" / "7")
    with pytest.raises(FileNotFoundError, match="no step 7"):
        restore(tmp_path, 7)
    for path, step in (
        (tmp_path, 4),
        (tmp_path / "checkpoints", 4),
        (tmp_path / "checkpoints" / "2", 2),
    ):
        assert checkpoint.workdir_of(path) == tmp_path
        assert checkpoint.step_of(path) == step
    with pytest.raises(ValueError, match="has no 'emma'; it has ema, opt_state, params, step"):
        checkpoint.load_params(tmp_path, which="emma")


def model(**leaves):
    return {name: jnp.full(shape, 5.0) for name, shape in leaves.items()}


@pytest.fixture
def stage(tmp_path):
    """A finished stage whose EMA has a trunk (2, 3) and a head (4)."""
    params = {"trunk": jnp.ones((2, 3)), "head": jnp.ones(4)}
    save(tmp_path, 1, state={"params": params, "ema": jax.tree.map(lambda x: x * 2, params)})
    return tmp_path


def test_hand_off_reads_all_but_the_declared(stage):
    params = checkpoint.init_from(
        model(trunk=(2, 3), projector=(7,)), stage, new=("^projector",), dropped=("^head",)
    ).state
    assert_equal(params, {"trunk": jnp.full((2, 3), 2.0), "projector": jnp.full(7, 5.0)})
    params = checkpoint.init_from(model(trunk=(2, 3), head=(4,)), stage, which="params").state
    assert_equal(params, {"trunk": jnp.ones((2, 3)), "head": jnp.ones(4)})


def test_declared_as_new_but_saved_is_read(stage):
    params = checkpoint.init_from(model(trunk=(2, 3), head=(4,)), stage, new=("head",)).state
    assert_equal(params["head"], jnp.full(4, 2.0))


def test_a_leaf_of_another_shape_is_replaced_only_if_dropped_and_new(stage):
    wider = model(trunk=(2, 3), head=(9,))
    with pytest.raises(ValueError, match=r"head is float32\[4\], the model's float32\[9\]"):
        checkpoint.init_from(wider, stage, new=("head",))
    loaded = checkpoint.init_from(wider, stage, new=("head",), dropped=("head",))
    assert_equal(loaded.state["head"], wider["head"])


def test_hand_off_refuses_the_undeclared(stage):
    with pytest.raises(
        ValueError, match=r"projector float32\[7\] is missing; head float32\[4\] is extra"
    ):
        checkpoint.init_from(model(trunk=(2, 3), projector=(7,)), stage)


def test_hand_off_onto_a_mesh(stage):
    whole = sharding.replicated(sharding.make_mesh())
    loaded = checkpoint.init_from(jax.device_put(model(trunk=(2, 3), head=(4,)), whole), stage)
    assert loaded.state["trunk"].sharding == whole


def test_hand_off_gives_the_position_of_the_step_whose_parameters_it_gives(tmp_path):
    params = model(trunk=(2, 3))
    save(tmp_path, 1, 2, state={"params": params, "ema": params})
    assert checkpoint.load_data_state(tmp_path) == {"global_next_index": 20}
    older = checkpoint.init_from(params, tmp_path / CHECKPOINTS / "1")
    assert older.data_state == {"global_next_index": 10}


def test_copy(tmp_path):
    save(tmp_path / "a", 2, 4)
    assert checkpoint.copy(tmp_path / "a", 2, tmp_path / "b") == 2
    assert checkpoint.copy(tmp_path / "a", None, tmp_path / "b") == 4
    assert list_steps(tmp_path / "b") == (2, 4)
    assert_equal(restore(tmp_path / "b").state, make_state(4))
    claim_workdir(tmp_path / "b", {"seed": 1})
    with pytest.raises(ValueError, match="exists, nothing copied"):
        checkpoint.copy(tmp_path / "a", 4, tmp_path / "b")
    (tmp_path / "a" / "encoders").mkdir()
    (tmp_path / "a" / "encoders" / "encoders.json").write_text("{}")
    checkpoint.copy(tmp_path / "a", 2, tmp_path / "d")
    assert (tmp_path / "d" / "encoders" / "encoders.json").read_text() == "{}"
    (tmp_path / "d" / "encoders" / "encoders.json").write_text("{} ")
    with pytest.raises(UserError, match=r"d/encoders/encoders\.json is another one than .*a/"):
        checkpoint.copy(tmp_path / "a", 4, tmp_path / "d")
    assert list_steps(tmp_path / "d") == (2,)
    flip_a_bit(payload(tmp_path / "a", 4))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.copy(tmp_path / "a", 4, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_digests_name_the_content_of_a_step_and_not_its_place(tmp_path):
    save(tmp_path / "a", 2, 4)
    first = checkpoint.digests(tmp_path / "a")
    assert list(first) == [2, 4]
    assert len(set(first.values())) == 2
    step = tmp_path / "a" / CHECKPOINTS / "4"
    assert checkpoint.digests(step) == {4: first[4]}
    checkpoint.copy(tmp_path / "a", 4, tmp_path / "b")
    assert checkpoint.digests(tmp_path / "b") == {4: first[4]}
    # The same path and step, trained again.
    shutil.rmtree(tmp_path / "a")
    save(tmp_path / "a", 4, state=make_state(5))
    assert checkpoint.digests(tmp_path / "a")[4] != first[4]
    with pytest.raises(NotFoundError, match="no checkpoint"):
        checkpoint.digests(tmp_path / "c")


PROCESS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from tests.processes import join
join()
from tests import processes
from univg_jax import checkpoint, checksums, sharding
workdir = sys.argv[1]
read = []
checksum = checksums.checksum
checksums.checksum = lambda file, *how: (read.append(str(file)), checksum(file, *how))[1]
abstract = {"params": {"a": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}}
abstract = sharding.with_shardings(
    abstract, sharding.tree_shardings(abstract, sharding.make_mesh(data=1, fsdp=8))
)
make = jax.jit(
    lambda seed: {"params": {"a": jax.random.normal(jax.random.key(seed), (1024, 512))}},
    out_shardings=jax.tree.map(lambda x: x.sharding, abstract),
)
with checkpoint.Checkpointer(workdir) as checkpointer:
    for step in (1, 2):
        checkpointer.save(step, make(step), {"n": step}, {"seed": 1})
    checkpointer.wait()
    # Nobody reads back what another process wrote.
    other = f"process_{1 - jax.process_index()}"
    assert read and not [file for file in read if other in file], read
    jax.experimental.multihost_utils.sync_global_devices("saved")
    if jax.process_index() == 0:
        folder = checkpointer.directory / "2" / "state" / "ocdbt.process_1" / "d"
        file = max(folder.iterdir(), key=lambda f: f.stat().length)
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    checkpoint.fall_back(workdir)
with checkpoint.Checkpointer(workdir) as checkpointer:
    read.clear()
    restored = checkpointer.restore(abstract)
    # It verifies what it wrote, which is what it restores: the disk is read once.
    assert [file for file in read if f"process_{jax.process_index()}/" in file], read
    assert not [file for file in read if other in file], read
    assert restored.data_state == {"n": 1}
    shards = (x["params"]["a"].addressable_shards for x in (restored.state, make(1)))
    for ours, theirs in zip(*shards):
        np.testing.assert_array_equal(ours.data, theirs.data)
    checkpointer.save(2, make(2), {"n": 2}, {"seed": 1})
assert not any(report.problems for report in checkpoint.verify(workdir))
"""


@pytest.mark.xdist_group("multiprocess")
def test_two_processes_agree_on_what_is_damaged_and_one_reads_what_they_wrote(tmp_path):
    processes.run([4, 4], str(tmp_path), program=("-c", PROCESS))
    expected = jax.random.normal(jax.random.key(2), (1024, 512))
    # Eight shards of the random numbers were made by another program: equal up to its rounding.
    np.testing.assert_allclose(
        checkpoint.load_params(tmp_path, which="params")["a"], expected, rtol=1e-6, atol=1e-6
    )


def test_every_file_has_its_sum_and_a_missing_one_is_named(tmp_path):
    save(tmp_path, 1)
    step = tmp_path / CHECKPOINTS / "1"
    listed = checksums.read(epath.Path(step))
    own = set(checksums.list_files(epath.Path(step))) - {checksums.FILE}
    assert set(listed) == own, "every file of a step has its sum"
    payload(tmp_path, 1).unlink()
    (report,) = checkpoint.verify(tmp_path)
    assert [problem.endswith("is missing") for problem in report.problems] == [True]


@pytest.mark.parametrize("how", ["exchanged", "renamed", "linked"])
def test_a_step_under_another_steps_name_is_damaged(tmp_path, how):
    """Its files are whole, but a run would go on from the wrong place."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    root = tmp_path / CHECKPOINTS
    if how == "exchanged":
        (root / "1").rename(root / "x")
        (root / "2").rename(root / "1")
        (root / "x").rename(root / "2")
    elif how == "renamed":
        (root / "2").rename(root / "7")
    else:
        (root / "7").symlink_to("2")
    wrong = {report.step: report.problems for report in checkpoint.verify(tmp_path)}
    newest = max(wrong)
    is_step = 1 if how == "exchanged" else 2
    assert wrong[newest] == (f"it is step {is_step}, as checksums.json says",)
    with pytest.raises(UserError, match=f"{newest} is damaged: it is step {is_step}, as"):
        restore(tmp_path)


def test_a_step_of_before_does_not_say_which_it_is(tmp_path):
    save(tmp_path, 1)
    step = epath.Path(tmp_path / CHECKPOINTS / "1")
    checksums.write(step, checksums.read(step))
    (report,) = checkpoint.verify(tmp_path)
    assert report.problems == ()


METADATA = (
    *("_CHECKPOINT_METADATA", "config/metadata", "data/metadata", "history/metadata"),
    *("state/_METADATA", "state/_sharding", "state/array_metadatas/process_0"),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def step_of_another(tmp_path_factory):
    """A step, of which a test changes one file at a time."""
    workdir = tmp_path_factory.mktemp("another")
    save(workdir, 1)
    return epath.Path(workdir / CHECKPOINTS / "1")


@pytest.fixture
def coroutines_may_be_left(monkeypatch):
    """Orbax leaves some behind where another one fails; Python warns when it removes them."""
    gc.collect()
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    yield
    gc.collect()


@pytest.mark.usefixtures("coroutines_may_be_left")
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(name=st.sampled_from(METADATA), value=json_values | st.binary(max_size=16), data=st.data())
def test_whatever_the_metadata_of_another_writer_say_the_end_is_one_line(
    step_of_another, name, value, data
):
    """Its checksums are those of its files, so nothing but the content tells."""
    step, file = step_of_another, step_of_another / name
    content = file.read_bytes()
    changed = value if isinstance(value, bytes) else json.dumps(value).encode()
    if isinstance(value, dict):  # as near to the right one as can be
        own = json.loads(content)
        own[data.draw(st.sampled_from([*sorted(own), "another"]))] = value
        changed = json.dumps(own).encode()
    try:
        file.write_bytes(changed)
        checksums.write(step, checksums.checksums(step, checksums.read(step)), step=1)
        for read in (
            lambda: checkpoint.restore(step, make_state(0)),
            lambda: checkpoint.load_params(step, which="params"),
            lambda: checkpoint.load_config(step),
            lambda: checkpoint.load_data_state(step),
        ):
            with contextlib.suppress(UserError):
                read()
    finally:
        file.write_bytes(content)
        checksums.write(step, checksums.checksums(step, checksums.read(step)), step=1)


def test_a_file_that_has_become_a_pipe_is_not_read(tmp_path):
    save(tmp_path, 1)
    file = payload(tmp_path, 1)
    file.unlink()
    os.mkfifo(file)
    (report,) = checkpoint.verify(tmp_path)
    assert [problem.endswith("is no file") for problem in report.problems] == [True]


def test_additional_files_are_reported_and_not_copied(tmp_path, caplog):
    """What a file manager leaves in a step is no damage: nothing reads it."""
    save(tmp_path / "a", 1)
    step = tmp_path / "a" / CHECKPOINTS / "1"
    for name in (".DS_Store", "state/d/0123", "config/copy"):
        (step / name).parent.mkdir(exist_ok=True)
        (step / name).write_text("x")
    (report,) = checkpoint.verify(tmp_path / "a")
    assert report.problems == ()
    assert set(report.additional) == {".DS_Store", "state/d/0123", "config/copy"}
    assert_equal(restore(tmp_path / "a").state, make_state(1))
    assert ["additional files: " in r.message for r in caplog.records].count(True) == 1
    checkpoint.copy(tmp_path / "a", 1, tmp_path / "b")
    (report,) = checkpoint.verify(tmp_path / "b")
    assert (report.problems, report.additional) == ((), ())


def test_a_save_whose_run_lost_the_workdir_meanwhile_is_no_step(tmp_path):
    lost = []

    def before_commit():
        if lost:
            raise UserError("was taken over")

    def save():
        with checkpoint.Checkpointer(tmp_path, before_commit=before_commit) as checkpointer:
            checkpointer.save(1 + len(lost), make_state(), {}, {})

    save()
    lost.append(True)
    with pytest.raises(UserError, match="was taken over"):
        save()
    assert list_steps(tmp_path) == (1,)
    assert [report.problems for report in checkpoint.verify(tmp_path)] == [()]
