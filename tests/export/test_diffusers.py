"""A run as a pipeline for diffusers: what is written and refused, and the images that it makes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.tasks import TASKS
from tests.clean_python import make_python
from tests.helpers import record_parity
from tests.sd3_folder import random_params, write_image_encoder, write_sd3
from tests.sd3_run import write_run
from univg_jax.errors import UserError
from univg_jax.export import compare
from univg_jax.export.formats.diffusers import FORMAT, answer_in_torch, read_pipeline
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.flow import sample_noise
from univg_jax.inputs import extend, make_request
from univg_jax.interop.diffusers import (
    VAE,
    WEIGHTS,
    open_transformer,
    open_vae,
    steady_vae,
    transformer_tensors,
    vae_weights,
    without_source,
)
from univg_jax.interop.folder import write_params
from univg_jax.interop.writing import write_sharded
from univg_jax.models.codec import KLCodec
from univg_jax.models.mmdit import make_mmdit
from univg_jax.sampling import NULL_CONDITIONS, guidance_weights
from univg_jax.settings import InitFrom
from univg_jax.streaming import Tensor
from univg_jax.trained import open_trained
from univg_jax.training.initialize import find_parent
from univg_jax.training.step import TrainStep
from univg_jax.trees import named_leaves

pytestmark = pytest.mark.xdist_group("sd3")  # one worker writes the folder and compiles

SIDE, CELL = 32, 4
# What diffusers' own pipelines cannot do, beside the second scale of guidance.
RARE = {"solver": "heun", "rescale": 0.5, "interval": (0.2, 0.9)}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = write_sd3(tmp_path_factory.mktemp("sd3") / "pipeline", channels=16)
    write_image_encoder(folder / "image_encoder")
    return folder


@pytest.fixture(scope="module")
def job(sd3, tmp_path_factory):
    workdir = write_run(tmp_path_factory.mktemp("run"), folder=sd3)
    return Job(trained=open_trained(workdir))


@pytest.fixture(scope="module")
def exported(job, tmp_path_factory):
    """The folder alone, not read back."""
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    folder.mkdir()
    FORMAT.write(job, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(job):
    return job.pipeline()


def float_images(pipeline, case, passes=None):
    """The sampler's images in [0, 1], before anything is rounded or put back."""
    example = make_request(case.task, **case.inputs, data=pipeline.config.data).example
    batch = pipeline.collator([pipeline.collator.row(example, task=case.task, sample_id=0)])
    weights = guidance_weights(pipeline.config.sampling.guidance.get(case.task))
    weights = weights if passes is None else guidance_weights(passes)
    passes = [pipeline.collator.drop_conditions(batch, d) for d in NULL_CONDITIONS[: len(weights)]]
    with jax.set_mesh(pipeline.mesh):
        seeds = jnp.full(1, case.seed, jnp.uint32)
        arguments = pipeline.params, pipeline.frozen, passes
        images = pipeline.generator(*arguments, weights=weights, seeds=seeds)
    return (np.asarray(images)[0] + 1) / 2


def noise(seed, *, channels=16):
    """What our sampler begins from, as diffusers has it."""
    shape = SIDE // CELL, SIDE // CELL, channels
    made = sample_noise(jax.random.key(seed), jnp.zeros(1, jnp.uint32), shape)
    return np.asarray(made).transpose(0, 3, 1, 2)


def find_case(task):
    (case,) = compare.make_cases([task], resolution=SIDE)
    return case


