"""Every command on a real (tiny) run of three stages: what it does, and what it refuses."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.tasks import TASKS, Example, Task
from tests import processes, smoke_run
from tests.evaluation.benchmarks.test_text_benchmarks import write as write_benchmark
from tests.evaluation.chat_server import ChatServer, with_tokens
from tests.smoke_run import CONFIG
from univg_jax import Pipeline, checkpoint, encoders
from univg_jax.cli.main import main
from univg_jax.workdir import list_steps
from univg_jax.writers import read_metrics

# One worker runs this file: its fixture is a whole run.
pytestmark = pytest.mark.xdist_group("pipeline")

FAST = [f"--config.{override}" for override in smoke_run.FAST]


def train_command(stage, root, *more, workdir=None):
    """`univg train` of a stage on the data in `root`, by default in that stage's workdir."""
    workdir = workdir or root / f"stage{stage}"
    data = f"--config.data.dir={root / 'data'}"
    return ["train", f"--config={CONFIG}{stage}", f"--workdir={workdir}", data, *FAST, *more]


def train(*arguments, **options):
    return main(train_command(*arguments, **options))


def test_the_stages_hand_on_their_weights_and_encoders(root):
    codecs = [
        (root / f"stage{i}" / "encoders" / "codec.safetensors").read_bytes() for i in (1, 2, 3)
    ]
    assert codecs[0] == codecs[1] == codecs[2]
    params = checkpoint.load_params(root / "stage3")
    assert set(params) == {"backbone", "identity_projector"}
    assert set(checkpoint.load_params(root / "stage2")) == {"backbone"}


