"""The generations of Cloud TPU: what a device can do, and what the compiler is told about it.

Peaks are those that Google publishes for a chip (cloud.google.com/tpu/docs, the pages v4, v5e, v5p,
v6e and tpu7x), in bf16 without sparsity. The published bandwidth of the interconnect counts both
directions; here it is halved, since a device sends and receives at the same time. HBM is what the
compiler lets a program use, which is less than the published capacity. Network cards are published
for hosts of v5e (2 x 100 Gbit/s) and v6e (4 x 200); the figures of the others are assumptions.
"""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # every command calls `silence_if_absent`, and some need no JAX
    import jax

GIB = 2**30
SOURCE = "cloud.google.com/tpu/docs, of bf16 without sparsity"
_GOOGLE = "0x1ae0"  # the vendor of a TPU on the PCI bus


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, by libtpu's count of devices.

    A chip of tpu7x is two devices, so it can do twice as much as stands here. The two cores of a v4
    are one device (megacore), as JAX runs on real ones; libtpu describes them so by a
    configuration's name.
    """

    name: str
    kind: str  # `jax.Device.device_kind`
    sides: int  # dimensions of a slice's torus: 2 or 3
    unit: int  # rows and columns of its matrix units
    flops: float  # a second, in bf16
    hbm: float  # bytes that a program may use
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second, received over all links to other chips together
    dcn_bandwidth: float  # bytes a second, a device's share of its host's network cards
    libtpu_config: str = ""  # libtpu's name of the chip's configuration; none is its default


# fmt: off
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    #    name,    kind,          sides, unit, FLOP/s, HBM and its rate, ICI, DCN
    Chip("v4",    "TPU v4",      3, 128, 275e12, 30.75 * GIB, 1228e9, 300e9, 3.1e9,
         libtpu_config="megacore"),
    Chip("v5e",   "TPU v5 lite", 2, 128, 197e12, 15.75 * GIB, 819e9, 200e9, 3.1e9),
    Chip("v5p",   "TPU v5",      3, 128, 459e12, 95.74 * GIB, 2765e9, 600e9, 6.2e9),
    Chip("v6e",   "TPU v6 lite", 2, 256, 918e12, 31.25 * GIB, 1600e9, 400e9, 12.5e9),
    Chip("tpu7x", "TPU7x",       3, 256, 1153.5e12, 94.75 * GIB, 3690e9, 300e9, 6.25e9),
)}
# fmt: on

# Options of the compiler for a training step, per platform. They go with the program
# (`jax.jit(compiler_options=...)`), so that no environment variable has to be set on every host.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {
        # Without these six the compiler writes a gather of weights as an all-reduce of arrays that
        # are zero outside a device's own shard: twice the traffic, and nothing runs beside it. The
        # first two ask for asynchronous all-gathers instead.
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
        "xla_enable_async_all_gather": "true",
        # The other four let a collective run beside products that do not need its result, over as
        # many of them as it takes.
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
    "gpu": {
        # The weights of the next layer are gathered while this one computes.
        "xla_gpu_enable_latency_hiding_scheduler": True
    },
}


def silence_if_absent() -> None:
    """Tells libtpu not to search for TPUs on a machine that has none.

    libtpu would otherwise ask the cloud's metadata server what kind of host it is on, wait for an
    answer that does not come, and log errors. The host's type is then taken from the environment;
    which type it names does not matter, since nothing runs on it. Values that are already set stay.
    """
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    if any(path.read_text().strip() == _GOOGLE for path in vendors):
        return
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # libtpu refuses to load twice, to protect the devices; compiling alone uses none.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def compiler_options(device: "jax.Device") -> dict[str, Any]:
    """What a training step on such devices is compiled with."""
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return COMPILER_OPTIONS.get(platform, {})
