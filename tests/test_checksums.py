"""The list of checksums of a folder."""

import json

import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from univg_jax import checksums
from univg_jax.errors import UserError
from univg_jax.files import write_sealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
fuzz = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").write_text("abc")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("")
    root = epath.Path(tmp_path)
    checksums.write(root, checksums.checksums(root, checksums.list_files(root)))
    return root


def test_the_sum_of_a_file_is_that_of_its_content(folder):
    assert checksums.checksum(folder / "a") == checksums.checksum_of(b"abc")
    assert checksums.read(folder)["a"] == "xxh3_128:06b05ab6733a618578af5f94892f3950"
    assert checksums.find_problems(folder) == ()


def test_every_bit_of_the_list_counts(folder):
    file = folder / checksums.FILE
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            file.write_bytes(bytes(changed))
            with pytest.raises(UserError, match=r"checksums\.json"):
                checksums.read(folder)


@given(value=st.dictionaries(st.text(max_size=9), VALUES), sealed=st.booleans())
@fuzz
def test_whatever_a_list_of_checksums_says_it_is_read_or_named(folder, value, sealed):
    if sealed:
        write_sealed(folder / checksums.FILE, {"files": value})
    else:
        (folder / checksums.FILE).write_text(json.dumps(value))
    for problem in checksums.find_problems(folder):
        assert "\n" not in problem.encode("unicode_escape").decode()
        assert checksums.FILE in problem or "is missing" in problem or "cannot be read" in problem


@pytest.mark.parametrize(
    "name", ["../a", "b/../../a", "/etc/passwd", "gs://b/a", "b//c", "./a", ""]
)
def test_a_name_of_a_file_elsewhere_is_damage(folder, name):
    checksums.write(folder, {name: checksums.checksum_of(b"abc")})
    with pytest.raises(UserError, match="is no file in its folder"):
        checksums.read(folder)


@given(content=st.binary(max_size=200))
@fuzz
def test_whatever_bytes_a_list_has_it_is_read_or_named(folder, content):
    (folder / checksums.FILE).write_bytes(content)
    assert all(checksums.FILE in problem for problem in checksums.find_problems(folder))
