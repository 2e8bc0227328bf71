"""A form is checked like settings, and a link brings back the form that it was made of."""

import contextlib
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.tasks import TASKS
from univg_jax.errors import UserError
from univg_jax.serving.form import MAX_STEPS, Box, Form, fields_of
from univg_jax.settings import MAX_SEED, SOLVERS

fractions = st.floats(0, 1)
scales = st.none() | st.floats(0, 30)
VALUES = {
    "prompt": st.text(max_size=200),
    "negative_prompt": st.text(max_size=200),
    **dict.fromkeys(("image", "mask", "face"), st.text(max_size=30)),
    "margins": st.tuples(*[st.integers(0, 200)] * 4),
    "boxes": st.lists(
        st.builds(
            Box, name=st.text(max_size=20), **dict.fromkeys(("left", "top", "right"), fractions)
        ),
        max_size=8,
    ).map(tuple),
    **dict.fromkeys(("width", "height"), st.none() | st.integers(8, 2048)),
    **dict.fromkeys(("guidance", "image_guidance"), scales),
    "steps": st.none() | st.integers(1, MAX_STEPS),
    "solver": st.sampled_from((None, *SOLVERS)),
    "seed": st.integers(0, MAX_SEED),
}


@st.composite
def forms(draw):
    task = draw(st.sampled_from(tuple(TASKS)))
    given_ = draw(st.sets(st.sampled_from(fields_of(task)))) - {"task"}
    return Form.of({"task": task, **{name: draw(VALUES[name]) for name in sorted(given_)}})


@given(forms())
def test_a_link_brings_the_form_back(form):
    assert Form.of_query(dict(parse_qsl(form.query(), keep_blank_values=True))) == form


@given(st.dictionaries(st.sampled_from(fields_of("ip")), st.text(), min_size=1))
def test_what_a_link_says_is_a_form_or_one_readable_line(query):
    with contextlib.suppress(UserError):  # which is one line by its class
        assert Form.of_query({"task": "ip", **query}).task == "ip"


@pytest.mark.parametrize(
    ("query", "line"),
    [
        (dict(task="t2"), "unknown task 't2'; did you mean 't2i'?"),
        (
            dict(task="t2i", promt="a"),
            "unknown setting in the link: 'promt'; did you mean 'prompt'",
        ),
        (dict(task="t2i", image="a.png"), "unknown input of task 't2i': 'image'"),
        (dict(task="t2i", steps="1000"), "steps=1000: expected a whole number >= 1 and <= 200"),
        (dict(task="t2i", steps="many"), "steps='many': expected a whole number"),
        (dict(task="t2i", seed="-1"), "seed=-1: expected a whole number >= 0"),
        (dict(task="t2i", width="1000000"), "width=1000000: expected a whole number"),
        (dict(task="t2i", prompt="a" * 2001), "prompt has 2001 characters: expected at most 2000"),
        (dict(task="lg", boxes='[{"name": "a", "left": 2}]'), "boxes.left=2: expected a finite"),
        (dict(task="lg", boxes="[1]"), "boxes=1: expected"),
        (dict(prompt="a"), "has no task"),
    ],
)
def test_a_link_that_cannot_be_is_one_line(query, line):
    with pytest.raises(UserError) as error:
        Form.of_query(query)
    assert line in str(error.value)
