"""What a config costs on a TPU that is not here: its real programs, compiled ahead of time.

libtpu compiles for any topology that it knows, on any Linux machine. Each program gives its memory,
FLOPs and collectives (`planning.hlo`). With the chip's published peaks (`univg_jax.tpu`) they bound
a step's time from below and the model FLOPs utilization (MFU) from above:

    roofline = max(unit FLOPs / peak, HBM bytes / HBM bandwidth,
                   ICI bytes / ICI bandwidth, DCN bytes / DCN bandwidth)
    MFU     <= model FLOPs / (peak x roofline)

ICI joins the chips of a slice, and DCN, the data center network, joins slices. Model FLOPs are
`MMDiT.matmul_flops`: without recomputation, padding or encoders. Unit FLOPs are those of the whole
matrix units that the products keep busy (`hlo.Product`). All figures are of one device. What to
expect beside the bounds is taken from public runs (`planning.calibration`).
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from data_pipelines.tasks import TASKS
from univg_jax import assembly, encoders, sharding, tpu
from univg_jax.batch import Batch, BatchShape, Conditions
from univg_jax.errors import UserError, check_name
from univg_jax.planning import hlo
from univg_jax.planning.cached import with_cached
from univg_jax.planning.calibration import SOURCE, Expected, expected
from univg_jax.planning.collectives import Collective
from univg_jax.planning.topology import Topology
from univg_jax.planning.traffic import Traffic
from univg_jax.sampling import Generator, guidance_weights
from univg_jax.settings import Config
from univg_jax.training.step import VALIDATION_TIMES, TrainState, TrainStep, num_parameters

# Bytes from which a leaf is reported that every device holds whole, though it could be split.
MIN_REPORTED_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One run of a compiled program on one device. Memory is in bytes.

    A program that does not fit has `over` above 0, and no counts.
    """

    name: str
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0  # the most that is in use at one time: arguments, temporaries, results and code
    over: float = 0.0  # bytes of memory that are missing
    model_flops: float = 0.0
    flops: float = 0.0
    unit_flops: float = 0.0  # what the matrix units could do in the time that those take
    traffic: tuple[Traffic, ...] = ()  # to and from HBM
    collectives: tuple[Collective, ...] = ()
    ideal_wire_bytes: float = 0.0
    # Lower bounds of the time, by what bounds it: compute, HBM, ICI, DCN.
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0  # with tracing and counting

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for it."""
        return self.over == 0

    @property
    def memory_bytes(self) -> float:
        """What moves to and from HBM."""
        return sum((one.bytes for one in self.traffic), 0.0)

    @property
    def wire_bytes(self) -> float:
        """What the device receives from others at least."""
        return sum(c.wire_bytes for c in self.collectives)

    @property
    def roofline(self) -> float:
        """Seconds that a run takes at least."""
        return max(self.seconds.values(), default=0.0)

    @property
    def expected(self) -> Expected:
        """What a run is likely to take, by what public runs took beyond their own rooflines."""
        return expected(self.roofline)

    @property
    def bound(self) -> str:
        """What makes the roofline: compute, HBM, ICI or DCN."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else ""

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of HBM traffic."""
        return self.flops / max(self.memory_bytes, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A config on a topology."""

    config: str
    topology: str
    chip: tpu.Chip
    devices: int
    mesh: dict[str, int]
    model: dict[str, str]  # remat, attention, dtype
    optimizer: dict[str, str]  # name, mu_dtype
    parameters: int
    batch: int
    picture: tuple[int, int] = (0, 0)  # height, width in training: those of the largest bucket
    buckets: int = 1  # of training, each of which has a program of its own
    encoders: bool  # whether they are part of the train step
    cached: tuple[str, ...] = ()  # what batches bring from a cache: text, latents
    replicated: tuple[str, ...]  # names of large leaves that every device holds whole
    programs: tuple[Program, ...]

    @property
    def rows(self) -> float:
        """Rows of the batch on a device."""
        return self.batch / (self.mesh["data"] * self.mesh["fsdp"])

    @property
    def fits(self) -> bool:
        """Whether all programs fit."""
        return all(program.fits for program in self.programs)

    def mfu_bound(self, program: Program) -> float:
        """The largest share of the chip's peak that model FLOPs can reach; 0 if it does not fit."""
        possible = self.chip.flops * program.roofline
        return program.model_flops / possible if possible else 0.0

    def expected_mfu(self, program: Program) -> float:
        """The share to expect; 0 if it does not fit."""
        return self.mfu_bound(program) * program.roofline / (program.expected.seconds or 1.0)

    def to_json(self) -> dict[str, Any]:
        """All fields, and what follows from them, as JSON takes them."""
        result = dataclasses.asdict(self) | {"fits": self.fits, "rows": self.rows}
        for row, program in zip(result["programs"], self.programs, strict=True):
            row |= {
                "fits": program.fits,
                "memory_bytes": program.memory_bytes,
                "wire_bytes": program.wire_bytes,
                "roofline_seconds": program.roofline,
                "expected": dataclasses.asdict(program.expected) | {"source": SOURCE},
                "bound": program.bound,
                "intensity": program.intensity,
                "mfu_bound": self.mfu_bound(program),
                "expected_mfu": self.expected_mfu(program),
            }
            for shown, collective in zip(row["collectives"], program.collectives, strict=True):
                shown["wire_bytes"] = collective.wire_bytes
            for shown in row["traffic"]:
                shown["seconds"] = shown["bytes"] / self.chip.hbm_bandwidth
        return result


