"""CLIP's towers and DINO against transformers: live where torch is there (marker `parity`), by
stored references elsewhere; and every way in which their folders can be wrong.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from tests.helpers import record_parity
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.transformers import load_clip_text, load_clip_vision, load_dino
from univg_jax.sharding import make_mesh

REFERENCE = Path(__file__).parents[1] / "data" / "encoders_reference.npz"
WEIGHTS = "model.safetensors"
LOAD = {"text": load_clip_text, "vision": load_clip_vision, "dino": load_dino}

# Three tiny networks, their tensors by their names in transformers.
D, F, DEPTH = 12, 20, 3
SIZES = dict(hidden_size=D, intermediate_size=F, num_hidden_layers=DEPTH, num_attention_heads=3)
IMAGE = dict(image_size=12, patch_size=4, **SIZES)
CONFIGS = {
    "text": dict(
        model_type="clip_text_model",
        vocab_size=30,
        max_position_embeddings=9,
        projection_dim=5,
        eos_token_id=29,
        **SIZES,
    ),
    "vision": dict(model_type="clip_vision_model", projection_dim=5, hidden_act="gelu", **IMAGE),
    "dino": dict(model_type="vit", **IMAGE),
}
CLIP_LAYER = (
    "layer_norm1",
    "layer_norm2",
    "self_attn.{}_proj",
    ("q", "k", "v", "out"),
    "mlp.fc1",
    "mlp.fc2",
)
VIT_LAYER = (
    "layernorm_before",
    "layernorm_after",
    "attention.{}",
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    "intermediate.dense",
    "output.dense",
)


def layers(block, names):
    norm1, norm2, attention, parts, mlp_in, mlp_out = names
    shapes = {norm1: (D,), norm2: (D,), mlp_in: (F, D), mlp_out: (D, F)}
    shapes |= {attention.format(part): (D, D) for part in parts}
    for i in range(DEPTH):
        for name, shape in shapes.items():
            yield f"{block}.{i}.{name}.weight", shape
            yield f"{block}.{i}.{name}.bias", shape[:1]


def shapes_of(kind):
    norms = {
        "text": ["final_layer_norm"],
        "vision": ["pre_layrnorm", "post_layernorm"],
        "dino": ["layernorm"],
    }[kind]
    shapes = {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
    if kind == "dino":
        return {
            "embeddings.cls_token": (1, 1, D),
            "embeddings.position_embeddings": (1, 10, D),
            "embeddings.patch_embeddings.projection.weight": (D, 3, 4, 4),
            "embeddings.patch_embeddings.projection.bias": (D,),
            **dict(layers("encoder.layer", VIT_LAYER)),
            **shapes,
        }
    embeddings = {
        "text": {"token_embedding.weight": (30, D), "position_embedding.weight": (9, D)},
        "vision": {
            "class_embedding": (D,),
            "position_embedding.weight": (10, D),
            "patch_embedding.weight": (D, 3, 4, 4),
        },
    }[kind]
    shapes |= {f"embeddings.{name}": shape for name, shape in embeddings.items()}
    shapes |= dict(layers("encoder.layers", CLIP_LAYER))
    head = {"text": "text_projection.weight", "vision": "visual_projection.weight"}[kind]
    return {f"{kind}_model.{name}": shape for name, shape in shapes.items()} | {head: (5, D)}


def tensors_of(kind):
    """Nothing at zero or one, so that every path is active."""
    rng = np.random.default_rng(0)
    return {
        n: (0.3 * rng.normal(size=s)).astype(np.float32) for n, s in sorted(shapes_of(kind).items())
    }


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Writes the folder of a kind, with changes."""

    def write_kind(kind, config=None, tensors=None):
        return write(
            tmp_path,
            CONFIGS[kind] | (config or {}),
            tensors_of(kind) if tensors is None else tensors,
        )

    return write_kind