@pytest.mark.nightly
def test_the_folder_is_whole_and_makes_the_checkpoints_pictures(job, tmp_path):
    done = export_model(job, "diffusers", tmp_path / "out")
    assert set(done.compared) == set(TASKS)
    folder = tmp_path / "out"
    index = json.loads((folder / "model_index.json").read_text())
    components = {name: kind for name, kind in index.items() if not name.startswith("_")}
    assert all((folder / name).is_dir() for name in components)
    assert (folder / "pipeline.py").read_text().startswith('"""All tasks of a UniVG model')
    for file in (folder / "transformer").glob("*.safetensors"):
        twin = folder / "transformer_t2i" / file.name
        is_first = file.name.startswith("diffusion_pytorch_model-00001")
        assert twin.samefile(file) != is_first, "only the patches' weights are stored twice"
    card = (folder / "README.md").read_text()
    assert "custom_pipeline=DIR" in card
    assert "a scale for the image" in card
    # The transformer is the run's, and so are the sizes that a next stage starts from.
    stored = open_transformer(folder / "transformer")
    params = job.pipeline().params["backbone"]
    jax.tree.map(np.testing.assert_array_equal, stored.read(), jax.tree.map(np.asarray, params))


def test_a_changed_weight_is_found_when_the_folder_is_read_back(job, exported):
    pipeline = read_pipeline(job.config, exported)
    case = find_case("id")
    bias = pipeline.params["identity_projector"]["out"]["bias"]
    changed = jax.tree.map(lambda x: x, pipeline.params)
    changed["identity_projector"]["out"]["bias"] = bias + 1.0
    other = dataclasses.replace(pipeline, params=changed)
    found = compare.differences(
        [case], compare.answer(pipeline, [case]), compare.answer(other, [case])
    )
    with pytest.raises(UserError, match="picture of task id differs by"):
        compare.check(found, tolerance=FORMAT.tolerance)


def test_the_next_stage_begins_from_the_folder(job, exported, pipeline):
    generator, params = pipeline.generator, pipeline.params
    step = TrainStep(
        config=job.config,
        model=generator.model,
        conditioner=generator.conditioner,
        task_names=tuple(TASKS),
    )
    parent = find_parent(InitFrom(path=str(exported)))
    parent.check()
    found = parent.load(jax.tree.map(jnp.zeros_like, params), step, pipeline.mesh).state
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.overrides.position": "rope"}, "no SD3Transformer2DModel with position='rope'"),
        ({"model.overrides.source": "tokens"}, "with source='tokens'"),
        ({"conditioning.text": {"kind": "clip"}, "data.num_tokens": 77}, "text of .* is 'clip'"),
    ],
)
def test_a_run_that_diffusers_cannot_have_is_refused(sd3, tmp_path, settings, message):
    job = Job(trained=open_trained(write_run(tmp_path / "run", folder=sd3, **settings)))
    with pytest.raises(UserError, match=message):
        export_model(job, "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_source_the_folded_model_is_the_same():
    c = 5
    model = make_mmdit("tiny", hidden_dim=24, depth=1, num_heads=2, in_channels=11, out_channels=c)
    model = dataclasses.replace(model, text_dim=6, pooled_dim=7)
    x = np.random.default_rng(0).normal(size=(2, 4, 6, c)).astype(np.float32)
    constant = np.concatenate([np.zeros_like(x), np.ones_like(x[..., :1])], axis=-1)
    inputs = jnp.ones((2, 3, 6)), jnp.ones((2, 7)), jnp.array([0.2, 0.9])
    whole = np.concatenate([x, constant], axis=-1)
    params = random_params(model, whole, *inputs, seed=1)
    leaves = {name: Tensor.of(leaf) for name, leaf in named_leaves(params).items()}
    folded, leaves = without_source(model, leaves)
    alone = jax.tree.unflatten(
        jax.tree.structure(params), [leaves[name].read() for name in named_leaves(params)]
    )
    ours, theirs = (
        module.apply({"params": p}, latents, *inputs)
        for module, p, latents in ((model, params, whole), (folded, alone, x))
    )
    assert folded.in_channels == c
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(ours.std()))  # float32