def compile_plan(
    config: Config,
    topology: Topology,
    *,
    programs: Iterable[str] = ("train",),
    with_encoders: bool = False,
    cached: Iterable[str] = (),
    quick: bool = False,
) -> Plan:
    """Compiles `programs` of `config` for `topology`; of its buckets training has the largest.

    `with_encoders` says whether the frozen encoders are part of the train step; otherwise it begins
    from latents and embeddings. With `cached` (of `planning.cached`) batches bring what a cache
    holds, and only the rest is encoded. `quick` asks the compiler for less effort. It then takes a
    third of the time and gives the same products and collectives. Memory is off by some percent,
    and HBM traffic up to half too high: less stays on the chip. Raises UserError for a mesh or a
    batch that does not fit the devices.
    """
    found = encoders.abstract(config.conditioning)
    model = assembly.make_model(config, found.conditioner)
    sizes = dict(**dataclasses.asdict(config.mesh), width=model.backbone.hidden_dim)
    mesh = sharding.make_mesh(**sizes, devices=topology.devices)
    if config.data.batch_size % sharding.num_row_shards(mesh):
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide over data x fsdp = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices"
        )
    step = TrainStep(
        config=config, model=model, conditioner=found.conditioner, task_names=tuple(TASKS)
    )
    compiler = _Compiler(
        config=config,
        topology=topology,
        mesh=mesh,
        step=step,
        frozen=sharding.with_shardings(found.frozen, sharding.tree_shardings(found.frozen, mesh)),
        with_encoders=with_encoders,
        cached=tuple(cached),
        quick=quick,
    )
    with jax.set_mesh(mesh):
        return compiler.plan(programs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compiler:
    """The programs of one config on one topology. All arrays are shapes with shardings."""

    config: Config
    topology: Topology
    mesh: Mesh
    step: TrainStep
    frozen: PyTree
    with_encoders: bool
    cached: tuple[str, ...]
    quick: bool

    def plan(self, programs: Iterable[str]) -> Plan:
        """Compiles these programs, and describes what all of them share."""
        kinds = {"train": self.train, "sampling": self.sampling, "evaluation": self.evaluation}
        backbone = self.step.model.backbone
        dtype = str(jnp.dtype(backbone.dtype))
        return Plan(
            config=self.config.name,
            topology=self.topology.name,
            chip=self.topology.chip,
            devices=self.mesh.size,
            mesh=dict(self.mesh.shape),
            model=dict(remat=backbone.remat, attention=str(backbone.attention), dtype=dtype),
            optimizer=dict(name=self.config.optim.name, mu_dtype=self.config.optim.mu_dtype),
            parameters=num_parameters(self.state.params),
            batch=self.config.data.batch_size,
            picture=self.bucket.size,
            buckets=len(BatchShape.buckets(self.config.data)),
            encoders=self.with_encoders,
            cached=self.cached,
            replicated=self._replicated(),
            programs=tuple(kinds[check_name(name, kinds, what="program")]() for name in programs),
        )

    @functools.cached_property
    def bucket(self) -> BatchShape:
        """The shape with the most pixels that training has: the first of several."""
        return max(BatchShape.buckets(self.config.data), key=lambda s: s.height * s.width)

    @functools.cached_property
    def train_batch(self) -> Batch:
        return self._batch(self.config.data.batch_size, self.bucket, cached=self.cached)

    @functools.cached_property
    def encoded(self) -> tuple[jax.ShapeDtypeStruct, Conditions]:
        """The latents and conditions of a training batch."""
        shapes = self.step.conditioner.encoded_spec(self.frozen, self.train_batch)
        return sharding.with_shardings(shapes, sharding.batch_sharding(self.mesh))

    @functools.cached_property
    def state(self) -> TrainState:
        """The state of training, as the step takes and gives it."""
        # The key is made inside `eval_shape`: the devices of this mesh do not exist.
        shapes = jax.eval_shape(
            lambda: self.step.init(jax.random.key(0), self.frozen, self.train_batch)
        )
        return sharding.with_shardings(shapes, sharding.tree_shardings(shapes, self.mesh))

    def train(self) -> Program:
        """One update."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        inputs = (self.frozen,) if self.with_encoders else self.encoded
        rows = self.config.data.batch_size / self.mesh.size
        return self._compile(
            "train",
            self.step.compiled_update(shardings, encoded=not self.with_encoders),
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
            (self.state.params, self.frozen, self.train_batch),
            model_flops=rows * times * self._model_flops(train=False),
            ideal=times * self._ideal_wire_bytes(train=False),
        )

    def sampling(self) -> Program:
        """Images for one row a device: encoders, all steps of the solver, the decoder.

        It takes the passes of the task that has most.
        """
        sampling, tasks = self.config.sampling, self.config.tasks
        generator = assembly.make_generator(self.config, self.step.model, self.step.conditioner)
        rows = sharding.num_row_shards(self.mesh)
        passes = max(len(guidance_weights(sampling.guidance.get(task))) for task in tasks)
        whole, split = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        weights = jax.ShapeDtypeStruct((passes,), jnp.float32, sharding=whole)
        seeds = jax.ShapeDtypeStruct((rows,), jnp.uint32, sharding=split)
        evaluations = sampling.steps * (2 if sampling.solver == "heun" else 1)
        batch = self._batch(rows, BatchShape.of(self.config.data))  # samples are squares
        model_flops = passes * evaluations * self._model_flops(train=False, batch=batch)
        return self._compile(
            "sampling",
            jax.jit(functools.partial(Generator.generate, generator)),
            (self.state.ema, self.frozen, (batch,) * passes, weights, seeds),
            model_flops=rows / self.mesh.size * model_flops,
            ideal=evaluations * self._ideal_wire_bytes(train=False),
        )

    def _batch(self, size: int, shape: BatchShape, *, cached: Sequence[str] = ()) -> Batch:
        drawn = assembly.draws_sources(self.config)
        known = dict(conditioner=self.step.conditioner, frozen=self.frozen, draws_sources=drawn)
        batch = with_cached(shape.spec(size), cached, **known)
        return sharding.with_shardings(batch, sharding.batch_sharding(self.mesh))

    def _replicated(self) -> tuple[str, ...]:
        if self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] == 1:
            return ()  # nothing is to be split
        trees = (self.state, self.frozen)
        shardings = jax.tree.map(lambda x: x.sharding, trees)
        return tuple(
            leaf.path
            for tree, specs in zip(trees, shardings)
            for leaf in sharding.leaf_specs(tree, specs, larger_than=MIN_REPORTED_BYTES)
            if not any(leaf.spec)
        )

    def _model_flops(self, *, train: bool, batch: Batch | None = None) -> float:
        """FLOPs of the model for one row of a batch (None: of training) at one time."""
        latents, conditions = self.encoded
        if batch is not None:
            latents, conditions = self.step.conditioner.encoded_spec(self.frozen, batch)
        _, height, width, _ = latents.shape
        return self.step.model.backbone.matmul_flops(
            height=height, width=width, num_tokens=conditions.text_emb.shape[1], train=train
        )

    def _ideal_wire_bytes(self, *, train: bool) -> float:
        """Bytes that a device must receive with fully sharded parameters, in the compute dtype.

        With W bytes of weights on a group of `fsdp` devices, each micro-batch of training gathers
        all weights forwards and backwards and scatters all gradients, 3 (fsdp-1)/fsdp W. The
        gradients' shards are then summed over `data`: an all-reduce, 2 (data-1)/data W/fsdp.
        Without training, all weights are gathered once.
        """
        data, fsdp = self.mesh.shape["data"], self.mesh.shape["fsdp"]
        itemsize = jnp.dtype(self.step.model.backbone.dtype).itemsize
        size = num_parameters(self.state.params) * itemsize / self.mesh.shape["tensor"]
        moves = 3 * self.config.optim.accumulate if train else 1
        over_data = 2 * (data - 1) / data * size / fsdp if train else 0.0
        return moves * (fsdp - 1) / fsdp * size + over_data

    def _compile(
        self, name: str, function: Callable, inputs: tuple, *, model_flops: float, ideal: float
    ) -> Program:
        """Compiles a jitted function for shapes with shardings."""
        begin = time.monotonic()
        lowered = function.trace(*inputs).lower(lowering_platforms=("tpu",))
        options = {"exec_time_optimization_effort": -1.0} if self.quick else None
        try:
            found = self._measured(lowered.compile(options))
        except jax.errors.JaxRuntimeError as error:
            if (temporaries := _temporaries_over_memory(str(error))) is None:
                raise
            found = self._refused(inputs, temporaries)
        found |= dict(model_flops=model_flops, ideal_wire_bytes=ideal)
        return Program(name=name, compile_seconds=time.monotonic() - begin, **found)

    def _refused(self, inputs: tuple, temporaries: int) -> dict[str, Any]:
        """What is known of a program that does not fit: its memory."""
        shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(inputs)]
        arguments = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shards)
        peak = arguments + temporaries
        over = max(peak - self.topology.chip.hbm, 1.0)
        return dict(arguments=arguments, temporaries=temporaries, peak=peak, over=over)

    def _measured(self, compiled: jax.stages.Compiled) -> dict[str, Any]:
        """Memory, counts and lower bounds of the time of a program that fits."""
        counts = hlo.count(compiled.as_text(), unit=self.topology.chip.unit)
        memory = compiled.memory_analysis()
        return dict(
            arguments=memory.argument_size_in_bytes,
            # Not `temp_size_in_bytes`: it exceeds the HBM for programs that the compiler accepts.
            temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
            peak=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
            flops=counts.flops,
            unit_flops=counts.unit_flops,
            traffic=counts.traffic,
            collectives=counts.collectives,
            seconds=lower_bounds(counts, self.topology, devices=self.mesh.size),
        )


def lower_bounds(counts: hlo.Counts, topology: Topology, *, devices: int) -> dict[str, float]:
    """Seconds that a program on so many devices takes at least, by what bounds it."""
    chip, slice_size = topology.chip, devices // topology.slices
    between = sum(c.wire_bytes for c in counts.collectives if c.crosses(slice_size))
    within = sum(c.wire_bytes for c in counts.collectives if not c.crosses(slice_size))
    return {
        "compute": counts.unit_flops / chip.flops,
        "HBM": counts.memory_bytes / chip.hbm_bandwidth,
        "ICI": within / chip.ici_bandwidth,
        "DCN": between / chip.dcn_bandwidth,
    }


def _temporaries_over_memory(message: str) -> int | None:
    """Bytes of temporaries of a program that does not fit, from the compiler's error message.

    The message is the only place where the compiler says them, in one of two wordings:

        RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries
        (125.73G) exceeds available HBM (15.75G).
        RESOURCE_EXHAUSTED: ... Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.

    None for any other message.
    """
    wording = r"RESOURCE_EXHAUSTED.*?(?:[Uu]sed |\()([\d.]+)([KMGT])(?: of|\) exceeds)"
    found = re.search(wording, message, re.DOTALL)
    return found and int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])
