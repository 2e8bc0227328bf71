"""Labels are drawn where they are, in their own colors; what does not count is hatched."""

import numpy as np

from data_pipelines import drawings
from data_pipelines.drawings import SIDE, color

GRAY = np.full((40, 80, 3), 90, np.uint8)  # drawn at 6 pixels a pixel
SCALE = SIDE // 80


def draw(**labels) -> np.ndarray:
    return drawings.draw_record(dict(image=GRAY, **labels)).astype(int)


def changed(**labels) -> np.ndarray:
    """Where labels are drawn, at the record's size: a pixel of it is all drawn on, or in part."""
    drawn = (draw(**labels) != 90).any(-1)
    return drawn.reshape(40, SCALE, 80, SCALE).any(axis=(1, 3))


def test_a_record_without_labels_is_its_picture_enlarged():
    drawn = draw()
    assert drawn.shape == (SIDE // 2, SIDE, 3)
    assert (drawn == 90).all()
    tall = drawings.draw_record(dict(image=np.zeros((1000, 10, 3), np.uint8)))
    assert tall.shape == (SIDE, 5, 3)


def test_masks_are_tinted_each_in_its_color():
    masks = np.zeros((2, 40, 80), np.uint8)
    masks[0, 5:20, 10:30] = masks[1, 5:20, 50:70] = 1
    drawn = draw(masks=masks)
    for k, column in enumerate((20, 60)):
        expected = 0.6 * 90 + 0.4 * np.array(color(k))
        np.testing.assert_allclose(drawn[12 * SCALE, column * SCALE], expected, atol=1)
    near = np.pad(masks.any(0)[1:-1, 1:-1], 1)
    assert not changed(masks=masks)[~(near | np.roll(near, (1, 1), (0, 1)))].all()
    assert changed(masks=masks)[near].all()


def test_boxes_are_outlined_and_numbered_in_the_order_of_their_phrases():
    boxes = np.float32([[0.125, 0.25, 0.375, 0.75], [0.5, 0.25, 0.75, 0.75]])
    drawn = draw(boxes=boxes)
    for k, right in enumerate((30, 60)):
        np.testing.assert_array_equal(drawn[20 * SCALE, right * SCALE - 1], color(k))
    assert (drawn[25 * SCALE, 20 * SCALE] == 90).all()  # inside
    corners = [drawn[10 * SCALE :, x * SCALE :][:16, :12] for x in (10, 40)]
    assert all((corner == color(k)).all(-1).mean() > 0.3 for k, corner in enumerate(corners))
    assert (corners[0] == corners[1]).all(-1).mean() < 0.5  # another number in another color


def test_a_box_at_the_edge_keeps_its_number_inside():
    drawn = draw(boxes=np.float32([[0.99, 0.99, 1, 1]]))
    assert ((drawn == color(0)).all(-1)).sum() > 50


def test_joints_that_are_hidden_look_unlike_those_that_are_seen():
    joints = np.zeros((1, 17, 3), np.float32)
    joints[0, 5] = 0.25, 0.5, 2
    joints[0, 6] = 0.75, 0.5, 1
    drawn = draw(joints=joints)
    np.testing.assert_array_equal(drawn[20 * SCALE, 20 * SCALE], color(0))
    assert drawn[20 * SCALE, 60 * SCALE].max() < 40
    assert not changed(joints=joints)[:15].any()  # a joint without a label is nowhere
    nobody = np.zeros((0, 17, 3), np.float32)
    assert not changed(joints=nobody).any()


def test_people_have_colors_of_their_own():
    joints = np.zeros((2, 17, 3), np.float32)
    joints[0, 0], joints[1, 0] = (0.25, 0.5, 2), (0.75, 0.5, 2)
    drawn = draw(joints=joints)
    for k, column in enumerate((20, 60)):
        np.testing.assert_array_equal(drawn[20 * SCALE, column * SCALE], color(k))


def test_the_edit_is_outlined_and_what_is_ignored_is_hatched():
    left = np.zeros((40, 80), np.uint8)
    left[:, :40] = 1
    assert changed(ignore_mask=left)[:, :40].all()
    assert not changed(ignore_mask=left)[:, 40:].any()
    outline = changed(edit_mask=left)
    assert outline[:, 39].all()
    assert not outline[5:35, 5:35].any()


def test_a_target_is_hatched_where_it_does_not_count():
    target = np.full((8, 8, 3), 200, np.uint8)
    assert drawings.draw_target(target, None) is target
    loss_mask = np.ones((8, 8, 1), np.uint8)
    loss_mask[:, 4:] = 0
    drawn = drawings.draw_target(target, loss_mask)
    assert (drawn[:, : drawn.shape[1] // 2] == 200).all()
    hatched = drawn[:, drawn.shape[1] // 2 :]
    assert (hatched != 200).any(-1).all()
    assert len(np.unique(hatched[..., 0])) == 2  # stripes


def test_what_is_large_is_shrunk_for_the_page():
    assert drawings.shrink(np.zeros((1000, 500, 3), np.uint8)).shape == (
        drawings.MODEL_SIDE,
        192,
        3,
    )
    assert drawings.shrink(GRAY) is GRAY
