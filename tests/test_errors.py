import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax import errors
from univg_jax.errors import UserError, check_name, suggestion


def test_a_known_name_is_returned():
    assert check_name("b", {"a": 1, "b": 2}, what="letter") == "b"


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        (
            "dept",
            ("t2i", "depth"),
            "unknown task 'dept'; did you mean 'depth'? (known: t2i, depth)",
        ),
        ("vae", {"linear": None}, "unknown task 'vae' (known: linear)"),
        (None, ["t2i"], "unknown task None (known: t2i)"),
        ("t2i", [], "unknown task 't2i' (known: none)"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, names, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_name(name, names, what="task")


def test_a_long_list_is_left_out():
    assert (
        suggestion("dept", ["depth", *(f"key{i}" for i in range(100))]) == "; did you mean 'depth'?"
    )


KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, UserError)]


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.text(max_size=9), min_size=1))
def test_a_message_is_one_line(kind, parts):
    for end in ("\n", "\r\n", "\x1b", "\x85", "\u2028", "\0"):
        error = kind(f"a {end.join(parts)} z")
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable() or not "".join(parts).isprintable()
        assert isinstance(error, UserError)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind("a: 'b  c' d")) == "a: 'b  c' d"