@pytest.mark.parametrize("quant", [True, False])
def test_the_vae_has_no_variance_and_no_shift_but_the_same_latents(sd3, tmp_path, quant):
    source = sd3 / "vae"
    if quant:  # one that has convolutions of its own there
        model = dataclasses.replace(open_vae(source).module, quant_conv=True, post_quant_conv=True)
        params = random_params(model, jnp.zeros((1, 4, 4, 3)), seed=3)
        config = json.loads((source / "config.json").read_text())
        config |= dict(use_quant_conv=True, use_post_quant_conv=True)
        source = tmp_path / "source"
        write_params(
            source, WEIGHTS, params=params, weights=vae_weights(params, names=VAE), config=config
        )
    tensors, config = steady_vae(source)
    write_sharded(tmp_path / "vae", WEIGHTS, tensors)
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    before, after = open_vae(source), open_vae(tmp_path / "vae")
    assert after.module.shift_factor == 0
    latents, decoded = [], []
    for stored in (before, after):
        params = {"params": {"vae": stored.read()}}
        codec = KLCodec(vae=stored.module)
        latents.append(codec.apply(params, images, method="encode"))
        decoded.append(codec.apply(params, latents[0], method="decode"))
    raw = after.module.apply({"params": after.read()}, images, method="encode_raw")
    assert (raw.logvar == -30).all()
    np.testing.assert_allclose(*latents, atol=1e-5)
    np.testing.assert_allclose(*decoded, atol=1e-5)