def whole_clip(folder, config=None, tensors=None):
    """Writes both towers as one `CLIPModel`."""
    towers = {f"{kind}_config": CONFIGS[kind] for kind in ("text", "vision")}
    config = dict(model_type="clip", projection_dim=5) | towers | (config or {})
    more = {
        "logit_scale": np.float32([1]),
        "text_model.embeddings.position_ids": np.arange(9)[None],
        "vision_model.embeddings.position_ids": np.arange(10)[None],
    }
    return write(
        folder,
        config,
        tensors_of("text") | tensors_of("vision") | more if tensors is None else tensors,
    )


def inputs_of(kind, *, batch=2, size=(12, 12), tokens=8, vocab=30):
    rng = np.random.default_rng(1)
    if kind != "text":
        return (rng.normal(size=(batch, *size, 3)).astype(np.float32),)
    ids = rng.integers(3, vocab - 1, (batch, tokens)).astype(np.int32)
    lengths = rng.integers(2, tokens + 1, batch)
    ids[np.arange(batch), lengths - 1] = vocab - 1  # the end token
    return ids, np.arange(tokens)[None] < lengths[:, None]


def run(module, params, *inputs):
    return jax.jit(lambda p, x: module.apply({"params": p}, *x))(params, inputs)


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Loading.


@pytest.mark.parametrize("kind", LOAD)
def test_equals_the_stored_activation_of_transformers(folder, kind):
    """`encoders_reference.npz` is their output for these tensors: see
    `test_the_stored_activations_are_current`.
    """
    stored = np.load(REFERENCE)
    inputs = inputs_of(kind)
    out = run(*LOAD[kind](folder(kind)), *inputs)
    for field in dataclasses.fields(out):
        got, want = getattr(out, field.name), stored[f"{kind}_{field.name}"]
        if kind == "text" and got.ndim == 3:
            got, want = got[inputs[1]], want[inputs[1]]
        np.testing.assert_allclose(got, want, atol=2e-5 * want.std(), err_msg=field.name)  # float32


def test_a_tower_of_the_whole_model_is_the_tower(tmp_path):
    whole_clip(tmp_path / "whole")
    for kind in ("text", "vision"):
        own = write(tmp_path / kind, CONFIGS[kind], tensors_of(kind))
        (module, params), (module_of_whole, params_of_whole) = (
            LOAD[kind](own),
            LOAD[kind](tmp_path / "whole"),
        )
        assert module == module_of_whole
        assert_same_tree(params, params_of_whole)


def test_older_config_of_a_tower_goes_first(tmp_path):
    """As in the published folders of OpenAI's models, whose two configs name other end tokens."""
    config = {k: v for k, v in CONFIGS["text"].items() if k != "eos_token_id"}
    whole = whole_clip(
        tmp_path, dict(text_config=CONFIGS["text"] | dict(eos_token_id=2), text_config_dict=config)
    )
    assert load_clip_text(whole)[0].eos_token_id == 49407


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_without_projection_and_prefix(folder, kind):
    """What `CLIPTextModel` and `CLIPVisionModel` write."""
    full_params = LOAD[kind](folder(kind))[1]
    bare = {
        name.split("model.")[1]: value
        for name, value in tensors_of(kind).items()
        if "projection" not in name
    }
    module, params = LOAD[kind](folder(kind, dict(projection_dim=None), bare))
    assert module.projection_dim is None
    assert_same_tree(
        params, {name: value for name, value in full_params.items() if name != "projection"}
    )
    assert run(module, params, *inputs_of(kind)).projected is None


def test_dino_of_a_classifier_and_with_parts_that_are_not_read(folder):
    _, params = load_dino(folder("dino"))
    head = {
        "classifier.weight": np.zeros((2, D), np.float32),
        "classifier.bias": np.zeros(2, np.float32),
    }
    _, of_classifier = load_dino(
        folder("dino", tensors={f"vit.{k}": v for k, v in tensors_of("dino").items()} | head)
    )
    pooler = {
        "pooler.dense.weight": np.zeros((D, D), np.float32),
        "pooler.dense.bias": np.zeros(D, np.float32),
    }
    mask_token = {"embeddings.mask_token": np.zeros((1, 1, D), np.float32)}
    _, with_more = load_dino(folder("dino", tensors=tensors_of("dino") | pooler | mask_token))
    assert_same_tree(params, of_classifier)
    assert_same_tree(params, with_more)


