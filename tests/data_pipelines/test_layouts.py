"""Named boxes as a canvas of colored blocks."""

import numpy as np
import pytest

from data_pipelines import layouts
from data_pipelines.renderings import GRAY, PALETTE
from univg_jax.errors import UserError

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def draw(prompt, *boxes):
    prompt, canvas = layouts.draw(prompt, boxes, height=4, width=8)
    return prompt, [tuple(map(int, canvas[2, x])) for x in (1, 6)]


def test_a_block_has_the_color_that_the_prompt_names_behind_it():
    prompt = "a pig (green block) beside an apple (red block)"
    assert draw(prompt, ("an apple", LEFT), ("a pig", RIGHT)) == (
        prompt,
        [PALETTE["red"], PALETTE["green"]],
    )


def test_a_color_may_be_the_name():
    prompt = "two pigs (blue and red blocks)"
    assert draw(prompt, ("red", LEFT), ("Blue", RIGHT))[1] == [PALETTE["red"], PALETTE["blue"]]
    assert draw(prompt, ("two pigs", LEFT), ("two pigs", RIGHT))[1] == [
        PALETTE["blue"],
        PALETTE["red"],
    ]


def test_a_block_without_a_color_gets_one_that_is_free():
    prompt, colors = draw(
        "a red pig (red block), a cat and a dog", ("a dog", LEFT), ("a cat", RIGHT)
    )
    assert prompt == "a red pig (red block), a cat (green block) and a dog (blue block)"
    assert colors == [PALETTE["blue"], PALETTE["green"]]


def test_nothing_stands_beside_the_boxes():
    _, canvas = layouts.draw("a pig", [("a pig", LEFT)], height=4, width=8)
    assert (canvas[:, 4:] == GRAY).all()


@pytest.mark.parametrize(
    ("prompt", "boxes", "message"),
    [
        ("a pig", [("a dog", LEFT)], "boxes: 'a dog' does not stand in the prompt 'a pig'"),
        ("a pig", [("red", LEFT)], "boxes: 'red' does not stand in the prompt"),
        ("a pig (redd block)", [("a pig", LEFT)], "unknown color 'redd'; did you mean 'red'?"),
        ("a pig (red block)", [("a pig", LEFT)] * 2, "names 1 blocks behind 'a pig'"),
        ("a pig", [("a pig", (0.5, 0, 0.5, 1))], "boxes[0]=('a pig', (0.5, 0, 0.5, 1)): expected"),
        ("a pig", [("a pig", (0, 0, 32, 32))], "in fractions of the picture from 0 to 1"),
        ("a pig", [("a pig", (0, 0, float("nan"), 1))], "in fractions of the picture"),
        ("a pig", [("a pig", "here")], "expected (name, (left, top, right, bottom))"),
        ("a pig", [("a pig", LEFT), 7], "boxes[1]=7: expected (name,"),
        ("a pig", [("", LEFT)], "expected a name from the prompt"),
        ("a pig", [], "boxes: expected one at least"),
        ("a pig " * 9, [("a pig", LEFT)] * 9, "boxes: expected at most 8, as there are colors"),
    ],
)
def test_what_cannot_be_drawn_is_said(prompt, boxes, message):
    with pytest.raises(UserError) as error:
        layouts.draw(prompt, boxes, height=4, width=8)
    assert message in str(error.value)


def test_the_form_is_that_of_training():
    """What `make_layout` writes, `draw` reads."""
    rng = np.random.default_rng(0)
    from data_pipelines.examples import make_layout

    record = dict(
        image=np.zeros((8, 8, 3), np.uint8),
        caption="a pig and an apple on grass",
        boxes=np.float32([LEFT, RIGHT]),
        phrases=["a pig", "an apple"],
    )
    made = make_layout(record, rng)
    boxes = [("a pig", LEFT), ("an apple", RIGHT)]
    prompt, canvas = layouts.draw(made.text, boxes, height=8, width=8)
    assert prompt == made.text
    np.testing.assert_array_equal(canvas, made.source)
