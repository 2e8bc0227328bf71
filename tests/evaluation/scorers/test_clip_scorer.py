"""CLIP as a scorer: its vectors are the networks' own, whatever else is in the batch; and how
pictures are made ready.
"""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.tokenizer import load_tokenizer
from tests.data_pipelines.test_tokenizer import write_clip
from tests.sd3_folder import write_image_encoder, write_text_encoder
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmarks import geneval
from univg_jax.evaluation.scorers import network, scorer_digests
from univg_jax.evaluation.scorers.clip import (
    Clip,
    ClipColors,
    hpsv2_pixels,
    openai_pixels,
)
from univg_jax.evaluation.scorers.network import BATCH_SIZE
from univg_jax.interop.transformers import load_clip_text, load_clip_vision
from univg_jax.models.clip import MEAN, STD, preprocess


def write_whole_clip(root):
    """A whole CLIP of tiny random towers, with its tokenizer."""
    write_text_encoder(
        root / "text", width=8, heads=2, projection=6, activation="quick_gelu", seed=1
    )
    write_image_encoder(root / "vision")
    whole = write_clip(root / "whole")
    config, tensors = dict(model_type="clip", projection_dim=6), {}
    for tower in ("text", "vision"):
        config[f"{tower}_config"] = json.loads((root / tower / "config.json").read_text())
        tensors |= load_file(root / tower / "model.safetensors")
    (whole / "config.json").write_text(json.dumps(config))
    save_file(tensors, whole / "model.safetensors")
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_whole_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(str(folder))


def image_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(pixels):
    """Pixels in [0, 1], before they were normalized."""
    return pixels * np.float32(STD) + np.float32(MEAN)


def units(x):
    return np.asarray(x) / np.linalg.norm(np.asarray(x), axis=-1, keepdims=True)


# Vectors


def test_vectors_of_pictures_are_the_networks(folder, clip):
    images = [image_of(20, 30, seed) for seed in range(3)]
    module, params = load_clip_vision(folder)
    pixels = np.concatenate([preprocess(image[None], size=16) for image in images])
    want = jax.jit(lambda p, x: module.apply({"params": p}, x).projected)(params, pixels)
    got = clip.image_embed(images)
    # Pillow's weights are integers, and models.clip's are not: a pixel may differ by one level.
    np.testing.assert_allclose(got, units(want), atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, rtol=1e-5)


def test_vectors_of_texts_are_the_networks(folder, clip):
    texts = ["a cat", "it sat on a person and sat", ""]
    module, params = load_clip_text(folder)
    tokenizer = load_tokenizer(str(folder))
    rows = [tokenizer(text, 77) for text in texts]
    tokens, mask = (np.stack([getattr(r, name) for r in rows]) for name in ("tokens", "text_mask"))
    want = jax.jit(lambda p, t, m: module.apply({"params": p}, t, m).projected)(
        params, tokens, mask
    )
    np.testing.assert_allclose(clip.text_embed(texts), units(want), atol=1e-5)  # float32


def test_a_vector_does_not_depend_on_its_batch(clip):
    images = [image_of(16 + k % 5, 20, k) for k in range(BATCH_SIZE + 3)]
    together = clip.image_embed(images)
    assert together.shape == (BATCH_SIZE + 3, 6)
    for k in (0, BATCH_SIZE - 1, BATCH_SIZE + 2):  # float32, batches of several sizes
        np.testing.assert_allclose(clip.image_embed([images[k]])[0], together[k], atol=1e-6)
    texts = [f"cat {k}" for k in range(BATCH_SIZE + 1)]
    np.testing.assert_allclose(
        clip.text_embed(texts[-1:])[0], clip.text_embed(texts)[-1], atol=1e-6
    )
    assert clip.image_embed([]).shape == clip.text_embed([]).shape == (0, 6)


def test_a_long_text_is_cut_off(clip):
    long = "cat " * 100
    np.testing.assert_array_equal(clip.text_embed([long]), clip.text_embed([long + "it"]))


def test_colors_are_those_nearest_to_the_crops(clip):
    image = image_of(40, 50)
    mask = np.zeros((40, 50), bool)
    mask[5:20, 10:30] = True
    objects = [(8, 4, 33, 22, 0.9, mask), (0, 0, 9, 30, 0.8, None), (30, 30, 80, 60, 0.7, None)]
    texts = geneval.color_texts("cat")
    vectors = np.stack([clip.text_embed(texts[color]) for color in geneval.COLORS])
    crops = np.concatenate([clip.image_embed([geneval.color_crop(image, o)]) for o in objects])
    colors = ClipColors(clip)
    want = geneval.nearest_colors(crops, vectors)
    assert colors(image, objects, "cat") == want
    assert colors(image, objects[1:], "cat") == want[1:]
    assert colors(image, [], "cat") == []
    assert scorer_digests({"color": colors}) == {"color": clip.digest}


def test_what_papers_call_the_network(clip):
    assert clip.backbone == ClipColors(clip).backbone == "ViT-10x2/4@16"
    assert network.vit_size(width=768, depth=12) == "B"
    assert network.vit_size(width=1280, depth=32) == "H"


def test_the_digest_names_all_that_vectors_depend_on(folder, clip, tmp_path):
    assert Clip(str(folder)).digest == clip.digest
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert Clip(str(other)).digest == clip.digest  # wherever it lies
    tensors = load_file(other / "model.safetensors")
    name = "visual_projection.weight"
    save_file(tensors | {name: tensors[name] * 2}, other / "model.safetensors")
    assert len({clip.digest, Clip(str(other)).digest, hpsv2(folder).digest}) == 3