@pytest.mark.nightly
def test_a_run_on_cached_prompts_and_pictures_is_the_same(root, tmp_path, capsys):
    config = [f"--config={CONFIG}1", f"--config.data.dir={root / 'data'}", *FAST]
    command = ["data", "cache", *config, f"--out={tmp_path / 'cache'}"]
    assert main([*command, "--what=text,latents"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"the embeddings of \d+ prompts and the latents of \d+ pictures", said), said
    cached = f"--config.data.text_cache={tmp_path / 'cache'}"
    latents = f"--config.data.latent_cache={tmp_path / 'cache'}"
    assert train(1, root, cached, latents, workdir=tmp_path / "run") == 0
    losses = [
        [
            (row["step"], row.get("loss"), row.get("val/loss/t2i"))
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (root / "stage1", tmp_path / "run")
    ]
    # The encoders saw prompts and pictures in other batches: the same to float32's rounding.
    np.testing.assert_allclose(np.array(losses[0], float), np.array(losses[1], float), rtol=1e-5)
    capsys.readouterr()
    assert train(1, root, cached, "--config.data.num_tokens=40", workdir=tmp_path / "other") == 1
    error = "embeddings of another text encoder: num_tokens is 36, this run's 40"
    assert error in capsys.readouterr().err
    for what in ("text", "latents"):
        assert main([*command, f"--what={what}"]) == 1
        assert "has a cache; choose another folder" in capsys.readouterr().err
    assert main([*command, "--what=latent"]) == 1
    assert "unknown name in --what: 'latent'; did you mean 'latents'?" in capsys.readouterr().err
    # A run of more steps needs pictures that the cache does not have, and names them.
    more = ("--config.train.steps=3", "--config.train.sample_examples=0")
    assert train(1, root, latents, *more, workdir=tmp_path / "longer") == 1
    error = capsys.readouterr().err
    assert re.search(r"the target of scenes/train\[\d+\]", error), error
    encoded = "--config.data.encode_missing=True"
    assert train(1, root, latents, encoded, *more, workdir=tmp_path / "encoded") == 0


def test_each_stage_trains_its_tasks(root):
    for stage, names in ((1, {"t2i"}), (2, set(TASKS) - {"id"}), (3, set(TASKS))):
        summary = json.loads((root / f"stage{stage}" / "summary.json").read_text())
        assert set(summary["weights"]) == names
        assert set(summary["shares"]) <= names
        folder = root / f"stage{stage}" / "samples" / "0000002"
        assert {p.stem for p in folder.iterdir()} == names


def test_again_says_that_all_is_done(root, capsys):
    before = (root / "stage1" / "metrics.jsonl").read_bytes()
    assert train(1, root) == 0
    assert "all 2 steps are done" in capsys.readouterr().out
    assert (root / "stage1" / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "image.png")
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


SAMPLES = {
    "t2i": ["--prompt=a pig on grass"],
    "ie": ["--prompt=remove the pig", "--image=image.png"],
    "ip": ["--image=image.png", "--mask=mask.png"],
    "lg": ["--prompt=a pig (red block) on grass", "--image=image.png"],
    "depth": ["--image=image.png"],
    "pose": ["--image=image.png"],
    "seg": ["--prompt=the pig", "--image=image.png"],
    "id": ["--prompt=a portrait of <p> smiling", "--face=image.png"],
}


def sample(root, pictures, task, arguments, out):
    files = [
        a.replace("=image.png", f"={pictures}/image.png").replace(
            "=mask.png", f"={pictures}/mask.png"
        )
        for a in arguments
    ]
    return main(
        ["sample", f"--checkpoint={root / 'stage3'}", f"--task={task}", f"--out={out}", *files]
    )


@pytest.mark.parametrize("task", list(SAMPLES))
def test_every_task_samples_a_picture(root, pictures, tmp_path, task):
    out = tmp_path / "out.png"
    assert sample(root, pictures, task, SAMPLES[task], out) == 0
    # A picture that was given returns at its own size, a new one has the run's.
    is_new = task in ("t2i", "id")
    assert np.asarray(Image.open(out)).shape == ((32, 32, 3) if is_new else (40, 50, 3))


GRAY_CONFIG = """
from experiments import emoji
from experiments.base import task


def get_config():
    c = emoji.get_config(stage=1, preset="smoke")
    c.tasks = dict(gray=task(1.0, "scenes"))
    return c
"""


def test_a_task_is_known_everywhere_by_its_entry(root, pictures, tmp_path, monkeypatch, capsys):
    """As README's recipe adds one: a function and an entry."""

    def gray(record, rng):
        mean = record["image"].mean(-1, keepdims=True).astype(np.uint8)
        return Example(target=np.repeat(mean, 3, -1), source=record["image"])

    entry = Task(
        name="gray", title="gray", needs=("image",), make=gray, inputs=("image",), prompt="none"
    )
    monkeypatch.setitem(TASKS, "gray", entry)
    (tmp_path / "config.py").write_text(GRAY_CONFIG)
    config = [f"--config={tmp_path / 'config.py'}", f"--config.data.dir={root / 'data'}", *FAST]
    run, out = tmp_path / "run", tmp_path / "out.png"
    assert main(["train", f"--workdir={run}", *config]) == 0
    command = ["sample", f"--checkpoint={run}", "--task=gray", f"--out={out}"]
    assert main([*command, f"--image={pictures}/image.png"]) == 0
    assert out.is_file()
    capsys.readouterr()
    assert main(command) == 1
    assert "task 'gray' needs an image" in error_line(capsys)
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "gray" in capsys.readouterr().out


def test_inpainting_keeps_what_is_not_masked(root, pictures, tmp_path):
    assert sample(root, pictures, "ip", SAMPLES["ip"], tmp_path / "out.png") == 0
    image = np.asarray(Image.open(pictures / "image.png"))
    kept = np.asarray(Image.open(pictures / "mask.png")) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png"))[kept], image[kept])


def test_a_seed_gives_one_picture(root, pictures, tmp_path):
    def picture(name, *more):
        assert sample(root, pictures, "t2i", [*SAMPLES["t2i"], *more], tmp_path / name) == 0
        return (tmp_path / name).read_bytes()

    assert picture("a.png") == picture("b.png")
    assert picture("a.png") != picture("c.png", "--seed=1")


def test_evaluation_and_report(root, capsys):
    arguments = [
        "evaluate",
        f"--checkpoint={root / 'stage3'}",
        "--benchmark=emoji_scenes",
        f"--out={root / 'evaluation'}",
    ]
    # Those that need no scene scorer, whose fit has tests of its own.
    names = ["ie", "ip", "depth", "pose", "seg", "id"]
    assert main([*arguments, "--examples=4", "--batch_size=8", f"--tasks={','.join(names)}"]) == 0
    (file,) = (root / "evaluation").glob("*/results.json")
    results = json.loads(file.read_text())
    assert list(results["tasks"]) == names
    assert results["provenance"]["checkpoint"] == str(root / "stage3")
    assert all(name in capsys.readouterr().out for name in names[:1])
    for task in results["tasks"].values():
        assert {"model", "untrained", "trivial", "codec"} <= set(task["systems"])
    page = (root / "evaluation" / "report.html").read_text()
    assert "ie/l1_changed" in page
    assert results["provenance"]["date"] in page
    stages = ",".join(str(root / f"stage{i}") for i in (1, 2, 3))
    assert (
        main(
            ["report", f"--stages={stages}", f"--evaluation={root / 'evaluation'}", f"--out={root}"]
        )
        == 0
    )
    assert f"step 2 · date {results['provenance']['date']}" in capsys.readouterr().out
    assert (root / "samples.png").stat().st_size > 0
    report = json.loads((root / "report.json").read_text())
    assert [stage["steps"] for stage in report["stages"].values()] == [2, 2, 2]
    page = (root / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained
    assert all(task["title"] in page for task in results["tasks"].values())


def error_line(capsys):
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=dept", "--image=image.png"], "unknown task 'dept'; did you mean 'depth'?"),
        (["--task=t2i"], "task 't2i' needs a prompt"),
        (["--task=id", "--prompt=a portrait", "--face=image.png"], "has no <p>"),
        (["--task=ie", "--prompt=remove it"], "task 'ie' needs an image"),
        (["--task=depth", "--image=nowhere.png"], "--image=nowhere.png does not exist"),
        (["--task=t2i", "--prompt=x", "--image=image.png"], "task 't2i' takes no image"),
        (["--task=pose", "--prompt=x", "--image=image.png"], "task 'pose' takes no prompt"),
        (["--task=t2i", "--prompt=x", "--out=x.jpg"], "should end in .png"),
    ],
)
def test_bad_input_of_sample(root, pictures, tmp_path, capsys, arguments, message):
    out = [] if any(a.startswith("--out") for a in arguments) else [f"--out={tmp_path}/out.png"]
    files = [a.replace("=image.png", f"={pictures}/image.png") for a in arguments]
    assert main(["sample", f"--checkpoint={root / 'stage3'}", *out, *files]) == 1
    assert message in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_a_task_that_the_run_was_not_trained_on(root, pictures, tmp_path, capsys):
    arguments = [
        "--task=id",
        "--prompt=<p>",
        f"--face={pictures}/image.png",
        f"--out={tmp_path}/o.png",
    ]
    assert main(["sample", f"--checkpoint={root / 'stage2'}", *arguments]) == 1
    assert "unknown task of" in error_line(capsys)


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, message in (("absent", "does not exist"), ("empty", "no steps")):
        arguments = [
            "sample",
            f"--checkpoint={tmp_path / path}",
            "--task=t2i",
            "--prompt=x",
            f"--out={tmp_path}/o.png",
        ]
        assert main(arguments) == 1
        assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optim.lrate=1"], "unknown config key 'optim.lrate'; did you mean 'optim.lr'?"),
        (["--config.optim.name=adam"], "'adam'; did you mean 'adamw'?"),
        (["--config.model.overrides.dept=3"], "did you mean 'depth'?"),
        (["--config.model.size=xxl"], "did you mean 'xl'?"),
        (["--config.sampling.solver=eulr"], "did you mean 'euler'?"),
        (["--config.tasks.t2i.weight=-1"], "expected a finite number >= 0"),
        (["--config.tasks.t2i.sources=('scene',)"], "did you mean 'scenes'?"),
        (["--profile=2:1"], "--profile=2:1: expected START:STOP with 0 <= START < STOP <= 2"),
        (["--config.init_from.path=/nowhere"], "no checkpoint in /nowhere: it does not exist"),
        (["--config.data.dataset=emoji"], "data.dir='/nowhere' does not exist, and data.dataset="),
        (["--config.data.resolution=30"], "data.resolution=30: expected a multiple of 4"),
        (["--config.data.batch_size=12"], "data.batch_size=12: expected a multiple of the 8"),
    ],
)
def test_bad_input_of_train_leaves_no_workdir(root, tmp_path, capsys, overrides, message):
    if "dataset" in overrides[0]:
        overrides = [*overrides, "--config.data.dir=/nowhere"]
    assert train(1, root, *overrides, workdir=tmp_path / "w") == 1
    assert message in error_line(capsys)
    assert not (tmp_path / "w").exists()