def test_dino_without_biases_of_queries_keys_and_values(folder):
    tensors = {
        k: v
        for k, v in tensors_of("dino").items()
        if not k.endswith(("query.bias", "key.bias", "value.bias"))
    }
    _, params = load_dino(folder("dino", dict(qkv_bias=False), tensors))
    assert params["blocks"]["q"].keys() == {"kernel"}


@pytest.mark.parametrize("kind", LOAD)
def test_onto_a_mesh_as_bfloat16(folder, kind):
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    _, params = LOAD[kind](folder(kind))
    _, sharded = LOAD[kind](folder(kind), mesh=mesh, param_dtype=jnp.bfloat16)
    # too small for fsdp
    assert sharded["blocks"]["q"]["kernel"].sharding.spec == P(None, None, "tensor")
    assert sharded["blocks"]["mlp"]["out"]["kernel"].sharding.spec == P(None, "tensor")
    assert_same_tree(sharded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


# Refusing.


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "text",
            dict(model_type="siglip"),
            "expected model_type 'clip_text_model' or 'clip', got 'siglip'",
        ),
        (
            "vision",
            dict(model_type="clip_text_model"),
            "expected model_type 'clip_vision_model' or 'clip'",
        ),
        ("dino", dict(model_type="dinov2"), "expected model_type 'vit', got 'dinov2'"),
        (
            "text",
            dict(hidden_act="relu"),
            "hidden_act is 'relu'; only 'gelu' or 'quick_gelu'",
        ),
        (
            "text",
            dict(eos_token_id=[2, 29]),
            r"eos_token_id is \[2, 29\]; only a single int is supported",
        ),
        ("vision", dict(image_size=[12, 16]), r"image_size is \[12, 16\]; only a single int"),
        ("vision", dict(num_channels=4), "num_channels is 4; only 3"),
        ("dino", dict(patch_size=[4, 4]), "patch_size"),
        ("dino", dict(num_attention_heads=5), "hidden_dim 12 is not a multiple of num_heads 5"),
        ("text", dict(num_hidden_layers=2), r"extra: text_model\.encoder\.layers\.2\."),
        (
            "text",
            dict(projection_dim=6),
            r"misshaped: text_projection.weight \(expected \[6, 12\], got \[5, 12\]\)",
        ),
        (
            "vision",
            dict(patch_size=2),
            r"patch_embedding.weight \(expected \[12, 3, 2, 2\], got \[12, 3, 4, 4\]\)",
        ),
        (
            "dino",
            dict(image_size=16),
            r"position_embeddings \(expected \[1, 17, 12\], got \[1, 10, 12\]\)",
        ),
    ],
)
def test_another_family_or_variant_is_refused(folder, kind, config, message):
    with pytest.raises(UserError, match=message):
        LOAD[kind](folder(kind, config))


def test_the_whole_model_needs_its_projections(tmp_path):
    whole_clip(tmp_path)
    tensors = {
        k: v for k, v in load_file(tmp_path / WEIGHTS).items() if k != "text_projection.weight"
    }
    whole_clip(tmp_path, tensors=tensors)
    with pytest.raises(UserError, match=r"missing: text_projection\.weight"):
        load_clip_text(tmp_path)


@pytest.mark.parametrize("kind", LOAD)
def test_damaged_files(folder, kind):
    file = folder(kind) / WEIGHTS
    tensors = tensors_of(kind)
    folder(kind, tensors=tensors | {next(iter(tensors)): np.zeros(3, np.int32)})
    with pytest.raises(UserError, match="misshaped"):
        LOAD[kind](file.parent)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        LOAD[kind](file.parent)
    file.unlink()
    with pytest.raises(NotFoundError, match=r"has neither model\.safetensors nor"):
        LOAD[kind](file.parent)


# Parity.


