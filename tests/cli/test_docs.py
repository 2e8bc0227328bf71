"""README and the pages of docs/ say what is so: code runs, commands parse, paths exist.

`make docs` holds that their links lead somewhere on the site, too.
"""

import configparser
import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from data_pipelines.tasks import TASKS
from tools import architecture, task_pictures
from univg_jax import configs
from univg_jax.cli.main import COMMANDS, main, parse

pytestmark = pytest.mark.xdist_group("pipeline")

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_id(page):
    return page.name if isinstance(page, pathlib.Path) else None


def in_its_run(page):
    """The page as a parameter of the suite, or of the nightly run where it takes minutes."""
    is_long = page.name in ("README.md", "export.md", "resume.md")
    return pytest.param(page, marks=[pytest.mark.nightly] if is_long else [])


def commands(page):
    """The arguments of every `univg` command of a page, in blocks, in quotes and in the text."""
    text = page.read_text()
    blocks = "\n".join(code for _, code in FENCED.findall(text)).replace("\\\n", " ")
    inline = "\n".join(re.findall(r"`([^`\n]+)`", FENCED.sub("", text)))
    found = []
    for line in f"{blocks}\n{inline}".splitlines():
        for match in re.finditer(rf"\bunivg ((?:{'|'.join(COMMANDS)})\b.*)", line):
            command = match[1]
            if command.count('"') % 2:  # the command itself stands in quotes
                command = command[: command.rindex('"')]
            command = re.split(r" [#&]|;", command)[0]
            found.append(shlex.split(command.replace("$i", "0")))  # $i counts processes
    return found


def commands_with_flags():
    return [
        (page, args)
        for page in PAGES
        if page.name != "CHANGELOG.md"  # it names commands without all that they need
        for args in commands(page)
        if any(arg.startswith("--") for arg in args)
    ]


# What a block needs that no test has, in its first line; or the test that runs it.
MARK = re.compile(r"# (needs: .+|run by tests/\S+)\n")
# Pages whose blocks other tests run, with datasets and a server that are small.
RUN_ELSEWHERE = {"datasets.md": "tests/native", "serving.md": "tests/serving/test_docs.py"}
# Blocks of the programs that a reader has in a shell.
PROGRAM = re.compile(
    r"^(?:bash|curl|docker|gcloud|hf|kubectl|make|pip|python3?|univg|xpk) ", re.MULTILINE
)
ENDLESS = ("serve", "demo")  # commands that end by a signal
# A training step of a model of the real size is out of reach here.
SHORT = (
    *("train.steps=1", "train.eval_examples=0", "train.sample_examples=0", "data.batch_size=8"),
    *("data.resolution=32", "optim.warmup=1", "optim.accumulate=1"),
)


def blocks(page):
    """The Python and the commands of a page that are not marked, in order."""
    if page.name in RUN_ELSEWHERE:
        return []
    found = []
    for language, code in FENCED.findall(page.read_text()):
        is_shell = language in ("", "bash") and PROGRAM.search(code)
        if (language == "python" or is_shell) and not MARK.match(code):
            found.append((language, code))
    return found


def run_command(line):
    """Runs a `univg` command in this process, shortened if it trains; others are run elsewhere."""
    program, *args = shlex.split(line, comments=True)
    if program == "univg":
        assert args[0] not in ENDLESS, f"{line}: mark its block"
        short = [f"--config.{setting}" for setting in SHORT] if args[0] == "train" else []
        assert main([*args, *short]) == 0, line
    elif program == "make":
        assert f"make {args[0]}" in (ROOT / ".ci" / "run").read_text(), line
    elif program == "pip":  # that the extras exist is another test's
        assert args[0] == "install", line
    else:
        assert line.startswith("bash .ci/run"), line


