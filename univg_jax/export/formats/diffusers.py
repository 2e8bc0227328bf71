"""A whole pipeline for diffusers: of a run with Stable Diffusion 3's text encoders and VAE.

The model is `transformer`, which `StableDiffusion3InpaintPipeline` opens. `transformer_t2i` is the
same without a source, for `StableDiffusion3Pipeline`: but for the patches' weights its files are
hard links to those of `transformer`. `pipeline.py` beside them has all tasks.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from data_pipelines.collate import Collator
from data_pipelines.tokenizer import CLIP_POSITIONS, load_tokenizer
from univg_jax import assembly, encoders, sharding
from univg_jax.batch import BatchShape
from univg_jax.errors import UserError, needs_extra
from univg_jax.export import compare
from univg_jax.export.compare import Case
from univg_jax.export.format import Answer, Format
from univg_jax.export.job import Job
from univg_jax.files import read_json, write_whole
from univg_jax.flow import sample_noise
from univg_jax.interop.diffusers import (
    PATCHES,
    PROJECTOR,
    WEIGHTS,
    load_projector,
    load_transformer,
    projector_weights,
    steady_vae,
    transformer_tensors,
    without_source,
)
from univg_jax.interop.folder import stored_tensors
from univg_jax.interop.sd3_config import UNMARKED, config_of
from univg_jax.interop.writing import write_sharded, write_tensors
from univg_jax.models.mmdit import MMDiT
from univg_jax.models.univg import UniVG
from univg_jax.pipeline import Pipeline, trained_tasks
from univg_jax.pretrained import local_path
from univg_jax.settings import Config, Guidance
from univg_jax.streaming import Tensor
from univg_jax.trees import nest

Image = UInt8[np.ndarray, "h w 3"]

KINDS = {"text": ("sd3",), "codec": ("vae",), "identity": ("clip", None)}
# Our pipeline in PyTorch. It is copied and never imported: univg_jax does without torch.
PIPELINE = Path(__file__).parents[1] / "templates" / "pipeline.py"
FACE_ENCODER = "CLIPVisionModelWithProjection"
SETTINGS = "_univg"  # in the scheduler's config; diffusers keeps names with an underscore
INPAINT_CHANNELS = 16  # of a latent, the only number that its inpainting pipeline takes
COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def check(job: Job) -> None:
    """Raises UserError for a run with other encoders, or a model that diffusers does not have."""
    for role, kinds in KINDS.items():
        chosen = getattr(job.config.conditioning, role)
        kind = chosen.get("kind") if isinstance(chosen, Mapping) else chosen
        if kind not in kinds:
            raise UserError(
                f"format diffusers: conditioning.{role} of {job.trained.path} is {kind!r}, where "
                f"diffusers has {kinds[0]!r}: export a run with encoders=sd3, or this one in "
                "another format"
            )
    config_of(_model(job.config).backbone)


def num_bytes(job: Job) -> int:
    """About what is written: the parameters, and copies of the encoders."""
    files = encoders.pretrained_files(job.config.conditioning)
    return job.num_bytes + sum(file.stat().st_size for file in files)


def write(job: Job, folder: Path) -> None:
    """Writes the pipeline's folder tensor by tensor."""
    config = job.config
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in job.tensors.items():
        part, _, inner = name.partition("/")
        parts.setdefault(part, {})[inner] = tensor
    _write_transformers(_model(config).backbone, parts["backbone"], folder, job.max_file_bytes)
    if PROJECTOR in parts:
        _write_projector(parts[PROJECTOR], folder / PROJECTOR)
    source = local_path(config.conditioning.folder)
    for file in encoders.pretrained_files(config.conditioning):
        name = file.relative_to(source)
        if name.parts[0] != "vae":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
    tensors, vae = steady_vae(source / "vae")
    write_sharded(folder / "vae", WEIGHTS, tensors, max_file_bytes=job.max_file_bytes)
    _write_json(folder / "vae" / "config.json", vae)
    scheduler = {
        "_class_name": COMPONENTS["scheduler"][1],
        "_diffusers_version": UNMARKED,
        "num_train_timesteps": 1000,
        "shift": config.sampling.shift,
        SETTINGS: _settings(config),
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {"_class_name": "StableDiffusion3InpaintPipeline", "_diffusers_version": UNMARKED}
    index |= {
        name: kind if (folder / name).is_dir() else (None, None)
        for name, kind in COMPONENTS.items()
    }
    _write_json(folder / "model_index.json", index)
    write_whole(folder / PIPELINE.name, PIPELINE.read_bytes())


def _settings(config: Config) -> dict[str, Any]:
    """What `pipeline.py` has to know of the run."""
    sampling = dataclasses.asdict(config.sampling)
    del sampling["shift"]  # the scheduler has it
    settings = {
        "tasks": trained_tasks(config),
        **sampling,
        "num_tokens": config.data.num_tokens,
        "resolution": config.data.resolution,
    }
    if (identity := encoders.abstract(config.conditioning).conditioner.identity) is not None:
        kind = "CLIPVisionModel" if identity.clip.projection_dim is None else FACE_ENCODER
        settings |= {"face_resolution": config.data.face_resolution, "face_encoder": kind}
    return settings


def _write_transformers(
    model: MMDiT, leaves: Mapping[str, Tensor], folder: Path, max_file_bytes: int
) -> None:
    """Writes `transformer`, and `transformer_t2i` with links to all files but the first."""
    whole, alone = folder / "transformer", folder / "transformer_t2i"
    tensors = transformer_tensors(model, leaves)
    write_sharded(whole, WEIGHTS, tensors, max_file_bytes=max_file_bytes, apart=PATCHES)
    _write_json(whole / "config.json", config_of(model))
    folded, leaves = without_source(model, leaves)
    tensors = transformer_tensors(folded, leaves)
    index = read_json(whole / f"{WEIGHTS}.index.json")
    first = index["weight_map"][PATCHES[0]]
    write_tensors(alone / first, {name: tensors[name] for name in PATCHES})
    for file in set(index["weight_map"].values()) - {first}:
        try:
            os.link(whole / file, alone / file)
        except OSError:  # a file system without hard links
            shutil.copyfile(whole / file, alone / file)
    index["metadata"]["total_size"] = sum(tensor.num_bytes for tensor in tensors.values())
    _write_json(alone / f"{WEIGHTS}.index.json", index)
    _write_json(alone / "config.json", config_of(folded))


def _model(config: Config) -> UniVG:
    """The run's model; of the encoders only headers are read."""
    return assembly.make_model(config, encoders.abstract(config.conditioning).conditioner)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")


def _write_projector(leaves: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the weights of the class `IdentityProjector` of `pipeline.py`."""
    tensors = stored_tensors(leaves, projector_weights(nest(leaves)))
    write_sharded(folder, WEIGHTS, tensors)
    face_dim, text_dim = leaves["in/kernel"].shape
    config = {"_class_name": "IdentityProjector", "face_dim": face_dim, "text_dim": text_dim}
    _write_json(folder / "config.json", config)


def reload(job: Job, folder: Path) -> Answer:
    """The pictures of the networks in the folder, each read from it by our readers.

    Where PyTorch and diffusers are installed, `pipeline.py` makes one picture, too. It must be the
    one that we make in float32: in bfloat16 the two round otherwise.
    """

    def answer(cases: Sequence[Case]) -> Sequence[Image]:
        made = compare.answer(read_pipeline(job.config, folder), cases)
        if all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers"))):
            ours = compare.answer(read_pipeline(_in_float32(job.config), folder), cases[:1])
            theirs = answer_in_torch(job.config, folder, cases[:1])
            found = compare.differences(cases[:1], ours, theirs)
            compare.check(found, tolerance=FORMAT.tolerance)
        return made

    return answer


def read_pipeline(config: Config, folder: Path) -> Pipeline:
    """The pipeline of an exported folder, with all weights from it; the config says how to sample.

    Raises UserError if something in the folder is not what was written.
    """
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    conditioning = dataclasses.replace(config.conditioning, folder=str(folder))
    nothing = dict(images=tuple, portraits=tuple)  # none of these encoders is fitted
    with tempfile.TemporaryDirectory() as workdir:
        found = encoders.prepare(conditioning, workdir=workdir, mesh=mesh, **nothing)
    model = assembly.make_model(config, found.conditioner)
    params = {"backbone": load_transformer(folder / "transformer", mesh=mesh)[1]}
    if model.face_dim is not None:
        params[PROJECTOR] = load_projector(folder / PROJECTOR, mesh=mesh)[1]
    shape = BatchShape.of(config.data)
    return Pipeline(
        config=config,
        params=params,
        frozen=found.frozen,
        mesh=mesh,
        generator=assembly.make_generator(config, model, found.conditioner),
        collator=Collator(tokenizer=load_tokenizer(str(folder)), shape=shape),
        path=str(folder),
    )


def _in_float32(config: Config) -> Config:
    """The same model, computed in float32."""
    stored = config.to_dict()
    stored["model"]["overrides"] = {**stored["model"]["overrides"], "dtype": "float32"}
    for role, kinds in KINDS.items():
        if stored["conditioning"][role] is not None:
            stored["conditioning"][role] = {"kind": kinds[0], "dtype": "float32"}
    return Config.of(stored)


def answer_in_torch(config: Config, folder: Path, cases: Sequence[Case]) -> list[Image]:
    """What `pipeline.py` makes of the noise that our sampler begins from, in float32."""
    with needs_extra("parity", "diffusers"):
        import torch
        from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    vae = pipe.vae.config
    side = config.data.resolution // 2 ** (len(vae.block_out_channels) - 1)
    made = []
    for case in cases:
        key, sample_id = jax.random.key(case.seed), jnp.zeros(1, jnp.uint32)
        noise = np.asarray(sample_noise(key, sample_id, (side, side, vae.latent_channels)))
        noise = torch.tensor(noise.transpose(0, 3, 1, 2))
        made += pipe(task=case.task, latents=noise, **case.inputs).images
    return [np.asarray(image) for image in made]


def limits(job: Job) -> list[str]:
    """What the pipelines of diffusers cannot do; `pipeline.py` can."""
    config = job.config
    conditioner = encoders.abstract(config.conditioning).conditioner
    positions, cell = config.data.num_tokens - CLIP_POSITIONS, conditioner.downsampling
    found = [
        "`pipeline.py` lacks nothing of the sampler. It takes the central window of a picture, and "
        "draws its noise with PyTorch: a seed has another picture than in univg_jax. Outpainting "
        "is task ip with `margins`, at the `height` and `width` that are given. All that "
        "follows is of diffusers' own pipelines.",
        "`StableDiffusion3Pipeline` makes text-to-image alone, with `transformer_t2i`: there the "
        "constant source and mask are part of the first layer's bias.",
        "Prompts begin with the tag of their task, such as `<t2i> `; the negative prompt is the "
        f"tag, and `max_sequence_length` {positions}.",
        "Our times are `sigmas=np.linspace(1, 0, steps + 1)[:-1]`; by default diffusers takes "
        "others. The solver is Euler's, and guidance acts at all times and is not rescaled.",
        "`StableDiffusion3InpaintPipeline` needs `strength=1`, and masks whose edges lie between "
        f"cells of {cell} pixels: it takes a cell's first pixel, we take a cell with any pixel. It "
        "does not put the pixels that are kept back into the picture.",
        "Its source goes in as `masked_image_latents`, with 128 of 255 in the hole; what it makes "
        "of `image` itself has 127.5 there. A source without a hole (tasks ie, lg, depth, pose, "
        "seg) can only go in so, with a white mask.",
        "It has guidance by text alone: editing with a scale for the image has no equivalent.",
        "It has no identity: no task id, `<p>` and faces.",
        "The 1x1 convolutions of the VAE have the shift of the latents, and its variance is zero, "
        "so that every pipeline encodes as the training did. Do not train a VAE from it.",
    ]
    if conditioner.latent_channels != INPAINT_CHANNELS:
        found.append(
            f"`StableDiffusion3InpaintPipeline` takes latents of {INPAINT_CHANNELS} channels only, "
            f"and these have {conditioner.latent_channels}."
        )
    return found


def usage(job: Job) -> str:
    """Code that makes a picture with our pipeline, and with those of diffusers."""
    config = job.config
    side, sampling = config.data.resolution, config.sampling
    scale = {task: sampling.guidance.get(task, Guidance()).text or 1.0 for task in ("t2i", "ip")}
    return f"""import numpy as np
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from diffusers import StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from PIL import Image

DIR = "path/of/this/folder"
# All tasks, sampled as in training:
pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
fox = pipe("a red fox in the snow").images[0]

# Text-to-image by diffusers' own pipeline:
options = dict(
    sigmas=np.linspace(1, 0, {sampling.steps} + 1)[:-1].tolist(),
    num_inference_steps={sampling.steps},
    max_sequence_length={config.data.num_tokens - CLIP_POSITIONS},
    height={side},
    width={side},
)
transformer = SD3Transformer2DModel.from_pretrained(DIR, subfolder="transformer_t2i")
pipe = StableDiffusion3Pipeline.from_pretrained(DIR, transformer=transformer)
prompt = dict(prompt="<t2i> a red fox", negative_prompt="<t2i>", guidance_scale={scale["t2i"]})
fox = pipe(**prompt, **options).images[0]

# In- and outpainting by diffusers' own pipeline; in the hole the source is gray:
pipe = StableDiffusion3InpaintPipeline.from_pretrained(DIR)
mask = np.zeros(({side}, {side}), np.uint8)
mask[{side // 4}:{side // 2}, {side // 4}:{side // 2}] = 255
pixels = np.where(mask[..., None] > 0, 128, np.asarray(fox))
pixels = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
source = pipe.vae.encode(pixels).latent_dist.mode()
pictures = dict(image=fox, mask_image=Image.fromarray(mask), masked_image_latents=source)
prompt = dict(prompt="<ip> a red fox", negative_prompt="<ip>", guidance_scale={scale["ip"]})
painted = pipe(**prompt, **pictures, strength=1.0, **options).images[0]"""


FORMAT = Format(
    title="a pipeline's folder for diffusers",
    opened_by="diffusers (`pipeline.py` in it has all tasks)",
    write=write,
    reload=reload,
    usage=usage,
    num_bytes=num_bytes,
    check=check,
    limits=limits,
    holds_encoders=True,
)
