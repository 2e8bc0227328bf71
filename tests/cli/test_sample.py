"""`univg sample`: several pictures, examples of the data, and what is refused before loading."""

import shlex

import numpy as np
import pytest
from PIL import Image

from data_pipelines.tasks import TASKS
from univg_jax import Pipeline
from univg_jax.cli.main import main, parse

pytestmark = pytest.mark.xdist_group("pipeline")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def pipeline(root):
    return Pipeline.load(root / "stage3")


@pytest.fixture
def sample(pipeline, monkeypatch):
    """Runs the command on the last stage, which is loaded only once; must end well."""
    monkeypatch.setattr(Pipeline, "load", lambda path, **options: pipeline)

    def run(*arguments):
        assert main(["sample", f"--checkpoint={pipeline.path}", *map(str, arguments)]) == 0

    return run


def test_each_of_several_pictures_is_that_of_its_own_call(sample, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a pig on grass\n\n  a cat on sand \n")
    sample("--task=t2i", f"--prompts={prompts}", "--num=2", "--seed=7", f"--out={tmp_path / 'a'}")
    files = [f"{line}_seed{seed}.png" for line in ("0001", "0003") for seed in (7, 8)]
    assert names(tmp_path / "a") == files
    assert "wrote 4 pictures to" in capsys.readouterr().out
    for name, prompt, seed in ((files[0], "a pig on grass", 7), (files[3], "a cat on sand", 8)):
        alone = tmp_path / "alone.png"
        sample("--task=t2i", f"--prompt={prompt}", f"--seed={seed}", f"--out={alone}")
        assert (tmp_path / "a" / name).read_bytes() == alone.read_bytes()
    sample("--task=t2i", f"--prompts={prompts}", f"--out={tmp_path / 'b'}")
    assert names(tmp_path / "b") == ["0001.png", "0003.png"]
    sample("--task=t2i", "--prompt=a pig", "--num=2", f"--out={tmp_path / 'c'}")
    assert names(tmp_path / "c") == ["seed0.png", "seed1.png"]


@pytest.mark.parametrize("task", ["t2i", "ip", "id"])
def test_an_example_of_the_data_needs_no_files(sample, tmp_path, task):
    sample(f"--task={task}", "--example=1", f"--out={tmp_path / 'x.png'}")
    kinds = [{"image": "source"}.get(kind, kind) for kind in TASKS[task].inputs if kind != "mask"]
    assert names(tmp_path) == sorted(["x.png", *(f"x_{kind}.png" for kind in [*kinds, "target"])])


def test_an_example_is_the_same_as_its_files(sample, tmp_path, capsys):
    sample("--task=seg", "--example=2", f"--out={tmp_path / 'a.png'}")
    (prompt,) = (line for line in capsys.readouterr().out.splitlines() if "prompt" in line)
    prompt = prompt.removeprefix("its prompt is ").strip("'")
    source = tmp_path / "a_source.png"
    sample("--task=seg", f"--image={source}", f"--prompt={prompt}", f"--out={tmp_path / 'b.png'}")
    np.testing.assert_array_equal(*(Image.open(tmp_path / f"{name}.png") for name in "ab"))


def test_flags_are_the_options_of_the_pipeline(pipeline, sample, tmp_path):
    options = dict(guidance=2.0, solver="heun", steps=1, negative_prompt="a dog")
    flags = [f"--{name}={value}" for name, value in options.items()]
    sample("--task=t2i", "--prompt=a pig", "--size=48x32", *flags, f"--out={tmp_path / 'a.png'}")
    made = pipeline("a pig", size=(48, 32), **options)
    np.testing.assert_array_equal(Image.open(tmp_path / "a.png"), np.asarray(made.image))


def test_a_picture_is_extended_and_boxes_are_drawn(pipeline, sample, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    given, out = [f"--image={tmp_path / 'in.png'}"], f"--out={tmp_path / 'a.png'}"
    sizes = {"margins=1,2,3,4": (34, 26), "aspect=2:1": (40, 20), "size=30x40": (30, 40)}
    for flag, size in sizes.items():
        sample("--task=outpaint", *given, f"--{flag}", out)
        assert np.asarray(Image.open(tmp_path / "a.png")).shape == (*size[::-1], 3)
    boxes = {"a pig": (0.1, 0.1, 0.5, 0.9), "an apple": (0.5, 0.2, 1, 1)}
    flags = [f"--box={name}={','.join(map(str, box))}" for name, box in boxes.items()]
    sample("--task=layout", "--prompt=a pig and an apple", *flags, out)
    made = pipeline.layout(prompt="a pig and an apple", boxes=list(boxes.items()))
    np.testing.assert_array_equal(Image.open(tmp_path / "a.png"), np.asarray(made.image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=t2i", "--prompt=x", "--image_guidance=2"], "'t2i' takes no image_guidance"),
        (["--task=t2i", "--prompt=x", "--solver=rk4"], "unknown solver 'rk4'"),
        (["--task=t2i", "--prompt=x", "--margins=3"], "task 't2i' takes no margins"),
        (["--task=lg", "--prompt=x", "--box=y=0,0,1,1"], "'y' does not stand in the prompt 'x'"),
        (["--task=t2i", "--example=99999"], "--example=99999: the test split has"),
        (["--task=id", "--example=0"], "unknown task of"),
        (["--task=t2i", "--prompt=x", "--pretrained=/nowhere"], "pretrained=/nowhere is not a"),
    ],
)
def test_what_the_run_cannot_is_said_before_it_is_loaded(
    root, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.delattr(Pipeline, "load")
    command = ["sample", f"--checkpoint={root / 'stage2'}", f"--out={tmp_path / 'x.png'}"]
    assert main([*command, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=edti", "--prompt=x"], "unknown task 'edti'; did you mean 'ie'?"),
        (["--prompts=none.txt"], "--prompts=none.txt does not exist"),
        (["--prompts=."], "--prompts=. is a folder"),
        (["--prompts=empty.txt"], "--prompts=empty.txt has no prompt"),
        (["--prompts=latin.txt"], "--prompts=latin.txt is not text in UTF-8: see line 2"),
        (["--task=id", "--prompts=good.txt", "--face=face.png"], "line 2 of --prompts: prompt"),
        (["--prompts=good.txt", "--prompt=x"], "--prompts and --prompt"),
        (["--prompts=good.txt", "--out=x.png"], "need a folder"),
        (["--prompt=x", "--num=2", "--out=x.png"], "need a folder"),
        (["--prompt=x", "--out=x"], "should end in .png"),
        (["--prompt=x", "--num=0"], "--num=0: expected a whole number >= 1"),
        (["--prompt=x", "--seed=-1"], "--seed=-1: expected a whole number >= 0"),
        (["--prompt=x", "--num=2", f"--seed={2**32 - 1}"], "expected seeds up to 4294967295"),
        (["--prompt=x", "--batch_size=0"], "--batch_size=0: expected a whole number >= 1"),
        (["--example=-1"], "--example=-1: expected a whole number >= 0"),
        (["--example=1", "--prompt=x"], "leave out --prompt"),
        (["--example=1", "--image=face.png"], "leave out --image"),
        (["--example=1", "--prompts=good.txt"], "leave out --prompts"),
        (["--example=1", "--size=8x8"], "leave out --size"),
        (["--prompt=x", "--guidance=much"], "--guidance='much': expected a finite number >= 0"),
        (["--prompt=x", "--image_guidance=-1"], "--image_guidance=-1: expected a finite number"),
        (["--prompt=x", "--size=8"], "--size=8: expected WIDTHxHEIGHT"),
        (["--prompt=x", "--box=a pig"], "--box=a pig: expected NAME=X0,Y0,X1,Y1"),
        (["--prompt=x", "--data=d"], "--data says where the data of --example lies"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(
    root, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.delattr(Pipeline, "load")
    root = root.resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"a pig\na caf\xe9")
    (tmp_path / "good.txt").write_text("a portrait of <p>\na pig\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "face.png")
    before = names(tmp_path)
    given = {argument.partition("=")[0] for argument in arguments}
    several = {"--prompts", "--num"} & given
    out, run = "out" if several else "out.png", root / "stage3"
    defaults = {"--task": "t2i", "--out": out, "--checkpoint": run}
    command = [f"{flag}={value}" for flag, value in defaults.items() if flag not in given]
    assert main(["sample", *command, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert names(tmp_path) == before


def test_help_has_an_example_of_each_task_that_parses(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    printed = capsys.readouterr().out.split("tasks:\n")[1].split("\n\n")[0].splitlines()
    heads, examples = printed[::2], printed[1::2]
    assert [head.split()[0] for head in heads] == list(TASKS)
    for (name, task), head, example in zip(TASKS.items(), heads, examples, strict=True):
        assert task.title in head
        args = parse(["sample", "--checkpoint=x", "--out=x", *shlex.split(example)])
        assert args.task == name
        white = np.full((8, 8, 3), 255, np.uint8)
        given = {name: white[..., 0] if name == "mask" else white for name in task.inputs}
        task.from_inputs(prompt=args.prompt, **given, resolution=8)  # or it raises
