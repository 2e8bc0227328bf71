"""Config files, their arguments and overrides, and what a typo gets."""

import pytest

from univg_jax import configs
from univg_jax.errors import UserError


def test_arguments_are_those_of_get_config():
    c = configs.load("experiments/stage1_t2i.py:size=l,res=512")
    assert c.model.size == "l"
    assert c.data.resolution == 512


def test_overrides_keep_the_type_of_the_default():
    c = configs.load(
        "experiments/base.py",
        [
            "optim.lr=1",
            "optim.freeze=('a', 'b')",
            "seed=7",
            "name=x",
            "sampling.interval=(0.1, 0.9)",
        ],
    )
    assert (c.optim.lr, type(c.optim.lr)) == (1.0, float)
    assert c.optim.freeze == ("a", "b")
    assert c.seed == 7
    assert c.name == "x"
    assert c.sampling.interval == (0.1, 0.9)


def test_fields_of_the_model_may_be_added():
    c = configs.load(
        "experiments/base.py", ["model.overrides.depth=4", "model.overrides.remat=full"]
    )
    assert c.model.overrides == {"depth": 4, "remat": "full"}


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        (
            "experiments/stage1.py",
            [],
            "config file 'experiments/stage1.py' does not exist; did you mean 'experiments/",
        ),
        ("experiments/emoji.py:stag=1", [], "takes no argument 'stag'; did you mean 'stage'?"),
        ("experiments/emoji.py:stage=x", [], "emoji.py:stage='x': expected a whole number"),
        (
            "experiments/emoji.py:preset=smok",
            [],
            "preset='smok' is not one of smoke, quickstart, long",
        ),
        (
            "experiments/base.py",
            ["optim.lrate=1"],
            "unknown config key 'optim.lrate'; did you mean 'optim.lr'?",
        ),
        ("experiments/base.py", ["lr=1"], "unknown config key 'lr'; did you mean 'optim.lr'?"),
        ("experiments/base.py", ["optim.lr.x=1"], "unknown config key 'optim.lr.x'"),
        ("experiments/base.py", ["optim=1"], "--config.optim is a group; set one of optim."),
        (
            "experiments/base.py",
            ["optim.lr=fast"],
            "optim.lr='fast': expected a finite number >= 0",
        ),
        (
            "experiments/base.py",
            ["train.steps=1.5"],
            "train.steps=1.5: expected a whole number >= 1",
        ),
        ("experiments/base.py", ["seed"], "--config.seed has no value"),
        ("experiments/base.py", ["model.overrides.hidden_dim"], "has no value"),
        ("emoj:stage=1", [], "config 'emoj' does not exist; did you mean 'emoji'?"),
        ("elsewhere/emoji.py", [], "does not exist here; 'emoji' alone names ours"),
        ("os.path", [], "config 'os.path' defines no get_config()"),
        ("nowhere.json", [], "nowhere.json does not exist"),
        ("nowhere.json:a=1", [], "takes no arguments after the colon"),
    ],
)
def test_bad_input_is_one_clear_line(spec, overrides, message):
    with pytest.raises(UserError) as error:
        configs.load(spec, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["emoji", "experiments.emoji"])
def test_ours_are_found_by_name_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = configs.load(f"{name}:stage=2,preset=smoke", ["train.steps=7"])
    assert (config.name, config.train.steps) == ("emoji_smoke_stage2", 7)


def test_a_config_in_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from experiments.base import get_config\n")
    assert configs.load("~/mine.py").name == "base"


FAULTS = {
    "def get_config(:\n": "mine.py line 1: SyntaxError: invalid syntax",
    "import nowhere_at_all\n": "mine.py line 1: ModuleNotFoundError: No module",
    "x = 1\n": "defines no get_config()",
    "get_config = 3\n": "defines no get_config()",
    "def get_config():\n    return None\n": "gave None: expected a ConfigDict",
    "def get_config():\n    return {}['a\\nb']\n": "mine.py line 2: KeyError: 'a\\nb'",
    "def get_config():\n    import sys\n    sys.exit()\n": "mine.py line 3: SystemExit",
    "def get_config(size):\n    return None\n": "TypeError: get_config() missing",
    "def f():\n    1 / 0\n\ndef get_config():\n    f()\n": "mine.py line 2: ZeroDivisionError",
    "import helper\n": "helper.py line 1: NameError",
    "from experiments import base\ndef get_config():\n    c = base.get_config()\n"
    "    c.optm.lr = 1\n    return c\n": "mine.py line 4: AttributeError",
    "from experiments import base\ndef get_config():\n    c = base.get_config()\n"
    "    c.optim.lr = -1.0\n    return c\n": "optim.lr=-1.0: expected a finite number >= 0",
    "\0": "mine.py",
    "def f():\n    f()\nget_config = f\n": "mine.py line 2: RecursionError",
}


@pytest.mark.parametrize("text", FAULTS, ids=range(len(FAULTS)))
def test_what_a_users_file_raises_is_one_line_with_its_place(tmp_path, monkeypatch, text):
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "helper.py").write_text("undefined\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        configs.load(str(tmp_path / "mine.py"))
    assert FAULTS[text] in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"optim": {"lr": NaN}}', '{"tasks": {"t2i": 3}}']
)
def test_a_json_that_is_no_config_is_one_line(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError) as error:
        configs.load(str(tmp_path / "c.json"))
    assert "\n" not in str(error.value)


def test_an_encoder_may_be_a_kind_alone():
    c = configs.load("base", ["conditioning.codec=vae", "conditioning.identity=lda"])
    assert (c.conditioning.codec, c.conditioning.identity) == ("vae", "lda")
    assert configs.load("base", ["data.build.nouns=4"]).data.build["nouns"] == 4
    assert configs.load("base", ["name=12"]).name == "12"
    assert configs.load("base", ["tasks.t2i.sources=pairs"]).tasks["t2i"].sources == ("pairs",)
