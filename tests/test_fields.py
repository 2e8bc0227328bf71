"""Every setting says what it means and may be, and everything else is refused in one line."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.datasets import DATASETS
from univg_jax import configs, fields, settings
from univg_jax.encoders.kinds import KINDS
from univg_jax.errors import UserError
from univg_jax.models.mmdit import MMDiT
from univg_jax.settings import Config

SETTINGS = dict(fields.leaves(Config))
# What a config passes on to others, which have settings of their own.
OPTIONS = {
    "model.overrides": MMDiT,
    **{f"dataset {name}": dataset.options for name, dataset in DATASETS.items()},
    **{f"{role} {name}": k.options for role, kinds in KINDS.items() for name, k in kinds.items()},
}


def arms(kind: Any) -> tuple:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def is_numeric(field: dataclasses.Field) -> bool:
    return bool({int, float} & set(arms(field.type)))


def numbers(kind: Any) -> bool:
    """Whether a type is a number, or has numbers in it."""
    return kind in (int, float) or any(numbers(arm) for arm in get_args(kind))


def all_settings() -> list[tuple[str, dataclasses.Field]]:
    inside = [
        (f"{where}: {field.name}", field)
        for where, cls in OPTIONS.items()
        for field in fields.settings_of(cls)
    ]
    return [*SETTINGS.items(), *inside]


@pytest.mark.parametrize(("name", "field"), all_settings(), ids=lambda x: str(x)[:40])
def test_every_setting_has_its_meaning_and_every_number_its_range_and_unit(name, field):
    rule = fields.rule_of(field)
    assert rule.help, name
    if is_numeric(field):
        assert rule.range or name == "flow.mean", name
    if is_numeric(field) and NoneType in arms(field.type):
        assert rule.none, f"{name} says what None means"
    assert bool(rule.unit) == numbers(field.type), f"{name}: a number has a unit, nothing else has"


def with_value(name: str, value: Any) -> Config:
    """The default config but for one setting."""
    values = Config().to_dict()
    *parents, leaf = (
        name.replace("tasks.*", "tasks.t2i").replace("guidance.*", "guidance.t2i").split(".")
    )
    node = values
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return Config.of(values)


def value_of(config: Config, name: str) -> Any:
    node: Any = config
    for key in (
        name.replace("tasks.*", "tasks.t2i").replace("guidance.*", "guidance.t2i").split(".")
    ):
        node = node[key] if isinstance(node, Mapping) else getattr(node, key)
    return node


def outcome(make: Callable[[], Any]) -> Any:
    """What `make` makes, or the error that refuses it, which is one short line."""
    try:
        return make()
    except UserError as error:
        refused = error
    message = str(refused)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return refused


def assert_refused_or_in_range(made: Any, value: Any, field: dataclasses.Field) -> None:
    """The law: a value of the field's type and range, or a line that names the field."""
    if isinstance(made, UserError):
        assert field.name in str(made)
    elif made is None:
        assert NoneType in arms(field.type)
    else:
        kind = int if int in arms(field.type) else float
        assert type(made) is kind
        assert math.isfinite(made)
        assert fields.rule_of(field).allows(made)
        assert made == kind(value)


NUMERIC = {name: field for name, field in SETTINGS.items() if is_numeric(field)}
WRONG = (0, -1, math.nan, math.inf, -math.inf, "word", "", None, True, [], {}, 10**400, "x" * 9999)


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("value", WRONG, ids=lambda v: repr(v)[:12])
def test_a_number_is_in_its_range_or_refused(name, value):
    made = outcome(lambda: value_of(with_value(name, value), name))
    assert_refused_or_in_range(made, value, NUMERIC[name])
    if isinstance(value, bool | str | list | dict) or value in (math.inf, -math.inf):
        assert isinstance(made, UserError)


