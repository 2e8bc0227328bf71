"""MiniLM with its real weights, against activations of PyTorch's BertModel kept in
minilm_reference.npz.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.tokenizer import load_tokenizer
from univg_jax.errors import UserError
from univg_jax.interop.transformers import load_minilm
from univg_jax.models.minilm import MiniLM, pool
from univg_jax.pretrained import pretrained_folder

REFERENCE = Path(__file__).with_name("minilm_reference.npz")


@pytest.fixture(scope="module")
def embed():
    module, params = load_minilm(pretrained_folder("minilm"))
    return jax.jit(lambda tokens, mask: module.apply({"params": params}, tokens, mask))


def test_equals_the_pytorch_model(embed):
    ref = np.load(REFERENCE)
    tokens, mask = jnp.asarray(ref["tokens"]), jnp.asarray(ref["text_mask"])
    text_emb = embed(tokens, mask)
    std = ref["text_emb"].std()
    error = np.abs(np.asarray(text_emb)[..., ::24] - ref["text_emb"])[ref["text_mask"]]
    # 2e-5 of the output's std: float32 sums in another order, through six layers.
    assert error.max() <= 2e-5 * std
    # unit vectors: entries are ~0.05
    np.testing.assert_allclose(pool(text_emb, mask), ref["pooled"], atol=1e-6)


def test_padding_has_no_influence(embed):
    tokenizer = load_tokenizer()
    short, long = (tokenizer("<t2i> two green apples", m) for m in (12, 20))
    a = embed(jnp.asarray(short.tokens)[None], jnp.asarray(short.text_mask)[None])[0]
    # other pads, and more of them
    junk = jnp.where(jnp.asarray(long.text_mask), jnp.asarray(long.tokens), 1234)
    b = embed(junk[None], jnp.asarray(long.text_mask)[None])[0]
    n = short.text_mask.sum()
    # entries of order 0.5; another reduction length
    np.testing.assert_allclose(a[:n], b[:n], atol=2e-5)


def test_pooled_similarity_follows_meaning(embed):
    tokenizer = load_tokenizer()
    texts = [
        "a red car on the road",
        "a crimson automobile in the street",
        "a bowl of vegetable soup",
    ]
    rows = [tokenizer(t, 16) for t in texts]
    tokens = jnp.stack([jnp.asarray(r.tokens) for r in rows])
    mask = jnp.stack([jnp.asarray(r.text_mask) for r in rows])
    e = pool(embed(tokens, mask), mask)
    # float32 norm of 384 entries
    np.testing.assert_allclose(jnp.linalg.norm(e, axis=-1), 1, rtol=1e-5)
    assert e[0] @ e[1] > 0.6 > 0.2 > e[0] @ e[2]  # PyTorch gives 0.76 and 0.05


def test_pool_of_no_tokens_is_finite():
    assert np.isfinite(pool(jnp.zeros((1, 3, 8)), jnp.zeros((1, 3), bool))).all()


def test_compute_dtype_is_a_field():
    model = MiniLM(vocab_size=50, hidden_dim=16, depth=2, num_heads=2, mlp_dim=32, max_tokens=8)
    tokens, mask = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.ones((2, 6), bool)
    params = model.init(jax.random.key(0), tokens, mask)["params"]
    full = model.apply({"params": params}, tokens, mask)
    half = model.clone(dtype=jnp.bfloat16).apply({"params": params}, tokens, mask)
    assert half.dtype == jnp.bfloat16
    # Outputs are normalized to about 1; bfloat16 has 8 bits, and errors add up over two blocks.
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.1)


def test_too_many_tokens():
    model = MiniLM(vocab_size=50, hidden_dim=16, depth=1, num_heads=2, mlp_dim=32, max_tokens=8)
    with pytest.raises(UserError, match="9 text tokens, but MiniLM has 8 positions"):
        model.init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32), jnp.ones((1, 9), bool))