def test_a_run_goes_on_with_another_config_if_that_is_declared(root, tmp_path, capsys, caplog):
    workdir = tmp_path / "w"
    shutil.copytree(root / "stage1", workdir)
    changed = ["--config.optim.lr=0.5", "--config.train.steps=3"]
    assert train(1, root, *changed, workdir=workdir) == 1
    line = error_line(capsys)
    assert "belongs to another config: optim.lr is 0.5, there " in line
    assert line.endswith("to go on all the same: --allow_config_change=optim.lr")
    assert list_steps(workdir) == list_steps(root / "stage1")
    assert train(1, root, *changed, "--allow_config_change=optim.lr", workdir=workdir) == 0
    said = f"{workdir} goes on with another config: optim.lr is 0.5, there "
    assert any(said in record.message for record in caplog.records)
    assert list_steps(workdir)[-1] == 3


@pytest.mark.nightly
def test_a_start_that_failed_leaves_the_workdir_to_another_config(root, tmp_path, capsys):
    workdir, parent = tmp_path / "w", f"--config.init_from.path={root / 'stage2'}"
    # That the parent lacks parameters is found as late as can be, once the model is compiled.
    assert train(3, root, parent, "--config.init_from.new=()", workdir=workdir) == 1
    assert "declare leaves as new" in capsys.readouterr().err
    assert not (workdir / "config.json").exists()
    assert train(1, root, "--config.conditioning.codec.channels=4", workdir=workdir) == 0
    assert list_steps(workdir) == (1, 2)
    assert (workdir / "summary.json").exists()
    assert train(1, root, "--config.conditioning.codec.channels=8", workdir=workdir) == 1
    assert "belongs to another config" in capsys.readouterr().err


