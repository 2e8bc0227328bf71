"""What the formats that univg_jax reads back have beside their parameters."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.tasks import TASKS
from univg_jax import assembly, encoders
from univg_jax.export.compare import answer
from univg_jax.export.format import Answer
from univg_jax.export.job import Job
from univg_jax.files import write_whole
from univg_jax.pipeline import Pipeline, trained_tasks
from univg_jax.pretrained import local_path
from univg_jax.trained import PRETRAINED
from univg_jax.workdir import CONFIG


def write_rest(job: Job, folder: Path) -> None:
    """Writes `config.json`, the encoders' record with fitted weights, and copies of pretrained."""
    write_whole(folder / CONFIG, json.dumps(network(job), indent=1))
    encoders.copy_records(job.trained.folder, folder)
    for file in pretrained_files(job):
        to = folder / PRETRAINED / file.relative_to(local_path(job.config.conditioning.folder))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)


def num_bytes(job: Job) -> int:
    """About what is written: the parameters, the fitted encoders and copies of pretrained ones."""
    own = [f.stat().length for f in (job.trained.folder / "encoders").iterdir()]
    return job.num_bytes + sum(own) + sum(f.stat().st_size for f in pretrained_files(job))


def pretrained_files(job: Job) -> list[Path]:
    """The files of pretrained encoders that are copied."""
    return encoders.pretrained_files(job.config.conditioning) if job.copy_encoders else []


def network(job: Job) -> dict[str, Any]:
    """The network's sizes, as `config.json` has them for people and other programs."""
    conditioner = encoders.abstract(job.config.conditioning).conditioner
    model = assembly.make_model(job.config, conditioner)
    fields = {f.name: getattr(model.backbone, f.name) for f in dataclasses.fields(model.backbone)}
    plain = {
        name: value if isinstance(value, str | int | float | bool | None) else np.dtype(value).name
        for name, value in fields.items()
        if name not in ("parent", "name")
    }
    return {
        "model_type": "univg",
        "architectures": ["UniVG"],
        "torch_dtype": {"f32": "float32", "bf16": "bfloat16"}.get(job.dtype, job.dtype),
        "backbone": plain,
        "face_dim": model.face_dim,
        "latent_channels": conditioner.latent_channels,
        "pixels_per_latent": conditioner.downsampling,
    }


def usage(job: Job) -> str:
    """Code that makes a picture."""
    task = TASKS[trained_tasks(job.config)[0]]
    inputs = [f'{name}="{name}.png"' for name in task.inputs]
    if task.prompt != "none":
        inputs.append(f'prompt="{task.prompt_example}"')
    return f"""from univg_jax import Pipeline

pipe = Pipeline.load("path/of/this/folder")
pipe.run("{task.name}", {", ".join(inputs)}).image.save("picture.png")"""


def reload(job: Job, folder: Path) -> Answer:
    """The pictures of the `Pipeline` that is loaded from what was written."""
    pipeline = Pipeline.load(folder, pretrained=None if job.copy_encoders else job.pretrained)
    return lambda cases: answer(pipeline, cases)