def their_text(reference, ids, mask):
    torch = pytest.importorskip("torch")
    tower = getattr(reference, "text_model", reference)
    mask = None if mask is None else torch.tensor(mask).long()
    with torch.no_grad():
        out = tower(torch.tensor(ids).long(), attention_mask=mask, output_hidden_states=True)
        head = getattr(reference, "text_projection", None)
        return dict(
            last_hidden=out.last_hidden_state.numpy(),
            penultimate=out.hidden_states[-2].numpy(),
            pooled=out.pooler_output.numpy(),
            projected=None if head is None else head(out.pooler_output).numpy(),
        )


def their_image(reference, pixels):
    torch = pytest.importorskip("torch")
    tower = getattr(reference, "vision_model", reference)
    clip = "CLIP" in type(reference).__name__
    with torch.no_grad():
        out = tower(torch.tensor(pixels.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True)
        if not clip:
            return dict(
                last_hidden=out.last_hidden_state.numpy(),
                pooled=out.last_hidden_state[:, 0].numpy(),
            )
        head = getattr(reference, "visual_projection", None)
        return dict(
            last_hidden=out.last_hidden_state.numpy(),
            pooled=out.pooler_output.numpy(),
            projected=None if head is None else head(out.pooler_output).numpy(),
        )


def worst_error(ours, theirs, mask=None):
    """The largest error of any part in units of that part's std, at real tokens."""
    worst = 0.0
    assert {f.name for f in dataclasses.fields(ours)} == theirs.keys()
    for name, want in theirs.items():
        got = getattr(ours, name)
        assert (got is None) == (want is None), name
        if want is not None:
            if mask is not None and want.ndim == 3:
                got, want = got[mask], want[mask]
            worst = max(worst, float(np.abs(got - want).max() / want.std()))
    return worst


def perturbed(torch, reference):
    """Every parameter off its initial value, zeros and ones included."""
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)
    return reference.eval()


