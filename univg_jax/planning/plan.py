"""What a config would cost on a TPU that is not here: its real programs, compiled for it ahead of
time.

libtpu compiles for any topology it knows on any Linux machine. From each program come its memory,
FLOPs, and collectives (`univg_jax.planning.hlo`); with the chip's published peaks (`univg_jax.tpu`) they
bound a step's time from below:

    roofline = max(FLOPs / peak, HBM bytes / HBM bandwidth, ICI bytes / ICI bandwidth, DCN bytes /
    DCN bandwidth) MFU <= model FLOPs / (peak x roofline)

Model FLOPs are `MMDiT.matmul_flops`: without recomputation, padding or encoders. All figures are of
one device.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from univg_jax import sharding, tpu
from univg_jax.batch import Batch, batch_spec
from univg_jax.conditioning import Conditioner
from univg_jax.errors import check_name
from univg_jax.planning import hlo
from univg_jax.sampling import Generator
from univg_jax.training.loop import VALIDATION_TIMES, Step

PROGRAMS = ("train", "sampling", "evaluation")
LARGE = 4 * 2**20  # bytes; a larger leaf that lies whole on every device is reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for: `v5p:4x4x4`, or `v6e:16x16*2` for two slices that a data center
    network joins.
    """

    name: str
    chip: tpu.Chip
    slices: int
    devices: Sequence[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program, per device and run. Memory in bytes; `over` is by how much it does not
    fit, else 0.
    """

    name: str
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0  # all at once: arguments, temporaries and results when they are most, and code
    over: float = 0.0
    model_flops: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: tuple[hlo.Collective, ...] = ()
    ideal_wire_bytes: float = 0.0
    # lower bounds, by what bounds
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        return self.over == 0

    @property
    def wire_bytes(self) -> float:
        return sum(c.wire_bytes for c in self.collectives)

    @property
    def roofline(self) -> float:
        """Seconds that a run takes at least."""
        return max(self.seconds.values(), default=0.0)

    @property
    def bound(self) -> str:
        """What the roofline is made of."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else ""

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of HBM."""
        return self.flops / max(self.memory_bytes, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A config on a topology."""

    config: str
    topology: str
    chip: tpu.Chip
    devices: int
    mesh: dict[str, int]
    model: dict[str, Any]  # remat, attention, dtype
    optimizer: dict[str, Any]  # name, mu_dtype
    parameters: int
    batch: int
    encoders: bool  # whether they are part of the train step
    replicated: tuple[str, ...]  # leaves larger than LARGE that lie whole on every device
    programs: tuple[Program, ...]

    @property
    def rows(self) -> float:
        """Rows of the batch on a device."""
        return self.batch / (self.mesh["data"] * self.mesh["fsdp"])

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    def mfu_bound(self, program: Program) -> float:
        """The share of the peak that model FLOPs can reach."""
        return (
            program.model_flops / (self.chip.flops * program.roofline) if program.roofline else 0.0
        )


def open_topology(name: str) -> Topology:
    """The devices of `GENERATION:AxBxC`, or of N slices of them, `GENERATION:AxBxC*N`. Raises
    ValueError for others.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)(?:\*(\d+))?", name)
    if found is None:
        raise ValueError(
            f"topology {name!r} should read GENERATION:AxB or AxBxC, as v5p:4x4x4, with *N for N slices"
        )
    generation, shape, slices = found[1], found[2], int(found[3] or 1)
    chip = tpu.CHIPS[check_name(generation, tpu.CHIPS, what="TPU generation")]
    if len(shape.split("x")) != chip.sides:
        sides = "AxBxC"[: 2 * chip.sides - 1]
        raise ValueError(
            f"topology {name!r}: a slice of {generation} is {sides}; N slices are {generation}:{sides}*N"
        )
    tpu.silence_if_absent()
    try:
        described = topologies.get_topology_desc(
            f"{generation}:{shape}", platform="tpu", num_slices=slices
        )
    except Exception as error:
        if "libtpu" in str(error) and "not" in str(error).lower() and "found" in str(error).lower():
            raise ValueError(
                "planning needs libtpu, the compiler: pip install 'univg_jax[tpu]' (Linux)"
            ) from None
        raise ValueError(f"libtpu knows no topology {name}: {str(error).splitlines()[0]}") from None
    return Topology(name=name, chip=chip, slices=slices, devices=described.devices)


def compile_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    conditioner: Conditioner,
    frozen: Any,
    generator: Generator,
    passes: int,
    task_names: Sequence[str],
    programs: Iterable[str] = ("train",),
    encoders: bool = False,
    quick: bool = False,
) -> Plan:
    """Compiles `programs` of `config` for `topology`.

    `frozen` are the shapes of the encoders' parameters (`encoders.abstract`); `encoders` says
    whether they are in the train step, else it begins from latents and embeddings. `passes` is how
    many guided passes sampling takes. `quick` asks the compiler for less effort: in a third of the
    time, the same products and collectives, with memory and its traffic some percent off. Raises
    ValueError for a mesh or a batch that does not fit the devices.
    """
    model = generator.model
    mesh = sharding.make_mesh(
        **config.mesh, width=model.backbone.hidden_dim, devices=topology.devices
    )
    if config.data.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(
            f"data.batch_size={config.data.batch_size} does not divide over data x fsdp = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices"
        )
    before = jax.sharding.get_mesh()
    jax.set_mesh(mesh)
    try:
        compiler = _Compiler(
            config=config,
            topology=topology,
            mesh=mesh,
            step=Step(
                config=config, model=model, conditioner=conditioner, task_names=tuple(task_names)
            ),
            frozen=frozen,
            generator=generator,
            passes=passes,
            encoders=encoders,
            quick=quick,
        )
        return compiler.plan(programs)
    finally:
        jax.set_mesh(before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compiler:
    config: ConfigDict
    topology: Topology
    mesh: Mesh
    step: Step
    frozen: Any
    generator: Generator
    passes: int
    encoders: bool
    quick: bool

    def plan(self, programs: Iterable[str]) -> Plan:
        state = self.state
        backbone = self.step.model.backbone
        return Plan(
            config=self.config.name,
            topology=self.topology.name,
            chip=self.topology.chip,
            devices=self.mesh.size,
            mesh=dict(self.mesh.shape),
            model=dict(
                remat=backbone.remat,
                attention=str(backbone.attention),
                dtype=str(jnp.dtype(backbone.dtype)),
            ),
            optimizer=dict(name=self.config.optim.name, mu_dtype=self.config.optim.mu_dtype),
            parameters=sum(x.size for x in jax.tree.leaves(state.params)),
            batch=self.config.data.batch_size,
            encoders=self.encoders,
            replicated=tuple(
                leaf.path
                for tree in (state, self.placed_frozen)
                for leaf in sharding.leaf_specs(
                    tree, jax.tree.map(lambda x: x.sharding, tree), larger_than=LARGE
                )
                if not any(leaf.spec) and self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1
            ),
            programs=tuple(
                getattr(self, check_name(name, PROGRAMS, what="program"))() for name in programs
            ),
        )

    def batch(self, size: int) -> Batch:
        c = self.config.data
        shape = dict(
            resolution=c.resolution, num_tokens=c.num_tokens, face_resolution=c.face_resolution
        )
        return sharding.with_shardings(
            batch_spec(batch_size=size, **shape), sharding.batch_sharding(self.mesh)
        )

    @functools.cached_property
    def train_batch(self) -> Batch:
        return self.batch(self.config.data.batch_size)

    @functools.cached_property
    def placed_frozen(self) -> Any:
        return sharding.with_shardings(self.frozen, sharding.tree_shardings(self.frozen, self.mesh))

    @functools.cached_property
    def encoded(self) -> Any:
        shapes = jax.eval_shape(self.step.encode, self.frozen, self.train_batch)
        return sharding.with_shardings(shapes, sharding.batch_sharding(self.mesh))

    @functools.cached_property
    def state(self) -> Any:
        # The key is made inside: on this mesh nothing can be computed.
        shapes = jax.eval_shape(
            lambda *inputs: self.step.init(jax.random.key(0), *inputs),
            self.frozen,
            self.train_batch,
        )
        return sharding.with_shardings(shapes, sharding.tree_shardings(shapes, self.mesh))

    def train(self) -> Program:
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        inputs = (self.placed_frozen,) if self.encoders else self.encoded
        rows = self.config.data.batch_size / self.mesh.size
        return self._compile(
            "train",
            self.step.compiled_update(shardings, encoded=not self.encoders),
            (self.state, *inputs, self.train_batch),
            model_flops=rows * self._model_flops(train=True),
            ideal=self._ideal_wire_bytes(train=True),
        )

    def evaluation(self) -> Program:
        """The validation of one batch, at all its times, encoders included."""
        rows = self.config.data.batch_size / self.mesh.size
        times = len(VALIDATION_TIMES)
        return self._compile(
            "evaluation",
            jax.jit(self.step.validate),
            (self.state.params, self.placed_frozen, self.train_batch),
            model_flops=rows * times * self._model_flops(train=False),
            ideal=times * self._ideal_wire_bytes(train=False),
        )

    def sampling(self) -> Program:
        """The whole of sampling one row a device: encoders, all steps of the solver, the decoder."""
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        whole = sharding.replicated(self.mesh)
        evaluations = self.generator.sampler.steps * (
            2 if self.generator.sampler.solver == "heun" else 1
        )
        weights = jax.ShapeDtypeStruct((self.passes,), jnp.float32, sharding=whole)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self._compile(
            "sampling",
            jax.jit(functools.partial(Generator.generate, self.generator)),
            (
                self.state.ema,
                self.placed_frozen,
                (self.batch(rows),) * self.passes,
                weights,
                jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
            ),
            model_flops=rows
            / self.mesh.size
            * self.passes
            * evaluations
            * self._model_flops(train=False),
            ideal=evaluations * self._ideal_wire_bytes(train=False),
        )

    def _model_flops(self, *, train: bool) -> float:
        latents, conditions = self.encoded
        _, height, width, _ = latents.shape
        return self.step.model.backbone.matmul_flops(
            height=height, width=width, num_tokens=conditions.text_emb.shape[1], train=train
        )

    def _ideal_wire_bytes(self, *, train: bool) -> float:
        """What fully sharded training has to move, in the dtype of the computation.

        For each part of the batch all weights gathered forwards and backwards and all gradients
        scattered; then shards summed over `data`. Without training, all weights gathered once.
        """
        data, fsdp = self.mesh.shape["data"], self.mesh.shape["fsdp"]
        itemsize = jnp.dtype(self.step.model.backbone.dtype).itemsize
        size = (
            sum(x.size for x in jax.tree.leaves(self.state.params))
            * itemsize
            / self.mesh.shape["tensor"]
        )
        moves = 3 * self.config.optim.accumulate if train else 1
        over_data = 2 * (data - 1) / data * size / fsdp if train else 0.0
        return moves * (fsdp - 1) / fsdp * size + over_data

    def _compile(
        self, name: str, function: Any, inputs: tuple, *, model_flops: float, ideal: float
    ) -> Program:
        begin = time.monotonic()
        chip = self.topology.chip
        lowered = function.trace(*inputs).lower(lowering_platforms=("tpu",))
        try:
            compiled = lowered.compile(
                {"exec_time_optimization_effort": -1.0} if self.quick else None
            )
        except jax.errors.JaxRuntimeError as error:
            if (temporaries := _exhausted(str(error))) is None:
                raise
            arguments = sum(
                math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                for x in jax.tree.leaves(inputs)
            )
            used = arguments + temporaries
            return Program(
                name=name,
                arguments=arguments,
                temporaries=temporaries,
                peak=used,
                over=max(used - chip.hbm, 1.0),
                model_flops=model_flops,
                ideal_wire_bytes=ideal,
                compile_seconds=time.monotonic() - begin,
            )
        seconds = time.monotonic() - begin
        counts = hlo.count(compiled.as_text())
        memory = compiled.memory_analysis()
        slice_size = self.mesh.size // self.topology.slices
        between = sum(c.wire_bytes for c in counts.collectives if c.crosses(slice_size))
        within = sum(c.wire_bytes for c in counts.collectives if not c.crosses(slice_size))
        return Program(
            name=name,
            arguments=memory.argument_size_in_bytes,
            # Not `temp_size_in_bytes`: it exceeds the HBM for programs that the compiler accepts.
            temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
            peak=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
            model_flops=model_flops,
            flops=counts.flops,
            memory_bytes=counts.memory_bytes,
            collectives=counts.collectives,
            ideal_wire_bytes=ideal,
            seconds={
                "compute": counts.flops / chip.flops,
                "HBM": counts.memory_bytes / chip.hbm_bandwidth,
                "ICI": within / chip.ici_bandwidth,
                "DCN": between / chip.dcn_bandwidth,
            },
            compile_seconds=seconds,
        )


def _exhausted(message: str) -> int | None:
    """The bytes of temporaries of a program that does not fit, from the compiler's message; None of
    another message.
    """
    found = re.search(
        r"RESOURCE_EXHAUSTED.*?(?:[Uu]sed |\()([\d.]+)([KMGT])(?: of|\) exceeds)",
        message,
        re.DOTALL,
    )
    return found and int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])