def test_a_trace_that_cannot_be_made_is_refused(root, capsys):
    assert train(1, root, "--profile=0:1") == 1
    assert "is at step 2 already" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_left_alone(root, capsys):
    before = {p: p.stat().st_mtime_ns for p in (root / "stage1").rglob("*")}
    assert train(1, root, "--config.optim.lr=0.5") == 1
    assert "belongs to another config: optim.lr is 0.5" in error_line(capsys)
    assert {p: p.stat().st_mtime_ns for p in (root / "stage1").rglob("*")} == before


STEP = r" +(\d+)  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d +[\d.]+ [MG]iB  (.*)"


def test_checkpoint_list_shows_each_step(root, capsys):
    assert main(["checkpoint", "list", str(root / "stage1")]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(STEP, x).groups() for x in lines] == [("1", "sound"), ("2", "sound")]
    assert main(["checkpoint", "list", "--quick", str(root / "stage1" / "checkpoints" / "2")]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert {re.fullmatch(STEP, x)[2] for x in lines} == {"not read"}


def test_checkpoint_list_of_a_folder_names_its_runs(root, capsys):
    assert main(["checkpoint", "list", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if x.endswith(":")] == [f"{root}/stage{i}:" for i in (1, 2, 3)]
    assert sum(re.fullmatch(STEP, x) is not None for x in lines) == 6


@pytest.mark.parametrize(
    "command",
    [
        ["checkpoint", "verify"],
        ["checkpoint", "copy", "--out=copy"],
        ["sample", "--task=t2i", "--prompt=x", "--out=o.png", "--checkpoint"],
        ["evaluate", "--benchmark=emoji_scenes", "--out=out", "--checkpoint"],
    ],
    ids=lambda command: command[0],
)
def test_a_folder_that_is_no_run_says_which_is(root, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)

    def error(path):
        assert main([*command, str(path)]) == 1
        return error_line(capsys)

    runs = [str(root / f"stage{i}") for i in (1, 2, 3)]
    assert all(run in error(root) for run in runs)
    assert "did you mean" in error(root / "stge2")
    # Not the parent of `root`: it has what other tests leave, and a message lists a dozen runs.
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "run").symlink_to(root)
    assert all(f"parent/run/stage{i}" in error(tmp_path / "parent") for i in (1, 2, 3))
    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty").endswith("it has no steps")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "parent"]


def test_checkpoint_copy_and_verify(root, tmp_path, capsys):
    assert main(["checkpoint", "copy", str(root / "stage1"), f"--out={tmp_path / 'copy'}"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "copy")]) == 0
    assert "step 2: sound" in capsys.readouterr().out
    shard = max(
        (tmp_path / "copy" / "checkpoints" / "2" / "state").rglob("d/*"),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["checkpoint", "verify", str(tmp_path / "copy")]) == 1
    assert "damaged" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path / "copy")]) == 0
    assert "damaged: state/" in capsys.readouterr().out