@pytest.mark.parity
def test_the_stored_activations_are_current(tmp_path):
    """Fails where the reference is out of date; delete the file to write it anew."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    outputs = {}
    classes = {
        "text": "CLIPTextModelWithProjection",
        "vision": "CLIPVisionModelWithProjection",
        "dino": "ViTModel",
    }
    for kind, name in classes.items():
        write(tmp_path / kind, CONFIGS[kind], tensors_of(kind))
        options = dict(add_pooling_layer=False) if kind == "dino" else {}
        reference = getattr(transformers, name).from_pretrained(tmp_path / kind, **options).eval()
        theirs = (their_text if kind == "text" else their_image)(reference, *inputs_of(kind))
        outputs |= {f"{kind}_{field}": value for field, value in theirs.items()}
    if not REFERENCE.exists():
        np.savez(REFERENCE, **outputs)
    stored = np.load(REFERENCE)
    for name, value in outputs.items():
        # other torch kernels
        np.testing.assert_allclose(stored[name], value, atol=1e-5 * value.std(), err_msg=name)


# class, heads, width, depth, mlp, activation, eps, end token, tokens, batch, whether padding is
# masked
TEXTS = {
    "one-head": ("CLIPTextModel", 1, 10, 1, 13, "quick_gelu", 1e-5, 2, 7, 1, False),
    "l14": ("CLIPTextModelWithProjection", 12, 48, 4, 192, "quick_gelu", 1e-5, 2, 16, 3, False),
    "bigg": ("CLIPTextModelWithProjection", 5, 35, 3, 70, "gelu", 1e-5, 60, 11, 4, True),
    "eps": ("CLIPTextModel", 7, 21, 2, 40, "gelu", 1e-3, 60, 20, 5, True),
    "whole": ("CLIPModel", 2, 26, 2, 33, "quick_gelu", 1e-5, 60, 9, 2, True),
}
# class, heads, width, depth, mlp, activation, qkv bias, image size, patch, (height, width), batch
IMAGES = {
    "clip-one-head": ("CLIPVisionModel", 1, 14, 1, 15, "quick_gelu", True, 15, 5, (15, 15), 1),
    "clip-l14": (
        "CLIPVisionModelWithProjection",
        8,
        64,
        4,
        256,
        "quick_gelu",
        True,
        28,
        7,
        (28, 28),
        3,
    ),
    "clip-bigg": ("CLIPVisionModelWithProjection", 5, 35, 3, 70, "gelu", True, 20, 4, (20, 20), 2),
    "clip-whole": ("CLIPModel", 3, 27, 2, 31, "gelu", True, 18, 3, (18, 18), 4),
    "clip-resized": (
        "CLIPVisionModelWithProjection",
        2,
        22,
        2,
        30,
        "quick_gelu",
        True,
        20,
        4,
        (12, 36),
        2,
    ),
    "vit-one-head": ("ViTModel", 1, 11, 1, 17, "gelu", True, 12, 3, (12, 12), 1),
    "vit-s16": ("ViTModel", 6, 48, 5, 192, "gelu", True, 32, 8, (32, 32), 3),
    "vit-larger": ("ViTModel", 7, 35, 3, 50, "gelu", True, 20, 4, (44, 28), 2),
    "vit-smaller": ("ViTModel", 3, 24, 2, 29, "gelu", True, 28, 4, (12, 20), 2),
    "vit-no-bias": ("ViTModel", 2, 18, 2, 40, "quick_gelu", False, 15, 5, (10, 25), 3),
    "vit-classifier": ("ViTForImageClassification", 4, 20, 2, 40, "gelu", True, 16, 4, (16, 16), 2),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", TEXTS)
def test_text_equals_transformers(tmp_path, name, record_property):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cls, heads, width, depth, mlp, activation, eps, end, tokens, batch, masked = TEXTS[name]
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=61,
        hidden_size=width,
        intermediate_size=mlp,
        projection_dim=9,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=20,
        hidden_act=activation,
        layer_norm_eps=eps,
        bos_token_id=0,
        eos_token_id=end,
    )
    if cls == "CLIPModel":
        config = transformers.CLIPConfig(text_config=config.to_dict(), projection_dim=13)
    reference = perturbed(torch, getattr(transformers, cls)(config))
    reference.save_pretrained(tmp_path)
    module, params = load_clip_text(tmp_path)
    ids, mask = inputs_of("text", batch=batch, tokens=tokens, vocab=61)
    mask = mask if masked else None
    ours = run(module, params, ids, mask)
    error = worst_error(ours, their_text(reference, ids, mask), mask)
    configuration = (
        f"{cls}: {heads} heads, width {width}, MLP {mlp}, {depth} layers, {activation}, eps {eps}, "
        f"end token {end}, {tokens} tokens, batch {batch}{', masked' if masked else ''}"
    )
    record_parity(record_property, network="CLIP text", configuration=configuration, forward=error)
    assert error <= 2e-5


@pytest.mark.parity
@pytest.mark.parametrize("name", IMAGES)
def test_images_equal_transformers(tmp_path, name, record_property):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cls, heads, width, depth, mlp, activation, qkv_bias, image, patch, size, batch = IMAGES[name]
    torch.manual_seed(0)
    fields = dict(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_act=activation,
        image_size=image,
        patch_size=patch,
    )
    if cls.startswith("ViT"):
        config = transformers.ViTConfig(**fields, qkv_bias=qkv_bias)
    elif cls == "CLIPModel":
        config = transformers.CLIPConfig(vision_config=fields, projection_dim=13)
    else:
        config = transformers.CLIPVisionConfig(**fields, projection_dim=9)
    reference = perturbed(torch, getattr(transformers, cls)(config))
    reference.save_pretrained(tmp_path)
    module, params = (load_dino if cls.startswith("ViT") else load_clip_vision)(tmp_path)
    (pixels,) = inputs_of("image", batch=batch, size=size)
    error = worst_error(
        run(module, params, pixels), their_image(getattr(reference, "vit", reference), pixels)
    )
    configuration = (
        f"{cls}: {heads} heads, width {width}, MLP {mlp}, {depth} layers, {activation}, "
        f"{'' if qkv_bias else 'no qkv bias, '}trained at {image} px, patch {patch}, "
        f"run at {size}, batch {batch}"
    )
    network = "DINO (ViT)" if cls.startswith("ViT") else "CLIP vision"
    record_parity(record_property, network=network, configuration=configuration, forward=error)
    assert error <= 2e-5
