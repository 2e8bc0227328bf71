import re

import pytest

from univg_jax.errors import check_name, suggestion


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
