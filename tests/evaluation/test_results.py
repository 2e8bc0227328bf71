"""What is kept is what was written, or is refused by name; evaluations do not overwrite others."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.results import FILE, Results, find

RESULTS = Results(
    benchmark="toy",
    settings={"step": 3, "guidance": {"t2i": {"text": 2.5}}},
    provenance={"date": "2026-01-01"},
    tasks={"ie": {"examples": 8}},
)


def test_what_was_written_is_read(tmp_path):
    RESULTS.write(tmp_path)
    assert Results.read(tmp_path) == RESULTS
    folder, found, others = find(tmp_path)
    assert (folder, found, others) == (tmp_path, RESULTS, [])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_change_of_the_file_is_found_and_named(tmp_path, data):
    RESULTS.write(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    if data.draw(st.booleans(), "torn"):
        content = content[: data.draw(st.integers(0, len(content) - 3))]
    else:
        content[data.draw(st.integers(0, len(content) - 2))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / FILE).write_bytes(content)
    with contextlib.suppress(NamedError):
        assert read(tmp_path) == RESULTS, "only white space may have changed"


class NamedError(Exception):
    """A UserError that names the file."""


def read(folder):
    try:
        return Results.read(folder)
    except UserError as error:
        raise (NamedError if str(folder / FILE) in str(error) else AssertionError) from error


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[]", "is not a JSON object, but a list"),
        ("{}", "is not the results of an evaluation"),
        ('{"settings": {}, "tasks": {}}', "is of another version of univg_jax: evaluate again"),
    ],
)
def test_another_file_is_refused(tmp_path, content, line):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=line):
        Results.read(tmp_path)
    with pytest.raises(UserError, match=line):
        find(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"results\.json is missing: `univg evaluate`"):
        find(tmp_path)


def test_settings_name_the_folder_and_provenance_does_not(tmp_path):
    folders = {
        Results(benchmark=name, settings=settings, provenance=made).folder(tmp_path)
        for name, settings, made in (
            ("toy", {"step": 3}, {}),
            ("toy", {"step": 3}, {"date": "2026"}),
            ("toy", {"step": 4}, {}),
            ("other", {"step": 3}, {}),
        )
    }
    assert len(folders) == 3