@pytest.fixture
def workplace(root, tmp_path, monkeypatch):
    """A folder with the run, data and photos that the examples name; the run is a tiny one."""
    for name, target in {"quickstart/stage3": "stage3", "data/emoji_smoke": "data"}.items():
        link = tmp_path / "runs" / name
        link.parent.mkdir(parents=True)
        link.symlink_to(root / target)
    for folder, count in {"photos/train": 20, "photos/validation": 4, "pictures": 400}.items():
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (40, 36), (k % 256, 99, 0)).save(folder / f"{k}.jpg")
            (folder / f"{k}.txt").write_text(f"a photo of shade {k}")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [in_its_run(page) for page in PAGES if blocks(page)], ids=page_id)
def test_a_page_runs_from_top_to_bottom(page, workplace):
    """What is not marked with what it needs does."""
    names = {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                run_command(line)


def test_what_runs_other_pages_is_there():
    for page, tests in RUN_ELSEWHERE.items():
        assert (ROOT / "docs" / page).exists(), page
        assert (ROOT / tests).exists(), tests


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_extras_that_are_named_exist(page):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for names in re.findall(r"(?:'\.|univg_jax)\[([\w,]+)\]", page.read_text()):
        assert set(names.split(",")) <= set(setup["options.extras_require"]), names


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_each_task_has_a_page_with_what_it_learns_from_and_pictures_of_a_model(task):
    page = (ROOT / "docs" / "tasks" / f"{task.name}.md").read_text()
    training = page[page.index("**Training**") : page.index("**Measured by**")]
    for field in task.needs:
        assert f"`{field}`" in training, field
    strips = task_pictures.cut(task_pictures.open_grid())[list(TASKS).index(task.name)]
    for k, strip in enumerate(strips):
        assert f"(../images/tasks/{task.name}_{k}.png)" in page
        shown = Image.open(task_pictures.path_of(task.name, k))
        np.testing.assert_array_equal(shown, task_pictures.enlarge(strip))


@pytest.mark.parametrize(("page", "args"), commands_with_flags(), ids=page_id)
def test_every_command_with_flags_parses(page, args):
    parsed = parse(args)
    config = getattr(parsed, "config", "")
    if config.startswith("experiments/"):  # not "..."
        configs.load(config, parsed.overrides)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_target_that_is_named_exists(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_to_a_file_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_path_that_is_named_exists(page):
    folders = "univg_jax|data_pipelines|experiments|tests|benchmarks|tools|launch|docs"
    text = page.read_text()
    for path, test in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*)(?:::(\w+))?", text):
        assert (ROOT / path.rstrip(".")).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), test


def test_the_tree_of_readme_has_every_module_and_no_other():
    (tree,) = re.findall(r"^## The tree$.*?^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            named.add(folder + name)
        else:
            folder = name
            assert (ROOT / folder).is_dir(), folder
    there = {
        f"{package}/{path.name}{'/' * path.is_dir()}"
        for package in ("univg_jax", "data_pipelines")
        for path in (ROOT / package).iterdir()
        if path.name[:2] != "__" and path.name not in ("templates", "py.typed")
    }
    assert named == there


def test_the_drawing_of_the_rooms_is_that_of_the_code():
    """If not: python tools/architecture.py."""
    assert architecture.DRAWING.read_text() == architecture.draw(architecture.import_graph())


def test_the_page_of_evaluation_has_every_benchmark_and_scorer():
    from univg_jax.evaluation.benchmark import open_benchmark
    from univg_jax.evaluation.benchmarks import BENCHMARKS
    from univg_jax.evaluation.official import Official
    from univg_jax.evaluation.scorers.opening import OPENERS

    lines = (ROOT / "docs" / "evaluation.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    for name in BENCHMARKS:
        (row,) = [row for row in rows if re.search(rf"`{name}[:`]", row.split("|")[1])]
        bench = open_benchmark(name)
        if isinstance(bench, Official) and "SET" not in row:
            assert f"| {bench.primary} |" in row, row
            assert all(need in row for need in bench.needs), row
    for name in OPENERS:
        assert any(f"`{name}`" in row for row in rows), name
