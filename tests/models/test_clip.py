"""CLIP's towers beside their parity with transformers (tests/interop/test_encoders.py)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from univg_jax.errors import UserError
from univg_jax.models.clip import MEAN, STD, CLIPText, CLIPVision, preprocess

SIZES = dict(hidden_dim=16, depth=3, num_heads=2, mlp_dim=32, projection_dim=6)
TEXT = CLIPText(vocab_size=50, max_tokens=8, eos_token_id=49, **SIZES)
VISION = CLIPVision(image_size=8, patch_size=4, **SIZES)
TOKENS = np.array([[7, 3, 9, 49, 0, 0], [5, 49, 11, 12, 49, 8]], np.int32)


def init(module, *inputs):
    """Random parameters, zeros and ones of the initial ones included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (0.5 * rng.normal(size=s.shape)).astype(s.dtype), shapes)


@pytest.fixture(scope="module")
def text_params():
    return init(TEXT, TOKENS)


def run(module, params, *inputs):
    return jax.jit(lambda p, x: module.apply({"params": p}, *x))(params, inputs)


def num_params(module, x):
    return sum(
        math.prod(s.shape)
        for s in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    )


def test_defaults_are_the_published_network():
    """427,616,513 parameters of openai/clip-vit-large-patch14, one of them the temperature."""
    towers = num_params(CLIPText(), TOKENS) + num_params(CLIPVision(), jnp.zeros((1, 14, 14, 3)))
    assert towers + 1 == 427_616_513


def test_states_do_not_depend_on_what_follows(text_params):
    a = run(TEXT, text_params, TOKENS)
    b = run(TEXT, text_params, np.where(np.arange(6)[None] < 4, TOKENS, 33).astype(np.int32))
    np.testing.assert_array_equal(a.last_hidden[:, :4], b.last_hidden[:, :4])
    assert np.abs(a.last_hidden[:, 4:] - b.last_hidden[:, 4:]).max() > 0.1


def test_masked_tokens_have_no_influence(text_params):
    mask = np.arange(6)[None] != np.array([[0], [2]])
    a = run(TEXT, text_params, TOKENS, mask)
    b = run(TEXT, text_params, np.where(mask, TOKENS, 33).astype(np.int32), mask)
    np.testing.assert_array_equal(a.last_hidden[mask], b.last_hidden[mask])
    assert np.abs(a.last_hidden - run(TEXT, text_params, TOKENS).last_hidden)[mask].max() > 0.1


@pytest.mark.parametrize(
    ("eos_token_id", "ends"), [(49, [3, 1]), (2, [3, 1]), (0, [4, 0]), (8, [0, 5])]
)
def test_the_end_token(text_params, eos_token_id, ends):
    """The first of its id; for id 2 the first of the largest id; without any, the first token."""
    out = run(TEXT.clone(eos_token_id=eos_token_id), text_params, TOKENS)
    np.testing.assert_array_equal(out.pooled, out.last_hidden[jnp.arange(2), jnp.array(ends)])
    np.testing.assert_allclose(
        out.projected, out.pooled @ text_params["projection"]["kernel"], rtol=1e-5, atol=1e-5
    )


def test_remat_changes_nothing_but_memory(text_params):
    def gradients(module):
        return jax.jit(
            jax.grad(lambda p: jnp.sum(module.apply({"params": p}, TOKENS).projected ** 2))
        )(text_params)

    plain, remat = gradients(TEXT), gradients(TEXT.clone(remat=True))
    # Gradients of the keys' biases are rounding errors alone, so all are measured by the largest.
    largest = max(np.abs(g).max() for g in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), remat, plain)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (TEXT, TOKENS),
        (VISION, np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)),
    ],
)
def test_compute_dtype_is_a_field(module, x):
    params = init(module, x)
    full, half = run(module, params, x), run(module.clone(dtype=jnp.bfloat16), params, x)
    for field in dataclasses.fields(full):
        a, b = getattr(full, field.name), getattr(half, field.name)
        assert b.dtype == jnp.bfloat16
        error = np.abs(a - b.astype(jnp.float32)).max() / a.std()
        assert error < 0.15, field.name  # bfloat16 has 8 bits, and errors add up over three blocks


def test_impossible_inputs_and_fields():
    def refuses(module, x, message):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), x)

    refuses(TEXT, np.zeros((1, 9), np.int32), "9 text tokens, but CLIP has 8 positions")
    refuses(TEXT.clone(num_heads=3), TOKENS, "hidden_dim 16 is not a multiple of num_heads 3")
    refuses(
        TEXT.clone(activation="quick"),
        TOKENS,
        "unknown activation 'quick'; did you mean 'quick_gelu'",
    )
    refuses(
        VISION,
        np.zeros((1, 8, 10, 3), np.float32),
        "image of 8 x 10 px: both sides must be a multiple",
    )


@pytest.mark.parametrize("shape", [(50, 37), (37, 50), (20, 20), (24, 90)])
def test_preprocess_is_pillows_bicubic_and_a_central_crop(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image[5:15, 5:15] = 255  # an edge, where bicubic interpolation overshoots
    size = 24
    h, w = (size * side // min(shape) for side in shape)
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = (h - size) // 2, (w - size) // 2
    want = resized[top : top + size, left : left + size]
    got = (
        preprocess(image[None], size=size)[0] * np.float32(STD)[None, None]
        + np.float32(MEAN)[None, None]
    )
    assert np.abs(255 * got - want).max() < 1.01  # one level: Pillow's weights are integers
