"""What one step of a checkpoint holds: the shapes of its arrays, and these read onto any mesh.

Trees are stored as nested dicts by path name, so that orbax never sees optax's structures.
"""

import contextlib
import errno
import http
import os
import re
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree
from orbax.checkpoint._src.serialization import tensorstore_utils

from univg_jax import files
from univg_jax.errors import UnreachableError, UserError, shorten
from univg_jax.sizes import size_of
from univg_jax.streaming import Block, Tensor, boxes
from univg_jax.trees import Json, named_leaves, nest

Shapes = Mapping[str, jax.ShapeDtypeStruct | jax.Array]  # of leaves, by name
STATE = "state"  # the item of a step that has its arrays
# Tensorstore reaches buckets by itself, and would ask for a quarter of an hour. Orbax has no option
# for that.
_PATIENCE = {
    "gcs_request_retries": {
        "max_retries": files.RETRIES,
        "initial_delay": "1s",
        "max_delay": f"{files.MAX_DELAY:g}s",
    }
}
tensorstore_utils._BASE_TS_CONTEXT.update(_PATIENCE)
tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT.update(_PATIENCE)
# One piece is read at a time, and none is kept: by default tensorstore would read 32 at once. All
# arrays share it: where each opens one of its own, tensorstore 0.1 crashes now and then.
_ONE_PIECE = tensorstore.Context(
    {
        "cache_pool": {"total_bytes_limit": 0},
        "data_copy_concurrency": {"limit": 1},
        "file_io_concurrency": {"limit": 1},
        **_PATIENCE,
    }
)


def num_retries() -> int:
    """How often this process has sent a request for arrays in a bucket again."""
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/gcs/retries")
    return sum(value["value"] for metric in found for value in metric["values"])


# What a system says of storage that does not do what it is asked. Orbax and tensorstore pass the
# words on, in errors of other kinds and with a page of other text.
_REFUSALS = {
    os.strerror(number): number
    for number in (
        *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT),
        *(errno.EDQUOT, errno.EFBIG, errno.ESTALE, errno.ENOTCONN),
    )
}
_STATUS = re.compile(r"\[http_response_code='(\d+)'\]")  # of a bucket, as tensorstore tells it


@contextlib.contextmanager
def storage_named(said: str, folder: epath.Path) -> Iterator[None]:
    """Raises UserError, which begins as `said`, for what the storage refused inside the block."""
    try:
        yield
    except UserError as error:
        if not isinstance(error, UnreachableError):
            raise
        raise UserError(f"{said}: {error}") from error
    except Exception as error:
        if (cause := _refusal(error)) is None:
            raise
        is_gone = "://" not in os.fspath(folder) and not folder.exists()
        lost = f", {folder} is no longer there" if is_gone else ""
        raise UserError(f"{said}: {cause}{lost}") from error


def _refusal(error: BaseException | None) -> str | None:
    """What the storage said, in an error or in what it comes from; None: it said nothing."""
    while error is not None:
        text = f"{getattr(error, 'strerror', None) or error}"
        if isinstance(error, UnreachableError) or type(error).__module__.startswith("google."):
            return text
        if (status := _STATUS.search(text)) and int(status[1]) in http.HTTPStatus:
            return f"{status[1]} {http.HTTPStatus(int(status[1])).phrase}"
        if said := next((said for said in _REFUSALS if said in text), None):
            return said
        error = error.__cause__ or error.__context__
    return None


