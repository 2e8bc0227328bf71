"""Folders of `transformers` -> our modules: names, layouts, and every way in which a folder can be
wrong.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.helpers import record_parity
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop import transformers
from univg_jax.interop.transformers import load_minilm
from univg_jax.models.minilm import pool
from univg_jax.pretrained import pretrained_folder

CONFIG = dict(
    model_type="bert",
    vocab_size=40,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=10,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    hidden_act="gelu",
)


def tensors() -> dict[str, np.ndarray]:
    """A folder's tensors by their names in transformers."""
    d, f, block = 12, 20, "encoder.layer.0."
    shapes = {
        "embeddings.word_embeddings.weight": (40, d),
        "embeddings.position_embeddings.weight": (10, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        block + "intermediate.dense.weight": (f, d),
        block + "intermediate.dense.bias": (f,),
        block + "output.dense.weight": (d, f),
        block + "output.dense.bias": (d,),
        block + "attention.output.LayerNorm.weight": (d,),
        block + "attention.output.LayerNorm.bias": (d,),
        block + "output.LayerNorm.weight": (d,),
        block + "output.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
    }
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= {f"{block}attention.{name}.weight": (d, d), f"{block}attention.{name}.bias": (d,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    def write(config=None, weights=None):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        safetensors.numpy.save_file(
            tensors() if weights is None else weights, tmp_path / "model.safetensors"
        )
        return tmp_path

    return write


def test_loads_with_and_without_the_prefix_of_a_head_model(folder):
    module, params = load_minilm(folder())
    _, prefixed = load_minilm(folder(weights={f"bert.{k}": v for k, v in tensors().items()}))
    jax.tree.map(np.testing.assert_array_equal, params, prefixed)
    assert params["blocks"]["mlp"]["in"]["kernel"].shape == (1, 12, 20)
    out = module.apply({"params": params}, jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool))
    assert out.shape == (2, 5, 12)


def test_lists_missing_extra_and_misshaped_tensors(folder):
    weights = tensors()
    del weights["encoder.layer.0.output.dense.bias"]
    weights["encoder.layer.7.output.dense.bias"] = np.zeros(12, np.float32)
    weights["embeddings.LayerNorm.bias"] = np.zeros(13, np.float32)
    with pytest.raises(UserError, match=r"tensors do not fit the network") as error:
        load_minilm(folder(weights=weights))
    assert "missing: encoder.layer.0.output.dense.bias;" in str(error.value)
    assert "extra: encoder.layer.7.output.dense.bias;" in str(error.value)
    assert "misshaped: embeddings.LayerNorm.bias (expected [12], got [13])" in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="roberta"), "expected model_type 'bert', got 'roberta'"),
        (dict(hidden_act="relu"), "hidden_act is 'relu'; only 'gelu'"),
        (dict(position_embedding_type="relative_key"), "only 'absolute'"),
    ],
)
def test_another_family_is_refused(folder, config, message):
    with pytest.raises(UserError, match=message):
        load_minilm(folder(config))


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        load_minilm(tmp_path)
    file = folder() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_minilm(tmp_path)
    file.unlink()
    with pytest.raises(NotFoundError, match=r"has neither model\.safetensors nor"):
        load_minilm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_minilm(tmp_path)


def test_the_documentation_of_each_loader_is_a_sentence():
    loaders = {
        name: value for name, value in vars(transformers).items() if name.startswith("load_")
    }
    assert len(loaders) == 5
    for name, load in loaders.items():
        opener = name.replace("load", "open")
        assert load.__doc__.endswith(f". Returns (module, parameters); see `{opener}`.")
        assert ",." not in load.__doc__


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(NotFoundError, match="did you mean 'minilm'"):
        pretrained_folder("minlm")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("heads", "width", "depth", "mlp", "tokens"),
    [(1, 24, 1, 31, 7), (5, 35, 3, 64, 9), (12, 96, 2, 200, 16)],
)
def test_parity_with_transformers(tmp_path, heads, width, depth, mlp, tokens, record_property):
    torch = pytest.importorskip("torch")
    reference_transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    reference = reference_transformers.BertModel(
        reference_transformers.BertConfig(
            vocab_size=101,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp,
            max_position_embeddings=20,
        )
    ).eval()
    reference.save_pretrained(tmp_path)
    module, params = load_minilm(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 101, (3, tokens)).astype(np.int32)
    mask = np.arange(tokens)[None] < np.array([[tokens], [3], [1]])
    with torch.no_grad():
        theirs = reference(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())[
            0
        ].numpy()
    ours = np.asarray(module.apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask)))
    # 2e-5 of the output's std covers float32 sums in another order.
    error = np.abs(ours - theirs)[mask].max() / theirs[mask].std()
    configuration = (
        f"{heads} heads, width {width}, MLP {mlp}, {depth} layers, {tokens} tokens, batch 3, masked"
    )
    record_parity(
        record_property, network="MiniLM (BERT)", configuration=configuration, forward=error
    )
    assert error <= 2e-5
    assert np.isfinite(pool(jnp.asarray(ours), jnp.asarray(mask))).all()
