"""Scorers by the command line's NAME=VALUE, checked before anything is made."""

import pytest

from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.scorers import PROTOCOLS
from univg_jax.evaluation.scorers.opening import OPENERS, open_scorers


def test_a_server_is_opened_with_its_options(tmp_path):
    spec = "http://localhost:8000/v1,model=Qwen3-VL,snapshot=2026-01-01,concurrency=4"
    found = open_scorers({"judge": spec, "vqa": spec}, answers=str(tmp_path))
    judge = found["judge"]
    assert (judge.url, judge.model, judge.concurrency) == (
        "http://localhost:8000/v1",
        "Qwen3-VL",
        4,
    )
    assert judge.cache == str(tmp_path)
    assert found["vqa"].digest == "Qwen3-VL 2026-01-01"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("klip", "x", "unknown scorer 'klip'; did you mean 'clip'"),
        (
            "clip",
            "DIR,preprocesing=hpsv2",
            "unknown option of --scorer=clip: 'preprocesing'; did y",
        ),
        ("judge", "http://localhost/v1", "needs the name of its model, http://localhost/v1,model="),
        ("judge", "localhost,model=a", "is no address of a server"),
        ("judge", "http://localhost,model=a,concurrency=many", "concurrency=many: expected a num"),
        ("inception", "FILE,convention=mine", "unknown convention of FID 'mine'"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, name, value, message):
    with pytest.raises(UserError, match=message):
        open_scorers({name: value}, answers=str(tmp_path))


@pytest.mark.parametrize(
    "name", ["clip", "color", "detect", "dino", "identify", "inception", "lpips"]
)
def test_a_missing_file_says_what_was_expected(tmp_path, name):
    with pytest.raises(NotFoundError) as error:
        open_scorers({name: str(tmp_path / "nothing")}, answers="")
    assert str(error.value).startswith(f"--scorer={name}: ")
    assert str(tmp_path / "nothing") in str(error.value)
    assert PROTOCOLS[name] in str(error.value)


def test_every_opener_is_a_protocol():
    assert set(OPENERS) <= set(PROTOCOLS)
