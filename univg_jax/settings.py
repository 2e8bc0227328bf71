"""The settings of a run: one frozen dataclass a section, every default stated once.

`experiments/base.py` makes the complete `ConfigDict` from these, stages and users change it, and
`Config.of` gives the library what it reads. Values are checked here as far as no data is needed.
Loads without JAX.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from univg_jax.errors import UserError, check_name

DISTRIBUTIONS = ("logit_normal", "uniform")
SOLVERS = ("euler", "heun")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("constant", "cosine")
WHICH = ("ema", "params", "state")

Options = Mapping[str, Any]  # of something that has defaults of its own


def _positive(section: object, where: str, *names: str) -> None:
    for name in names:
        if not getattr(section, name) > 0:
            raise UserError(f"{where}.{name}={getattr(section, name)}: expected more than 0")


def _not_negative(section: object, where: str, *names: str) -> None:
    for name in names:
        if not getattr(section, name) >= 0:
            raise UserError(f"{where}.{name}={getattr(section, name)}: expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task's share of the stream, the dataset families that serve it, and condition dropout.

    Sources share the weight by their number of records, or by the weights of a mapping
    `{source: weight}`. The three kinds of dropout are disjoint events (InstructPix2Pix, arXiv
    2211.09800, 3.2.1); they make guidance possible. How large they are is our choice.
    """

    weight: float
    sources: tuple[str, ...] | Mapping[str, float]
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources that have a weight."""
        if isinstance(self.sources, Mapping):
            return tuple(name for name, weight in self.sources.items() if weight > 0)
        return tuple(self.sources)

    @property
    def dropout(self) -> tuple[float, float, float]:
        """The probabilities of going without the text, the image, both."""
        return self.drop_text, self.drop_image, self.drop_both

    def check(self, name: str) -> None:
        """Raises UserError for a weight or a dropout that cannot be, or no source."""
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(
                f"weight of task {name!r} is {self.weight}, expected a finite number >= 0"
            )
        if not self.sources:
            raise UserError(f"task {name!r} has no source")
        if not (min(self.dropout) >= 0 and sum(self.dropout) <= 1):
            raise UserError(
                f"drop_text, drop_image, drop_both of task {name!r} are {list(self.dropout)}: "
                "expected probabilities that sum to at most 1"
            )
        if isinstance(self.sources, Mapping):
            weights = self.sources.values()
            if any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
                raise UserError(
                    f"source weights of task {name!r} are {dict(self.sources)}, "
                    "expected finite numbers >= 0, one above"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where records lie, and what shape a batch of them has."""

    dataset: str = "emoji_scenes"  # built on demand when embedded; any folder of records otherwise
    dir: str = "runs/data/emoji_64px"
    build: Options = dataclasses.field(  # nouns: 0 = all
        default_factory=lambda: dict(resolution=64, num_scenes=10_000, seed=0, nouns=0)
    )
    resolution: int = 64
    face_resolution: int = 64
    num_tokens: int = 32
    # A folder of prompts' embeddings (univg data cache): the run then holds no text encoder.
    text_cache: str = ""
    batch_size: int = 512  # global
    read_threads: int = 2
    prefetch: int = 8

    def __post_init__(self) -> None:
        _positive(self, "data", "resolution", "face_resolution", "num_tokens", "batch_size")
        _not_negative(self, "data", "read_threads", "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The frozen encoders: a kind, or a dict of the kind and its options (`encoders.kinds`)."""

    folder: str = ""  # where pretrained encoders lie, of those kinds that do not come by pip
    text: str | Options | None = "minilm"
    codec: str | Options | None = dataclasses.field(
        default_factory=lambda: dict(kind="linear", **LINEAR_CODEC)
    )
    identity: str | Options | None = None


# Options of the encoders that are fitted on a run's own data.
LINEAR_CODEC = dict(patch=4, channels=16, whiten=0.5)
LDA_IDENTITY = dict(dim=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A named size, and any fields of `models.mmdit.MMDiT` that differ from it."""

    size: str = "xl"
    overrides: Options = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """How training times are drawn; `mean` and `std` belong to the logit-normal distribution."""

    distribution: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    weight_changes: tuple[str, ...] = ()  # tasks whose loss weighs changed regions, e.g. ("ie",)

    def __post_init__(self) -> None:
        check_name(self.distribution, DISTRIBUTIONS, what="flow.distribution")
        _positive(self, "flow", "shift", "std")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """How parameters follow gradients. The paper does not say: every value is our choice.

    Steps are optimizer updates, whatever `accumulate` is.
    """

    name: str = "adamw"
    lr: float = 1e-4
    b1: float = 0.9  # decay of the first moment (adamw, adafactor; muon's own is 0.95)
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of kernels only
    clip: float = 1.0  # global norm of the trained parameters' gradient; 0 = off
    warmup: int = 1000
    schedule: str = "constant"
    accumulate: int = 1  # micro-batches a step: see `training.optim.value_and_grad`
    mu_dtype: str = "float32"  # of the first moment
    ema: float = 0.9999
    ema_warmup: float = 10.0  # 1 = none: see `training.optim.update_ema`
    freeze: tuple[str, ...] = ()  # regexes searched in the parameters' paths

    def __post_init__(self) -> None:
        check_name(self.name, OPTIMIZERS, what="optim.name")
        check_name(self.schedule, SCHEDULES, what="optim.schedule")
        _positive(self, "optim", "accumulate")
        _not_negative(self, "optim", "lr", "warmup", "clip", "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh's axes; -1 is the rest, and `data` and `fsdp` may both be (`make_mesh`)."""

    data: int = -1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Where parameters come from when the workdir has no checkpoint of its own.

    `path`: another run, or a diffusers folder. `new`, `dropped`: regexes of the leaves that only
    this run, or only the other one, has.
    """

    path: str = ""
    which: str = "ema"
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.which, WHICH, what="init_from.which")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How long, and how often what is done beside the steps."""

    steps: int = 400_000
    log_every: int = 100
    eval_every: int = 10_000
    sample_every: int = 10_000
    save_every: int = 2_000
    keep: int = 3
    eval_examples: int = 64  # a task, at 8 fixed times each
    sample_examples: int = 4  # a task, in the grids

    def __post_init__(self) -> None:
        _positive(self, "train", *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Scales of guidance: none (one pass), text (two passes), or text and image (three)."""

    text: float | None = None
    image: float | None = None

    def __post_init__(self) -> None:
        if self.image is not None and self.text is None:
            raise UserError("guidance needs a text scale when it has an image scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the flow is solved.

    `shift` spaces the times as in training (SD3). `rescale` in [0, 1] pulls the guided velocity's
    standard deviation back to the conditional one's (arXiv 2305.08891, section 3.4). Guidance acts
    for `interval[0] <= t <= interval[1]` only (arXiv 2404.07724), else the full condition alone.
    """

    solver: str = "euler"
    steps: int = 50
    shift: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_name(self.solver, SOLVERS, what="sampling.solver")
        _positive(self, "sampling", "steps", "shift")
        if len(self.interval) != 2:
            raise UserError(f"sampling.interval={self.interval}: expected two times")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Sampler):
    """The sampler, and the guidance of each task; a task that is not named takes one pass."""

    guidance: Mapping[str, Guidance] = dataclasses.field(
        default_factory=lambda: dict(
            t2i=Guidance(text=5.0),
            ie=Guidance(text=5.0, image=1.5),
            ip=Guidance(text=3.0),
            lg=Guidance(text=5.0),
            id=Guidance(text=3.0),
        )
    )

    @property
    def sampler(self) -> Sampler:
        """What all tasks share; hashable, so that compiled programs are found by it."""
        names = (field.name for field in dataclasses.fields(Sampler))
        return Sampler(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run's settings."""

    name: str = "base"
    seed: int = 0
    tasks: Mapping[str, Task] = dataclasses.field(
        default_factory=lambda: dict(t2i=Task(weight=1.0, sources=("scenes",)))
    )
    data: Data = Data()
    conditioning: Conditioning = dataclasses.field(default_factory=Conditioning)
    model: Model = Model()
    flow: Flow = Flow()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    init_from: InitFrom = InitFrom()
    train: Train = Train()
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        _not_negative(self, "config", "seed")
        for name, task in self.tasks.items():
            task.check(name)
        if not any(task.weight > 0 for task in self.tasks.values()):
            raise UserError("no task has a weight above zero")
        if self.data.batch_size % self.optim.accumulate:
            raise UserError(
                f"optim.accumulate={self.optim.accumulate} does not divide "
                f"data.batch_size={self.data.batch_size}"
            )
        if self.optim.schedule == "cosine" and self.train.steps <= self.optim.warmup:
            raise UserError(
                f"cosine ends at step {self.train.steps} (train.steps): not after "
                f"optim.warmup={self.optim.warmup}"
            )

    @classmethod
    def of(cls, config: Any) -> "Config":
        """The settings in a `ConfigDict`, or in nested mappings such as a run's config.json has.

        What is left out takes its default. Raises UserError for an unknown key, with the nearest
        one, and for a value that cannot be.
        """
        if isinstance(config, Config):
            return config
        values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        sections = {field.name: field.type for field in dataclasses.fields(cls)}
        for name, given in values.items():
            section = sections.get(name)
            if name == "tasks":
                values[name] = {k: _section(Task, v, f"tasks.{k}") for k, v in given.items()}
            elif name == "sampling":
                guidance = {
                    k: _section(Guidance, v, f"sampling.guidance.{k}")
                    for k, v in given.get("guidance", {}).items()
                }
                values[name] = _section(Sampling, {**given, "guidance": guidance}, name)
            elif dataclasses.is_dataclass(section):
                values[name] = _section(section, given, name)
        return _section(cls, values, "config")

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, as `of` takes them and config.json has them; no scales that are None."""
        result = dataclasses.asdict(self)
        for scales in result["sampling"]["guidance"].values():
            for name in [name for name, scale in scales.items() if scale is None]:
                del scales[name]
        return result


def _section(cls: type, values: Options, where: str) -> Any:
    """`cls(**values)`, with numbers and lists as the fields want them."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for key in values:
        check_name(key, fields, what=f"key of {where}:")

    def convert(key: str, value: Any) -> Any:
        if fields[key] in (float, float | None) and isinstance(value, int):
            return float(value)
        if key == "sources" and isinstance(value, Mapping):
            return {source: float(weight) for source, weight in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return cls(**{key: convert(key, value) for key, value in values.items()})