def saved_shapes(
    step_dir: epath.Path, prefix: str = "", *, item: str = STATE
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the saved leaves; with a prefix, of that part and under names within it."""
    with _reading(step_dir):
        tree = ocp.PyTreeCheckpointHandler().metadata(_absolute(step_dir) / item).tree
    if prefix:
        if not tree.get(prefix):
            raise UserError(f"{step_dir} has no {prefix!r}; it has {', '.join(sorted(tree))}")
        tree = tree[prefix]
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in named_leaves(tree).items()}


def differences(wanted: Shapes, saved: Shapes, *, dtypes: bool = True) -> list[str]:
    """In which names, shapes and, if they matter, `dtypes` leaves differ, a line each.

    If the model's size differs, that is said first.
    """

    def show(x: jax.ShapeDtypeStruct | jax.Array) -> str:
        return f"{np.dtype(x.dtype).name if dtypes else ''}[{','.join(map(str, x.shape))}]"

    sizes = [size_of(leaves) for leaves in (saved, wanted)]
    return [
        *([] if sizes[0] in (None, sizes[1]) else [f"it is of model.size={sizes[0]}"]),
        *(f"{name} {show(x)} is missing" for name, x in wanted.items() if name not in saved),
        *(f"{name} {show(x)} is extra" for name, x in saved.items() if name not in wanted),
        *(
            f"{name} is {show(saved[name])}, the model's {show(x)}"
            for name, x in wanted.items()
            if name in saved and show(x) != show(saved[name])
        ),
    ]


def check_fits(step_dir: epath.Path, abstract: PyTree, *, prefix: str = "") -> None:
    """Raises UserError if the leaves of `abstract` are not all that is saved (under `prefix`)."""
    saved = {f"{prefix}/{k}" if prefix else k: v for k, v in saved_shapes(step_dir, prefix).items()}
    if problems := differences(named_leaves(abstract), saved):
        raise UserError(f"{step_dir} does not fit the model: {shorten(problems)}")


def read_state(step_dir: epath.Path, abstract: PyTree, *, prefix: str = "") -> PyTree:
    """The tree of `abstract`, which fits (`check_fits`)."""
    check_fits(step_dir, abstract, prefix=prefix)
    wanted = named_leaves(abstract)
    values = named_leaves(read_arrays(step_dir, nest(wanted)))
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in wanted])


def read_arrays(step_dir: epath.Path, nested: PyTree, *, item: str = STATE) -> PyTree:
    """The arrays of a part of what is saved, with the dtypes and the shardings of `nested`.

    Without shardings they are on one device.
    """
    default = SingleDeviceSharding(jax.local_devices()[0])
    nested = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default
        ),
        nested,
    )
    args = ocp.args.PyTreeRestore(
        item=nested,
        restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
        partial_restore=True,
    )
    with _reading(step_dir), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(_absolute(step_dir) / item, args=args)


def _absolute(path: epath.PathLike) -> epath.Path:
    """The path as orbax takes it."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(path))


def stream(folder: epath.PathLike, name: str) -> Tensor:
    """One array of a folder that orbax wrote (`STEP/state`), read in blocks; no device is used."""
    base = os.fspath(_absolute(folder))
    base = base if "://" in base else f"file://{base}"
    kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name.replace('/', '.')}/"}

    def open_array() -> tensorstore.TensorStore:
        spec = {"driver": "zarr", "kvstore": kvstore}
        return tensorstore.open(spec, open=True, read=True, context=_ONE_PIECE).result()

    array = open_array()
    shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
    pieces = array.chunk_layout.read_chunk.shape

    def blocks() -> Iterator[Block]:
        array = open_array()
        for box in boxes(shape, dtype.itemsize, chunks=pieces):
            yield box, array[box].read().result()

    return Tensor(shape=shape, dtype=dtype, blocks=blocks)


def read_item(step_dir: epath.Path, item: str) -> Json:
    """An object that was saved beside the state."""
    with _reading(step_dir), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        value = reader.restore(step_dir / item)
        if not isinstance(value, dict):
            raise ValueError(f"{item} is no JSON object")
    return value


@contextlib.contextmanager
def _reading(step_dir: epath.Path) -> Iterator[None]:
    """Raises UserError for what cannot be read, and for what orbax finds to be no checkpoint.

    Only another writer, or an older version, leaves such a step with sound checksums.
    """
    said = f"{step_dir} cannot be read"
    with storage_named(said, step_dir):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # orbax has no kind of its own
            if _refusal(error) is not None:
                raise
            (first, *_) = str(error).splitlines() or [""]
            raise UserError(f"{said}: {type(error).__name__}: {first:.200}") from error