def test_the_host_holds_little_more_than_the_largest_parameter(tmp_path):
    model = make_mmdit("tiny", hidden_dim=128, depth=17, num_heads=4, pos_embed_max_size=12)
    shapes = ((1, 2, 2, 33), (1, 1, model.text_dim), (1, model.pooled_dim), (1,))
    abstract = jax.eval_shape(
        model.init, jax.random.key(0), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    )["params"]

    def make(leaf):
        def blocks():
            for i in range(leaf.shape[0]):
                box = slice(i, i + 1), *(slice(0, size) for size in leaf.shape[1:])
                yield box, np.ones((1, *leaf.shape[1:]), np.float32)

        return Tensor(shape=leaf.shape, dtype=np.dtype(np.float32), blocks=blocks)

    leaves = {name: make(leaf) for name, leaf in named_leaves(abstract).items()}
    largest = max(tensor.num_bytes for tensor in leaves.values())
    tensors = transformer_tensors(model, leaves)
    tracemalloc.start()
    write_sharded(tmp_path, "model.safetensors", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * largest


def load_torch(exported, **options):
    """Our pipeline in PyTorch."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        exported, custom_pipeline=str(exported), trust_remote_code=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parity
@pytest.mark.parametrize(
    ("settings", "tasks"), [({}, list(TASKS)), (RARE, ["ie"])], ids=["usual", "rare"]
)
def test_our_pipeline_in_torch_makes_the_images_of_all_tasks(
    exported, pipeline, record_property, settings, tasks
):
    torch = pytest.importorskip("torch")
    pipe, pipeline = load_torch(exported), pipeline.with_sampling(settings)
    pipe.scheduler.register_to_config(_univg={**pipe.settings, **settings})
    errors = {}
    for case in compare.make_cases(tasks, resolution=SIDE):
        case = dataclasses.replace(case, seed=5)
        ours = float_images(pipeline, case)
        theirs = pipe(
            task=case.task, latents=torch.tensor(noise(5)), output_type="np", **case.inputs
        ).images[0]
        assert theirs.std() > 0.05
        if "mask" in case.inputs:
            hole = case.inputs["mask"][..., None] > 0
            ours = np.where(hole, ours, case.inputs["image"] / 255)
        errors[case.task] = np.abs(ours - theirs).max()
    sampling = pipeline.config.sampling
    record_parity(
        record_property,
        network="pipeline.py of an export",
        configuration=f"{', '.join(errors)}; {sampling.steps} {sampling.solver} steps, "
        f"rescale {sampling.rescale}, guidance at times {sampling.interval}",
        image=max(errors.values()),
    )
    assert max(errors.values()) < 1e-3, errors  # of a range of 1: float32 through the whole sampler


@pytest.mark.parity
def test_text_to_image_is_that_of_diffusers_pipeline(exported, pipeline, record_property, recwarn):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    case, sampling = find_case("t2i"), pipeline.config.sampling
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(
        exported, subfolder="transformer_t2i"
    )
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(exported, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        f"<t2i> {case.inputs['prompt']}",
        negative_prompt="<t2i>",
        guidance_scale=sampling.guidance["t2i"].text,
        latents=torch.tensor(noise(case.seed)),
        **common_options(pipeline.config),
    ).images[0]
    error = np.abs(float_images(pipeline, case) - theirs).max()
    record_parity(
        record_property,
        network="StableDiffusion3Pipeline of an export",
        configuration=f"t2i; {sampling.steps} steps, guidance {sampling.guidance['t2i'].text}",
        image=error,
    )
    assert theirs.std() > 0.05
    assert error < 1e-3  # of a range of 1: float32 through the whole sampler


@pytest.mark.parity
def test_outpainting_in_torch_is_that_of_our_pipeline(exported, pipeline, record_property):
    torch = pytest.importorskip("torch")
    picture = np.random.default_rng(2).integers(0, 256, (SIDE - 8, SIDE - 13, 3), np.uint8)
    margins = (13, 5, 0, 3)  # left, top, right, bottom
    canvas, new = extend(picture, margins=margins)
    case = compare.Case(task="ip", inputs={"prompt": "a pig", "image": canvas, "mask": 255 * new})
    ours = np.where(new[..., None] > 0, float_images(pipeline, case), canvas / 255)
    options = dict(task="ip", margins=margins, latents=torch.tensor(noise(0)), output_type="np")
    theirs = load_torch(exported)("a pig", image=picture, **options).images[0]
    error = np.abs(ours - theirs).max()
    record_parity(
        record_property,
        network="pipeline.py of an export",
        configuration=f"outpainting by {margins} pixels; {pipeline.config.sampling.steps} steps",
        image=error,
    )
    assert theirs[new > 0].std() > 0.05
    assert error < 1e-3  # of a range of 1: float32 through the whole sampler


def common_options(config):
    """What our sampler does, as options of diffusers' pipelines."""
    steps = config.sampling.steps
    return dict(
        height=SIDE,
        width=SIDE,
        sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(),
        num_inference_steps=steps,
        max_sequence_length=config.data.num_tokens - 77,
        output_type="np",
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    ("task", "source", "tolerance"),
    [
        ("ip", "ours", 1e-3),  # of a range of 1: float32 through the whole sampler
        ("ie", "ours", 1e-3),
        # It fills the hole with 127.5 of 255, we with 128: the model sees 1/255 of a difference.
        ("ip", "theirs", 2e-2),
    ],
)
def test_inpainting_and_editing_are_those_of_diffusers_pipeline(
    exported, pipeline, record_property, task, source, tolerance
):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    case, sampling = find_case(task), pipeline.config.sampling
    scales = dataclasses.replace(sampling.guidance[task], image=None)
    pipe = diffusers.StableDiffusion3InpaintPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    options, image = {}, Image.fromarray(case.inputs["image"])
    mask = Image.fromarray(case.inputs.get("mask", np.full((SIDE, SIDE), 255, np.uint8)))
    if source == "ours":
        pixels = case.inputs["image"]
        if task == "ip":
            pixels = np.where(case.inputs["mask"][..., None] > 0, np.uint8(128), pixels)
        pixels = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            options["masked_image_latents"] = pipe.vae.encode(pixels).latent_dist.mode()
    theirs = pipe(
        f"<{task}> {case.inputs['prompt']}",
        negative_prompt=f"<{task}>",
        guidance_scale=scales.text,
        image=image,
        mask_image=mask,
        strength=1.0,
        latents=torch.tensor(noise(case.seed)),
        **common_options(pipeline.config),
        **options,
    ).images[0]
    error = np.abs(float_images(pipeline, case, scales) - theirs).max()
    record_parity(
        record_property,
        network="StableDiffusion3InpaintPipeline of an export",
        configuration=f"{task}; {sampling.steps} steps, guidance {scales.text}, "
        + {"ours": "our source", "theirs": "diffusers' source"}[source],
        image=error,
    )
    assert theirs.std() > 0.05
    assert error < tolerance


@pytest.mark.parity
def test_our_pipeline_says_what_is_wrong_and_takes_lists_and_sizes(exported, pipeline):
    torch = pytest.importorskip("torch")
    pipe = load_torch(exported)
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    two = pipe(["a pig", "a cat"], generator=generators, num_inference_steps=1).images
    alone = pipe("a cat", generator=torch.Generator().manual_seed(4), num_inference_steps=1)
    assert np.abs(np.asarray(two[1]).astype(int) - np.asarray(alone.images[0])).max() <= 1
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    wide = pipe(task="depth", image=picture, height=16, width=40, num_inference_steps=1).images[0]
    assert wide.size == (40, 16)
    for arguments, message in [
        (dict(task="deepth"), "unknown task 'deepth'"),
        (dict(task="ie", prompt="a"), "task 'ie' takes image"),
        (dict(task="t2i", prompt="a", face=picture), "task 't2i' takes no picture"),
        (
            dict(prompt="a", negative_prompt="b", guidance_scale=1),
            "negative_prompt changes nothing",
        ),
        (dict(task="id", prompt="a man", face=picture), "has <p> where the person stands"),
        (dict(task="id", prompt="a " * 60 + "<p>", face=picture), "<p> would be cut off"),
        (dict(task="t2i", prompt="a", height=30), "multiples of 8"),
        (dict(task="ie", prompt=["a", "b"], image=[picture]), "lists of different lengths"),
        (dict(task="ie", image=picture, margins=(0, 0, 8, 0)), "margins go with task 'ip'"),
        (dict(task="ip", image=picture, margins=(0, -8, 0, 0)), "pixels to add on some side"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)


IN_TORCH = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline

folder, inputs, images = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
given = dict(np.load(inputs))
options = dict(prompt=str(given.pop("prompt")), latents=torch.tensor(given.pop("latents")))
np.save(images, pipe(task="ip", **options, **given, output_type="np").images)
"""


@pytest.mark.parity
@pytest.mark.slow
def test_the_folder_serves_where_our_package_is_not(exported, pipeline, tmp_path):
    """With torch, diffusers and transformers, the folder elsewhere, and no network."""
    pytest.importorskip("torch")
    folder = shutil.copytree(exported, tmp_path / "folder")
    python = make_python(tmp_path / "venv", ("torch", "diffusers", "transformers"))
    for package in ("univg_jax", "jax"):
        missing = subprocess.run([python, "-I", "-c", f"import {package}"], capture_output=True)
        assert b"ModuleNotFoundError" in missing.stderr
    case = find_case("ip")
    np.savez(tmp_path / "inputs.npz", latents=noise(case.seed), **case.inputs)
    files = [folder, tmp_path / "inputs.npz", tmp_path / "images.npy"]
    offline = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [python, "-I", "-c", IN_TORCH, *map(str, files)]
    done = subprocess.run(command, env=offline, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hole = case.inputs["mask"][..., None] > 0
    ours = np.where(hole, float_images(pipeline, case), case.inputs["image"] / 255)
    assert np.abs(ours - np.load(files[-1])[0]).max() < 1e-3  # as in our own environment


@pytest.mark.parity
def test_the_code_of_the_card_runs(exported, job):
    """As it stands, but for the folder's path."""
    pytest.importorskip("torch")
    code = FORMAT.usage(job).replace("path/of/this/folder", str(exported))
    names = {}
    exec(code, names)
    assert names["fox"].size == names["painted"].size == (SIDE, SIDE)


@pytest.mark.parity
def test_our_pipeline_knows_the_tasks_of_univg_jax(exported, job):
    pytest.importorskip("torch")
    case = find_case("seg")
    (theirs,) = answer_in_torch(job.config, exported, [case])
    assert theirs.shape == (SIDE, SIDE, 3)
    pipe = load_torch(exported)
    inputs = sys.modules[type(pipe).__module__].INPUTS
    assert inputs == {name: task.inputs for name, task in TASKS.items()}