@pytest.mark.parametrize("name", NUMERIC)
@given(value=st.one_of(st.integers(), st.floats(), st.none(), st.booleans(), st.text()))
def test_any_value_is_in_range_or_refused(name, value):
    field = NUMERIC[name]
    made = outcome(lambda: fields.read(field.type, value, name, fields.rule_of(field)))
    assert_refused_or_in_range(made, value, field)


@pytest.mark.parametrize("name", [n for n in NUMERIC if "*" not in n])
@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "word", "None", "True", "", "1e400"])
def test_an_override_is_in_its_range_or_refused(name, text):
    made = outcome(lambda: value_of(configs.load("base", [f"{name}={text}"]), name))
    assert_refused_or_in_range(made, text, NUMERIC[name])


@pytest.mark.parametrize(("where", "cls"), OPTIONS.items(), ids=list(OPTIONS))
@pytest.mark.parametrize("value", ["wide", -1, 0, math.nan, None, True, 2.5, 1e4])
def test_options_are_in_their_range_or_refused(where, cls, value):
    for field in fields.settings_of(cls):
        if is_numeric(field):
            made = outcome(lambda n=field.name: fields.read_fields(cls, {n: value}, where)[n])
            assert_refused_or_in_range(made, value, field)


def test_a_whole_number_may_be_written_as_a_float():
    assert with_value("train.steps", 1e4).train.steps == 10_000
    with pytest.raises(UserError, match=r"^train\.steps=1\.5: expected a whole number >= 1"):
        with_value("train.steps", 1.5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [None, 3, "text", [1, "a"], {"a": "b"}, {"a": {}}, b"bytes"])
def test_no_value_of_another_kind_is_more_than_one_line(name, value):
    made = outcome(lambda: with_value(name, value))
    assert isinstance(made, Config | UserError)


@pytest.mark.parametrize("section", [f.name for f in dataclasses.fields(Config)])
@pytest.mark.parametrize("value", [None, 3, "text", ["a"], True])
def test_a_section_that_is_none_is_one_line(section, value):
    if section in ("name", "seed"):
        return
    with pytest.raises(UserError, match=f"^{section}=.*: expected a group of"):
        Config.of({section: value})


def test_paths_in_the_home_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = Config.of(
        dict(
            data=dict(dir="~/data", text_cache="~/cache"),
            conditioning=dict(folder="~/sd3"),
            init_from=dict(path="~/stage1"),
            tasks=dict(t2i=dict(weight=1, sources=["~/pairs", "scenes"])),
        )
    )
    assert (config.data.dir, config.data.text_cache) == ("/home/me/data", "/home/me/cache")
    assert (config.conditioning.folder, config.init_from.path) == (
        "/home/me/sd3",
        "/home/me/stage1",
    )
    assert config.tasks["t2i"].sources == ("/home/me/pairs", "scenes")
    weighed = Config.of(dict(tasks=dict(t2i=dict(weight=1, sources={"~/pairs": 2}))))
    assert weighed.tasks["t2i"].sources == {"/home/me/pairs": 2.0}
    assert Config.of(dict(data=dict(dir="gs://b/~/data"))).data.dir == "gs://b/~/data"
    with pytest.raises(UserError, match=r"data.dir=s3://b: expected a local path or gs://, not s3"):
        Config.of(dict(data=dict(dir="s3://b")))


def test_paths_are_the_settings_that_name_files():
    named = {name for name, field in SETTINGS.items() if fields.rule_of(field).is_path}
    assert named == {
        "data.dir",
        "data.text_cache",
        "data.latent_cache",
        "conditioning.folder",
        "conditioning.fit_on",
        "init_from.path",
        "tasks.*.sources",
    }


def test_settings_are_documented_where_they_stand():
    assert fields.describe(float, fields.rule_of(SETTINGS["optim.ema"])) == (
        "a finite number >= 0 and < 1"
    )
    assert fields.describe(SETTINGS["train.keep"].type, fields.rule_of(SETTINGS["train.keep"])) == (
        "a whole number >= 1 or None (all)"
    )
    assert settings.Train().keep == 3