def hpsv2(folder):
    return Clip(str(folder), preprocessing="hpsv2")


def test_hpsv2_sees_the_whole_picture(folder, clip):
    wide = image_of(16, 64)
    changed = wide.copy()
    changed[:, :8] = 255 - changed[:, :8]
    np.testing.assert_array_equal(clip.image_embed([wide]), clip.image_embed([changed]))
    first, second = hpsv2(folder).image_embed([wide, changed])
    assert np.abs(first - second).max() > 1e-3


# Making pictures ready


@pytest.mark.parametrize(("width", "left"), [(10, 0), (11, 0), (12, 1), (13, 2), (15, 2), (17, 4)])
@pytest.mark.parametrize("is_high", [False, True])
def test_the_central_square_is_torchvisions(width, left, is_high):
    image = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (10, width, 3))
    image = np.ascontiguousarray(image.swapaxes(0, 1) if is_high else image)
    shown = np.rint(plain(openai_pixels(image, size=10)) * 255)
    assert shown[0, 0, 0] == left
    assert shown[-1, -1, 0] == left + 9


@pytest.mark.parametrize("shape", [(50, 37), (37, 50), (20, 20), (24, 90), (9, 5)])
def test_openais_pixels_are_the_networks_own_preprocessing(shape):
    image = image_of(*shape)
    image[2:7, 2:4] = 255  # an edge, where bicubic interpolation overshoots
    got = plain(openai_pixels(image, size=16))
    sides = [16 * side // min(shape) - 16 for side in shape]
    want = plain(np.asarray(preprocess(image[None], size=16)[0]))
    if all((side // 2) == round(side / 2) for side in sides):
        assert np.abs(255 * (got - want)).max() < 1.01  # one level: Pillow's weights are integers
    assert got.shape == want.shape


def test_hpsv2_pads_with_black_and_the_odd_pixel_at_the_end():
    image = image_of(24, 17)
    for antialias in (True, False):
        shown = plain(hpsv2_pixels(image, size=24, antialias=antialias))
        np.testing.assert_allclose(shown[:, 3:20], image / np.float32(255), atol=1e-6)  # float32
        np.testing.assert_allclose(shown[:, :3], 0, atol=1e-6)
        np.testing.assert_allclose(shown[:, 20:], 0, atol=1e-6)


def cubic(t, a):
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [8, 30])
def test_hpsv2s_filter_is_bicubic_and_nothing_is_rounded(antialias, size):
    """One row at a time, by the definition; a is -0.5 with antialiasing and -0.75 without."""
    row = np.where(np.random.default_rng(0).random(20) < 0.5, 0, 255).astype(np.uint8)
    image = np.broadcast_to(row[None, :, None], (20, 20, 3))
    got = plain(hpsv2_pixels(np.ascontiguousarray(image), size=size, antialias=antialias))
    ratio = 20 / size
    stretch = max(ratio, 1) if antialias else 1
    for x in range(size):
        center = (x + 0.5) * ratio - 0.5
        at = np.arange(math.floor(center - 2 * stretch), math.floor(center + 2 * stretch) + 2)
        weights = np.array(
            [cubic((k - center) / stretch, -0.5 if antialias else -0.75) for k in at]
        )
        if antialias:  # Pillow leaves out what is beyond the border
            weights = np.where((at >= 0) & (at < 20), weights, 0)
        values = row[np.clip(at, 0, 19)] / 255
        want = (weights * values).sum() / weights.sum()
        np.testing.assert_allclose(got[size // 2, x], want, atol=1e-4)
    assert size < 20 or got.max() > 1  # an overshoot stays


# What goes wrong


def test_folders_that_are_no_clip_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="unknown preprocessing 'hps'; did you mean 'hpsv2'"):
        Clip(str(folder), preprocessing="hps")
    with pytest.raises(NotFoundError, match=r"has no config\.json"):
        Clip(str(tmp_path / "none"))
    write_image_encoder(tmp_path / "vision")
    with pytest.raises(UserError, match="expected model_type"):
        Clip(str(tmp_path / "vision"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(NotFoundError, match=r"has no tokenizer\.json"):
        Clip(str(bare))


# PyTorch's


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(50, 38), (38, 50), (20, 20), (24, 90)])
def test_openais_pixels_equal_transformers(shape):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    image = image_of(*shape)
    want = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    sides = [16 * side // min(shape) - 16 for side in shape]
    assert all(side // 2 == round(side / 2) for side in sides)  # both cut out the same square
    # One level: newer versions of transformers resize tensors.
    assert np.abs(255 * (plain(openai_pixels(image, size=16)) - plain(want))).max() < 1.01


@pytest.mark.parity
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [16, 80])
def test_hpsv2s_pixels_equal_pytorch(antialias, size):
    torch = pytest.importorskip("torch")
    image = image_of(40, 27)
    x = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
    width = round(27 * size / 40)
    resized = torch.nn.functional.interpolate(
        x, size=(size, width), mode="bicubic", antialias=antialias
    )
    left = (size - width) // 2
    got = plain(hpsv2_pixels(image, size=size, antialias=antialias))
    want = resized[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got[:, left : left + width], want, atol=1e-4)
