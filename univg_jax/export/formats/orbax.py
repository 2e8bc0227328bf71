"""Parameters alone in a folder of orbax, which restores them onto any devices."""

import math
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import tensorstore

from univg_jax.export import folder
from univg_jax.export.format import Format
from univg_jax.export.job import Job
from univg_jax.streaming import BLOCK_BYTES, Box, Tensor
from univg_jax.trained import PARAMS
from univg_jax.trees import nest

# Orbax's own context keeps 100 MB of what was written.
_NO_CACHE = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 0}})


class _TensorHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `Tensor` as orbax writes an array, but one block after the other."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(
        self, value: Tensor, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        blocks = iter(value.blocks())
        first, block = next(blocks)
        tspec["metadata"]["chunks"] = _pieces(first, value.dtype.itemsize)
        array = tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=_NO_CACHE
        ).result()
        box = first
        while block is not None:
            # No `await`, which would begin the next tensor before this one is written.
            array[box].write(block, can_reference_source_data_indefinitely=True).result()
            del block  # or it stays while the next one is read
            box, block = next(blocks, (None, None))


def _pieces(box: Box, itemsize: int) -> list[int]:
    """The shape of the file's pieces, which divide every block, so that none is written twice."""
    shape = [cut.stop - cut.start for cut in box]
    cut = next((axis for axis, size in enumerate(shape) if size > 1), 0)
    while shape and shape[cut] % 2 == 0 and math.prod(shape) * itemsize > BLOCK_BYTES:
        shape[cut] //= 2
    return shape


def write(job: Job, out: Path) -> None:
    """Writes the parameters tensor by tensor, and all else that `Pipeline.load` reads."""
    registry = ocp.type_handlers.create_type_handler_registry((Tensor, _TensorHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as writer:
        writer.save(out.absolute() / PARAMS, args=ocp.args.PyTreeSave(nest(job.tensors)))
    folder.write_rest(job, out)


def usage(job: Job) -> str:
    """Code that makes a picture, and code that reads the parameters without univg_jax."""
    return f"""{folder.usage(job)}

# The parameters alone, as numpy arrays, with orbax.
import orbax.checkpoint as ocp

params = ocp.PyTreeCheckpointer().restore("/absolute/path/of/this/folder/{PARAMS}")"""


FORMAT = Format(
    title="orbax, for JAX on any devices",
    opened_by="`Pipeline.load`, commands that take --checkpoint, `init_from`, and orbax",
    write=write,
    reload=folder.reload,
    usage=usage,
    num_bytes=folder.num_bytes,
)
