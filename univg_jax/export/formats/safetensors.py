"""Hugging Face style: safetensors files with their index, `config.json`, and the encoders."""

from pathlib import Path

from univg_jax.export import folder
from univg_jax.export.format import Format
from univg_jax.export.job import Job
from univg_jax.interop.writing import write_sharded
from univg_jax.trained import WEIGHTS


def write(job: Job, out: Path) -> None:
    """Writes the parameters tensor by tensor, and all else that `Pipeline.load` reads."""
    tensors = {name.replace("/", "."): tensor for name, tensor in job.tensors.items()}
    write_sharded(out, WEIGHTS, tensors, max_file_bytes=job.max_file_bytes)
    folder.write_rest(job, out)


FORMAT = Format(
    title="safetensors in Hugging Face's layout",
    opened_by="`Pipeline.load`, commands that take --checkpoint, `init_from`, and safetensors",
    write=write,
    reload=folder.reload,
    usage=folder.usage,
    num_bytes=folder.num_bytes,
    dtypes=("f32", "bf16", "int8"),
)
