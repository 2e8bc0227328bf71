"""Trees and the names of their leaves."""

from hypothesis import given
from hypothesis import strategies as st

from univg_jax import trees

KEYS = st.text("abcdef_", min_size=1)
NESTED = st.recursive(st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1))


@given(st.dictionaries(KEYS, NESTED))
def test_nesting_undoes_the_naming_of_leaves(tree):
    assert trees.nest(trees.named_leaves(tree)) == tree


def test_names_of_lists_and_dicts():
    tree = {"blocks": [{"kernel": 1}, {"kernel": 2}], "out": 3}
    assert trees.named_leaves(tree) == {"blocks/0/kernel": 1, "blocks/1/kernel": 2, "out": 3}
    named = trees.map_named(lambda name, leaf: f"{name}={leaf}", tree)
    assert named == {
        "blocks": [{"kernel": "blocks/0/kernel=1"}, {"kernel": "blocks/1/kernel=2"}],
        "out": "out=3",
    }


def test_flat_configs_keep_empty_groups():
    assert trees.flatten({"a": {"b": 1, "c": {}}, "d": (2,)}) == {"a.b": 1, "a.c": {}, "d": (2,)}
    assert trees.flatten({}) == {}
