"""T5 folders -> `T5Encoder`: against transformers live (marker `parity`), by a stored reference
elsewhere.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import record_parity
from univg_jax.errors import UserError
from univg_jax.interop.transformers import WEIGHTS, load_t5
from univg_jax.sharding import make_mesh

REFERENCE = Path(__file__).parents[1] / "data" / "t5_reference.npz"
CONFIG = dict(
    model_type="t5",
    vocab_size=50,
    d_model=12,
    d_kv=5,
    d_ff=22,
    num_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    layer_norm_epsilon=1e-6,
    feed_forward_proj="gated-gelu",
)

# heads, head width, width, MLP width, layers, (position buckets, farthest), tokens, batch
CONFIGS = {
    "one-head": (1, 16, 16, 40, 2, (32, 128), 7, 2),
    "odd": (3, 7, 10, 13, 3, (32, 128), 9, 3),
    "one-layer": (2, 4, 24, 31, 1, (32, 128), 5, 1),
    "few-buckets": (2, 8, 20, 17, 2, (6, 11), 33, 2),
    "long": (12, 3, 40, 96, 4, (32, 128), 150, 2),
}


def tensors(config=CONFIG, seed=0) -> dict[str, np.ndarray]:
    """A folder's tensors by their names in transformers: attention and MLP active, logits of about
    unit variance.
    """
    d, f, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    shapes = {
        "shared.weight": (config["vocab_size"], d),
        "encoder.final_layer_norm.weight": (d,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            config["relative_attention_num_buckets"],
            config["num_heads"],
        ),
    }
    for i in range(config["num_layers"]):
        block = f"encoder.block.{i}.layer."
        shapes |= {f"{block}0.SelfAttention.{name}.weight": (inner, d) for name in "qkv"}
        shapes |= {f"{block}{j}.layer_norm.weight": (d,) for j in (0, 1)}
        shapes |= {f"{block}1.DenseReluDense.{name}.weight": (f, d) for name in ("wi_0", "wi_1")}
        shapes |= {
            f"{block}0.SelfAttention.o.weight": (d, inner),
            f"{block}1.DenseReluDense.wo.weight": (d, f),
        }
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def inputs(*, vocab_size=50, tokens=11, batch=3):
    """Token ids and a mask of prompts of several lengths, one of them full and one of one token."""
    rng = np.random.default_rng(1)
    lengths = np.array([tokens, 1, (tokens + 1) // 2])[:batch]
    ids = rng.integers(0, vocab_size, (batch, tokens)).astype(np.int32)
    return ids, np.arange(tokens)[None] < lengths[:, None]


@pytest.fixture
def folder(tmp_path):
    def write(config=None, weights=None):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        save_file(tensors() if weights is None else weights, tmp_path / WEIGHTS)
        return tmp_path

    return write


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def apply(module, params, ids, mask):
    return np.asarray(jax.jit(lambda p, i, m: module.apply({"params": p}, i, m))(params, ids, mask))


def test_equals_the_stored_activation(folder):
    """`t5_reference.npz` is the PyTorch encoder's output: see
    `test_the_stored_activation_is_current`.
    """
    want = np.load(REFERENCE)["output"]
    ids, mask = inputs()
    got = apply(*load_t5(folder()), ids, mask)
    # float32 sums in another order
    np.testing.assert_allclose(got[mask], want[mask], atol=2e-5 * want[mask].std())


def test_a_whole_model_gives_the_same_encoder(folder):
    _, params = load_t5(folder())
    rest = {
        "decoder.embed_tokens.weight": np.zeros((50, 12), np.float32),
        "decoder.block.0.layer.1.EncDecAttention.q.weight": np.ones((15, 12), np.float32),
        "lm_head.weight": np.ones((50, 12), np.float32),
    }
    assert_same_tree(load_t5(folder(weights=tensors() | rest))[1], params)


def test_the_encoder_reads_its_own_table_where_it_has_one(folder):
    _, params = load_t5(folder())
    table = tensors()["shared.weight"]
    untied = tensors() | {"shared.weight": table + 1, "encoder.embed_tokens.weight": table}
    assert_same_tree(load_t5(folder(weights=untied))[1], params)
    del untied["shared.weight"]
    assert_same_tree(load_t5(folder(weights=untied))[1], params)


def test_parts_load_onto_a_mesh(folder, tmp_path):
    config = dict(d_model=512, d_kv=64, num_heads=4, d_ff=520, num_layers=2)
    weights = tensors(CONFIG | config)
    _, params = load_t5(folder(config, weights))
    (tmp_path / WEIGHTS).unlink()
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for part, held in parts.items():
        save_file({name: weights[name] for name in held}, tmp_path / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    module, sharded = load_t5(
        tmp_path, param_dtype=jnp.bfloat16, mesh=make_mesh(data=1, fsdp=4, tensor=2)
    )
    assert_same_tree(sharded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    shard = lambda leaf: leaf.addressable_shards[0].data.shape  # noqa: E731
    assert shard(sharded["blocks"]["mlp"]["gate"]["kernel"]) == (2, 128, 260)
    assert shard(sharded["blocks"]["attn_out"]["kernel"]) == (2, 128, 128)
    ids, mask = inputs()
    got, want = apply(module, sharded, ids, mask), apply(module, jax.device_get(sharded), ids, mask)
    # outputs of about 0.04; sums over devices
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # it has positions in every layer
        (dict(model_type="umt5"), "expected model_type 't5', got 'umt5'"),
        (
            dict(feed_forward_proj="relu"),
            "feed_forward_proj is 'relu'; only 'gated-gelu'",
        ),
        (dict(feed_forward_proj="gated-silu"), "feed_forward_proj is 'gated-silu'"),
        (dict(num_layers=3), "missing: encoder.block.2.layer.0.SelfAttention.k.weight"),
        (dict(num_layers=1), "extra: encoder.block.1.layer.0.SelfAttention.k.weight"),
        (dict(d_kv=4), r"q.weight \(expected \[12, 12\], got \[15, 12\]\)"),
        (dict(vocab_size=51), r"misshaped: shared.weight \(expected \[51, 12\], got \[50, 12\]\)"),
    ],
)
def test_another_family_or_size_is_refused(folder, config, message):
    with pytest.raises(UserError, match=message):
        load_t5(folder(config))


def test_the_original_t5_is_refused_though_its_config_need_not_say_so(folder):
    file = folder() / "config.json"
    file.write_text(
        json.dumps({key: value for key, value in CONFIG.items() if key != "feed_forward_proj"})
    )
    with pytest.raises(UserError, match="feed_forward_proj is 'relu'"):
        load_t5(file.parent)


def test_positions_of_a_later_layer_are_refused(folder):
    name = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(UserError, match=f"extra: {name}"):
        load_t5(folder(weights=tensors() | {name: np.zeros((8, 3), np.float32)}))


def test_a_file_of_another_dtype_or_cut_short_is_refused(folder):
    with pytest.raises(UserError, match=r"shared.weight \(I32\)"):
        load_t5(folder(weights=tensors() | {"shared.weight": np.zeros((50, 12), np.int32)}))
    file = folder() / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_t5(file.parent)


def their_output(reference, ids, mask):
    torch = pytest.importorskip("torch")
    attention = None if mask is None else torch.tensor(mask).long()
    with torch.no_grad():
        return reference(
            torch.tensor(ids).long(), attention_mask=attention
        ).last_hidden_state.numpy()


@pytest.mark.parity
def test_the_stored_activation_is_current(folder):
    """Fails where the reference is out of date; delete the file to write it anew."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids, mask = inputs()
    output = their_output(transformers.T5EncoderModel.from_pretrained(folder()).eval(), ids, mask)
    if not REFERENCE.exists():
        np.savez(REFERENCE, output=output)
    np.testing.assert_allclose(
        np.load(REFERENCE)["output"][mask], output[mask], atol=1e-5 * output[mask].std()
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_transformers(tmp_path, name, record_property):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    heads, head_dim, width, mlp, depth, (buckets, farthest), tokens, batch = CONFIGS[name]
    config = transformers.T5Config(
        vocab_size=101,
        d_model=width,
        d_kv=head_dim,
        d_ff=mlp,
        num_layers=depth,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=farthest,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(0)
    whole = name == "odd"  # this one with its decoder and head
    reference = (transformers.T5ForConditionalGeneration if whole else transformers.T5EncoderModel)(
        config
    ).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)  # norms and positions other than their first values
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    module, params = load_t5(tmp_path)
    ids, mask = inputs(vocab_size=101, tokens=tokens, batch=batch)
    encoder = reference.get_encoder() if whole else reference
    masked = their_output(encoder, ids, mask)[mask]
    plain = their_output(encoder, ids, None)
    error = max(
        np.abs(apply(module, params, ids, mask)[mask] - masked).max() / masked.std(),
        np.abs(apply(module, params, ids, None) - plain).max() / plain.std(),
    )
    configuration = (
        f"{type(reference).__name__}: {heads} heads of {head_dim}, width {width}, MLP {mlp}, "
        f"{depth} layers, {buckets} buckets to {farthest}, {tokens} tokens, batch {batch}, "
        "with and without mask"
    )
    record_parity(record_property, network="T5 encoder", configuration=configuration, forward=error)
    assert error <= 2e-5  # float32 sums in another order