def test_steps_that_are_no_longer_whole_are_listed(root, tmp_path, capsys):
    copy = tmp_path / "copy"
    assert main(["checkpoint", "copy", str(root / "stage1"), f"--out={copy}"]) == 0
    (copy / "checkpoints" / "3").mkdir()
    file = copy / "checkpoints" / "2" / "config" / "metadata"
    file.unlink()
    file.symlink_to("nowhere")
    capsys.readouterr()
    assert main(["checkpoint", "list", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "damaged: config/metadata is missing" in lines[1]
    assert "damaged: " in lines[2]
    assert "checksums.json" in lines[2]


def test_a_copy_is_a_whole_run_and_damaged_encoders_are_named(root, tmp_path, capsys):
    copy, again = tmp_path / "copy", tmp_path / "again"
    assert main(["checkpoint", "copy", str(root / "stage3"), f"--out={copy}"]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(copy)]) == 0
    assert capsys.readouterr().out == "step 2: sound\nencoders: sound\n"
    for name in ("checkpoints/2/note.txt", "encoders/old", "checkpoints/notes"):
        (copy / name).write_text("x")
    assert main(["checkpoint", "verify", str(copy)]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "step 2: sound; additional files, which nothing reads: note.txt",
        "encoders: sound; additional files, which nothing reads: old",
        "checkpoints: also what is no checkpoint: notes",
    ]
    assert printed.err.endswith("is sound, but has files that no run wrote there\n")
    pipeline, original = Pipeline.load(copy), Pipeline.load(root / "stage3")
    jax.tree.map(np.testing.assert_array_equal, pipeline.frozen, original.frozen)
    # It can be a parent, too: its fitted encoders are taken, not fitted anew.
    encoders.check(pipeline.config.conditioning, init_from=copy)
    codec = copy / "encoders" / "codec.safetensors"
    codec.write_bytes(codec.read_bytes()[:-1] + b"!")
    assert main(["checkpoint", "verify", str(copy)]) == 1
    assert main(["checkpoint", "copy", str(copy), f"--out={again}"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-2].endswith("is damaged: encoders")
    assert "nothing copied: " in errors[-1]
    assert "codec.safetensors: not the weights of the codec encoder" in errors[-1]
    assert not again.exists()


def test_data_inspect_writes_a_page(root, tmp_path):
    out = tmp_path / "page.html"
    data = f"--config.data.dir={root / 'data'}"
    assert (
        main(["data", "inspect", f"--config={CONFIG}3", data, f"--out={out}", "--examples=2"]) == 0
    )
    assert "a portrait of &lt;p&gt;" in out.read_text()


@pytest.mark.slow
def test_one_run_a_workdir_and_ctrl_c_saves_its_step(root, tmp_path, capsys, caplog):
    workdir = tmp_path / "run"

    def command(steps):
        every = [f"--config.train.{name}=100000" for name in ("save_every", "eval_every")]
        steps = f"--config.train.steps={steps}"
        return train_command(1, root, *every, steps, workdir=workdir)

    with processes.running([1], *command(100_000)) as (first,):
        processes.wait_for([first], (workdir / "parameters.txt").exists)
        assert main(command(100_000)) == 1  # a second run
        error = f"is in use by process {first.popen.pid} on "
        assert error in capsys.readouterr().err
        first.popen.send_signal(signal.SIGINT)
        assert first.wait() == 130
        assert f"Ctrl-C: step {max(list_steps(workdir))} is saved" in first.log.read_text()
    assert not (workdir / "lock.json").exists()
    with processes.running([1], *command(100_000)) as (killed,):
        processes.wait_for([killed], (workdir / "lock.json").exists)
        killed.popen.kill()
    last = max(list_steps(workdir)) + 1
    assert main(command(last)) == 0
    assert f"taken over from process {killed.popen.pid}" in caplog.text
    assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")][-1] == last
    assert not (workdir / "lock.json").exists()


def test_a_damaged_checkpoint_ends_the_run_unless_it_may_fall_back(root, tmp_path, capsys, caplog):
    workdir = shutil.copytree(root / "stage1", tmp_path / "run")
    newest = workdir / "checkpoints" / "2"
    config = newest / "config" / "metadata"
    config.write_bytes(config.read_bytes()[:-1])
    assert train(1, root, "--config.train.steps=3", workdir=workdir) == 1
    line = error_line(capsys)
    assert f"checkpoint {newest} is damaged: config/metadata is not what was written" in line
    assert line.endswith("checkpoints/1, or continue the run with --fallback")
    assert list_steps(workdir) == (1, 2)
    assert train(1, root, "--config.train.steps=3", "--fallback", workdir=workdir) == 0
    assert "FALLING BACK TO STEP 1" in caplog.text
    assert (newest.parent / "2.damaged").exists()
    assert main(["checkpoint", "verify", str(workdir)]) == 0


def test_a_run_with_checkpoints_does_not_need_its_parent(root, tmp_path, capsys):
    workdir = shutil.copytree(root / "stage2", tmp_path / "run")
    gone = f"--config.init_from.path={tmp_path / 'gone'}"
    assert train(2, root, gone, "--config.train.steps=3", workdir=workdir) == 0
    assert train(2, root, "--config.train.steps=3", workdir=workdir) == 0
    assert "all 3 steps are done" in capsys.readouterr().out
    assert train(2, root, gone, workdir=tmp_path / "new") == 1
    assert "gone" in error_line(capsys)
    shutil.rmtree(workdir / "encoders")  # no others are fitted in their place
    assert train(2, root, "--config.train.steps=4", workdir=workdir) == 1
    assert "encoders.json does not exist" in error_line(capsys)


def test_a_torn_summary_is_made_again(root, tmp_path, caplog):
    workdir = shutil.copytree(root / "stage1", tmp_path / "run")
    summary = workdir / "summary.json"
    before = summary.read_text()
    summary.write_text(before[: len(before) // 2])
    unfinished = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"  # as a killed save leaves it
    shutil.copytree(workdir / "checkpoints" / "1", unfinished)
    assert train(1, root, workdir=workdir) == 0
    assert "summary.json is not JSON" in caplog.text
    assert json.loads(summary.read_text()) == json.loads(before)
    assert list_steps(workdir) == (1, 2)


def test_a_public_benchmark_from_generation_to_a_swept_report(root, tmp_path, capsys):
    """DSG in its own format, answered by a server; apart, together, and at two settings."""
    data = write_benchmark(tmp_path / "data", "dsg")
    out = tmp_path / "out"
    common = [
        "evaluate",
        f"--checkpoint={root / 'stage3'}",
        "--benchmark=dsg",
        f"--data={data}",
        f"--out={out}",
        "--excerpt",
        "--batch_size=8",
    ]
    assert main([*common, "--generate_only"]) == 0
    (images,) = out.iterdir()
    assert sorted(path.name for path in images.iterdir()) == ["vrd_1.png", "whoops_2.png"]
    assert f"in {images}" in capsys.readouterr().out
    with ChatServer(yes) as server:
        scorer = f"--scorer=vqa={server.url},model=rule"
        assert main([*common, "--score_only", scorer]) == 0
        asked = len(server.requests)
        assert "official/overall" in capsys.readouterr().out
        # The same again asks nothing; a folder of anybody is scored without a checkpoint.
        assert main([*common, scorer]) == 0
        theirs = [a for a in common if not a.startswith("--checkpoint")]
        assert main([*theirs, f"--score_only={images}", scorer]) == 0
        assert len(server.requests) == asked
        assert main([*common, scorer, "--sweep=guidance=1,3", "--sweep=steps=1,2"]) == 0
    told = capsys.readouterr().out
    assert "guidance=3, steps=2" in told
    assert len(list(out.glob("dsg-images-*"))) == 5
    assert len(list(out.glob("dsg-*/results.json"))) == 6
    page = (out / "report.html").read_text()
    assert "guidance" in page
    assert page.count("<svg") >= 1
    assert main(["report", f"--evaluation={out}", f"--out={tmp_path / 'page'}"]) == 0


def yes(request):
    return with_tokens("yes", [("yes", -0.1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark=genval"], "unknown benchmark 'genval'; did you mean 'geneval'?"),
        (["--benchmark=dsg"], "--data is missing: the official files of dsg"),
        (["--benchmark=dsg", "--data=nowhere"], "dsg needs the scorer 'vqa': --scorer=vqa=http"),
        (["--benchmark=dsg", "--data=nowhere", "--generate_only"], "expected dsg-1k-anns.csv"),
        (["--benchmark=inpainting:hol=box"], "unknown key of inpainting: 'hol'; did you mean 'hol"),
        (["--benchmark=emoji_scenes", "--scorer=clip=x"], "emoji_scenes takes no --scorer"),
        (["--benchmark=parti", "--data=.", "--scorer=clip"], "--scorer=clip: expected NAME=VALUE"),
        (["--benchmark=parti", "--data=.", "--scorer=clip=x"], "--scorer=clip: "),
        (["--benchmark=emoji_scenes", "--sweep=step=1,2"], "unknown key of --sweep: 'step'"),
        (["--benchmark=emoji_scenes", "--sweep=steps"], "--sweep=steps: expected steps=A,B,C"),
        (["--benchmark=emoji_scenes", "--sweep=steps=1,0"], "sampling.steps=0: expected a whole"),
        (["--benchmark=emoji_scenes", "--batch_size=12"], "expected a multiple of 8 devices"),
    ],
)
def test_bad_input_of_evaluate(root, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    given = [f"--checkpoint={root / 'stage3'}", f"--out={out}", *arguments]
    assert main(["evaluate", *given]) == 1
    assert message in error_line(capsys)
    assert not out.exists()


def test_an_evaluation_needs_a_checkpoint_or_a_folder_of_images(tmp_path, capsys):
    for more in ([], ["--score_only"], ["--generate_only"]):
        command = ["evaluate", "--benchmark=dsg", "--data=.", f"--out={tmp_path / 'out'}", *more]
        assert main(command) == 1
        assert "--checkpoint is missing: only --score_only=DIR" in error_line(capsys)
