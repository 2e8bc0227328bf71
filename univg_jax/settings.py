"""The settings of a run: one frozen dataclass a section, every default stated once.

`experiments/base.py` makes the complete `ConfigDict` from these, stages and users change it, and
`Config.of` gives the library what it reads. Every field says what it means and what it may be: a
`Config` that exists is sound as far as no data is needed. docs/config.md has all of them as a
table, made by `univg config`. Loads without JAX.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from univg_jax import fields
from univg_jax.errors import UserError, quote
from univg_jax.fields import setting

DISTRIBUTIONS = ("logit_normal", "uniform")
SOLVERS = ("euler", "heun")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("constant", "cosine")
WHICH = ("ema", "params", "state")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**32 - 1
MAX_STEPS = 2**31 - 1  # a step is folded into the seed's key

Options = Mapping[str, Any]  # of something that has defaults of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task's share of the stream, the dataset families that serve it, and condition dropout.

    The three kinds of dropout are disjoint events (InstructPix2Pix, arXiv 2211.09800, 3.2.1); they
    make guidance possible. How large they are is our choice.
    """

    weight: float = setting(
        help="share of the stream, relative to the other tasks'", least=0, unit="share"
    )
    sources: tuple[str, ...] | Mapping[str, float] = setting(
        help="families of the dataset, or folders of others; they share the weight by their number "
        "of records, or by the weights of {source: weight}",
        least=0,
        is_path=True,
        unit="share",
    )
    drop_text: float = setting(
        0.05, "probability of going without the text", least=0, most=1, unit="probability"
    )
    drop_image: float = setting(
        0.05, "probability of going without the image", least=0, most=1, unit="probability"
    )
    drop_both: float = setting(
        0.05, "probability of going without both", least=0, most=1, unit="probability"
    )

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

    def check(self, where: str) -> None:
        """Raises UserError for dropouts that cannot be together, or no source."""
        if not self.sources:
            raise UserError(f"{where} has no source")
        if isinstance(self.sources, Mapping) and not any(self.sources.values()):
            raise UserError(f"{where}.sources: no weight is above zero")
        if sum(self.dropout) > 1:
            raise UserError(
                f"{where}: drop_text, drop_image, drop_both are {list(self.dropout)}: "
                "expected probabilities that sum to at most 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where records lie, and what shape a batch of them has."""

    dataset: str = setting(
        "emoji_scenes", "an embedded dataset, built on demand; any other text: records in `dir`"
    )
    dir: str = setting("runs/data/emoji_64px", "folder of the records", least=1, is_path=True)
    build: Options = setting(
        help="options of an embedded dataset, below",
        factory=lambda: dict(resolution=64, num_scenes=10_000, seed=0, nouns=0),
    )
    resolution: int = setting(64, "pixels a side of a picture", least=1, unit="pixels")
    buckets: tuple[tuple[int, int], ...] = setting(
        (),
        "(height, width) of the pictures of a step; each picture is cropped to the nearest aspect "
        "ratio. None: one square of `resolution`, which is also the size of samples",
        least=1,
        unit="pixels",
    )
    face_resolution: int = setting(64, "pixels a side of a face", least=1, unit="pixels")
    num_tokens: int = setting(40, "tokens of a prompt; longer ones are cut", least=1, unit="tokens")
    caption_weights: Mapping[str, float] = setting(
        help="{kind: weight} of a record's several captions, of which a sample draws one; a kind "
        "that is not named weighs 1",
        factory=dict,
        least=0,
        unit="share",
    )
    text_cache: str = setting(
        "",
        "folder of prompts' embeddings (univg data cache): the run then holds no text encoder",
        is_path=True,
    )
    latent_cache: str = setting(
        "",
        "folder of pictures' latents (univg data cache --what=latents): the step then encodes only "
        "sources that are drawn at random",
        is_path=True,
    )
    encode_missing: bool = setting(
        False, "encode in the step the pictures that `latent_cache` lacks; False: an error"
    )
    batch_size: int = setting(512, "rows of a step, over all devices", least=1, unit="rows")
    max_bad_fraction: float = setting(
        0.01,
        "share of unusable records that a run puts up with; one whose data surely has more ends",
        least=0,
        most=1,
        unit="fraction",
    )
    read_threads: int = setting(
        2, "threads of a host that read; 0: none, the loop reads", least=0, unit="threads"
    )
    prefetch: int = setting(8, "batches that a host holds ready", least=0, unit="batches")

    def check(self, where: str) -> None:
        """Raises UserError for two buckets of one aspect ratio."""
        ratios: dict[float, tuple[int, int]] = {}
        for shape in self.buckets:
            if (other := ratios.setdefault(shape[1] / shape[0], shape)) is not shape:
                raise UserError(
                    f"{where}.buckets: {other[0]}x{other[1]} and {shape[0]}x{shape[1]} have one "
                    "aspect ratio, expected different ones"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCodec:
    """Options of `conditioning.codec.kind="linear"`, which is fitted on the run's own pictures."""

    patch: int = setting(4, "pixels a side of a latent cell", least=1, unit="pixels")
    channels: int = setting(16, "channels of a latent", least=1, unit="channels")
    whiten: float = setting(
        0.5,
        "0 keeps the variances of the components, 1 makes them equal",
        least=0,
        most=1,
        unit="fraction",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LdaIdentity:
    """Options of `conditioning.identity.kind="lda"`, fitted on the run's own portraits."""

    dim: int = setting(64, "length of a face's vector", least=1, unit="numbers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedEncoder:
    """Options of the kinds of encoders whose weights lie in a folder or come with a package."""

    dtype: str = setting("float32", "type of the weights and the computation", names=DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The frozen encoders: a kind, or a dict of the kind and its options (`encoders.kinds`)."""

    folder: str = setting("", "pretrained encoders that do not come by pip", is_path=True)
    text: str | Options | None = setting("minilm", "minilm, sd3, clip, t5; or {kind: ..., options}")
    codec: str | Options | None = setting(
        help="linear, vae; or {kind: ..., options}",
        factory=lambda: dict(kind="linear", **dataclasses.asdict(LinearCodec())),
    )
    identity: str | Options | None = setting(None, "lda, clip; or {kind: ..., options}; None: none")
    fit_on: Mapping[str, Mapping[str, float]] = setting(
        help="{task: {source: weight}} of the targets that a linear codec is fitted on, where "
        "later stages train more tasks than this one; empty: the run's own",
        factory=dict,
        least=0,
        is_path=True,
        unit="share",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A named size, and any fields of `models.mmdit.MMDiT` that differ from it."""

    size: str = setting(
        "xl",
        "tiny, b, l, xl, sd3-medium, sd3.5-large, or what b, l and xl were before: b-64, l-1472, "
        "xl-1920",
    )
    overrides: Options = setting(
        help="fields of the MM-DiT that differ from the size's, below", factory=dict
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """How training times are drawn."""

    distribution: str = setting("logit_normal", "of the times", names=DISTRIBUTIONS)
    mean: float = setting(0.0, "of the logit-normal distribution", unit="logit of time")
    std: float = setting(1.0, "of the logit-normal distribution", above=0, unit="logit of time")
    shift: float = setting(1.0, "above 1: more times near the noise", above=0, unit="factor")
    weight_changes: tuple[str, ...] = setting(
        (), 'tasks whose loss weighs the changed regions, such as ("ie",)'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """How parameters follow gradients. The paper does not say: every value is our choice.

    Steps are optimizer updates, whatever `accumulate` is.
    """

    name: str = setting("adamw", "the optimizer", names=OPTIMIZERS)
    lr: float = setting(1e-4, "learning rate after the warm-up", least=0, unit="per step")
    b1: float = setting(
        0.9,
        "decay of the first moment (adamw, adafactor; muon's own is 0.95)",
        least=0,
        below=1,
        unit="per step",
    )
    b2: float = setting(0.999, "decay of the second moment", least=0, below=1, unit="per step")
    eps: float = setting(1e-8, "added to the root of the second moment", least=0, unit="gradient")
    weight_decay: float = setting(0.0, "of kernels only", least=0, unit="per step, times lr")
    clip: float = setting(
        1.0, "global norm that gradients are cut to; 0: off", least=0, unit="gradient"
    )
    warmup: int = setting(1000, "steps until the rate is `lr`; 0: none", least=0, unit="steps")
    schedule: str = setting("constant", "of the rate after the warm-up", names=SCHEDULES)
    decay_steps: int | None = setting(
        None,
        "where the cosine ends; the rate is zero after it",
        least=1,
        none="at train.steps, as the run began",
        unit="steps",
    )
    accumulate: int = setting(
        1, "micro-batches of a step (training.optim.value_and_grad)", least=1, unit="micro-batches"
    )
    mu_dtype: str = setting("float32", "of the first moment", names=DTYPES)
    ema: float = setting(
        0.9999, "decay of the parameters' average", least=0, below=1, unit="per step"
    )
    ema_warmup: float = setting(
        10.0,
        "how fast the average starts (training.optim.update_ema); 1: at once",
        least=1,
        unit="steps",
    )
    ema_fresh: tuple[str, ...] | None = setting(
        None,
        "regexes of the parameters whose average starts so; the others' decays by `ema` alone",
        none="all, or what init_from.new names where another run's average is handed over",
    )
    freeze: tuple[str, ...] = setting((), "regexes of the parameters that stay as they are")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh's axes; `data` and `fsdp` may both be -1 (`sharding.make_mesh`)."""

    data: int = setting(
        -1, "copies of the parameters; -1: the devices that remain", least=-1, unit="devices"
    )
    fsdp: int = setting(
        -1, "devices that share parameters and rows; -1: as many as fit", least=-1, unit="devices"
    )
    tensor: int = setting(
        1, "devices that share a matrix product; -1: the rest", least=-1, unit="devices"
    )

    def check(self, where: str) -> None:
        """Raises UserError for a size of 0."""
        for name, size in dataclasses.asdict(self).items():
            if size == 0:
                raise UserError(f"{where}.{name}=0: expected a whole number >= 1, or -1 (the rest)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Where parameters come from when the workdir has no checkpoint of its own."""

    path: str = setting("", "another run's workdir or step, or a diffusers folder", is_path=True)
    which: str = setting(
        "ema", "average or raw parameters; state: go on with all of that run", names=WHICH
    )
    new: tuple[str, ...] = setting((), "regexes of the parameters that only this run has")
    dropped: tuple[str, ...] = setting((), "regexes of the parameters that only the other run has")


AT_THE_END = "only after the last step"
_BEST = re.compile(r"(\w+)/(.+?)(?::(min|max))?")


class Best(NamedTuple):
    """A number of a benchmark, by which a checkpoint is the best one of a run."""

    benchmark: str
    number: str
    is_lower_better: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How long, and how often what is done beside the steps. The last step does all of it."""

    steps: int = setting(
        400_000, "updates of the parameters", least=1, most=MAX_STEPS, unit="steps"
    )
    log_every: int | None = setting(
        100, "steps between rows of metrics", least=1, none=AT_THE_END, unit="steps"
    )
    eval_every: int | None = setting(
        10_000, "steps between validations", least=1, none=AT_THE_END, unit="steps"
    )
    sample_every: int | None = setting(
        10_000, "steps between samples", least=1, none=AT_THE_END, unit="steps"
    )
    save_every: int | None = setting(
        2_000, "steps between checkpoints", least=1, none=AT_THE_END, unit="steps"
    )
    keep: int | None = setting(
        3, "checkpoints that are kept, the newest", least=1, none="all", unit="checkpoints"
    )
    keep_every: int | None = setting(
        None, "of older ones every so many-th step stays", least=1, none="none", unit="steps"
    )
    best: str | None = setting(
        None,
        "BENCHMARK/NUMBER of univg evaluate --follow, such as geneval/overall, with :min behind it "
        "where less is better: the best checkpoint by it is kept, too, and up to `keep` older ones "
        "that wait for their evaluation",
        none="the newest alone",
    )
    keep_best: int = setting(
        1, "how many of the best by `best` are kept", least=1, unit="checkpoints"
    )
    non_finite: str = setting(
        "stop",
        "what a loss, gradient or update that is not finite does: it ends the run, or its step is "
        "skipped, which leaves the parameters, the optimizer and the average as they are",
        names=("stop", "skip"),
    )
    max_skipped: int = setting(
        10,
        "with skip: so many steps in a row may be skipped, one more ends the run",
        least=1,
        unit="steps",
    )
    watchdog: float | None = setting(
        1800.0,
        "without a step, a batch of validation or the samples of a task, after which the run ends, "
        "with the stacks of all processes in WORKDIR/stacks",
        above=0,
        none="never",
        unit="seconds",
    )
    watchdog_start: float | None = setting(
        3600.0,
        "the same for each part of the start: data, encoders, compilation, checkpoint; while a "
        "dataset is built there is no such limit",
        above=0,
        none="never",
        unit="seconds",
    )
    eval_examples: int = setting(
        64,
        "validation examples of a task, at 8 fixed times each; 0: no validation",
        least=0,
        unit="examples",
    )
    sample_examples: int = setting(
        4, "samples of a task, in one grid; 0: no samples", least=0, unit="examples"
    )

    def saves_at(self, step: int) -> bool:
        """Whether a run that nothing interrupts saves this step."""
        is_multiple = self.save_every is not None and step % self.save_every == 0
        return step == self.steps or is_multiple

    @property
    def best_number(self) -> Best | None:
        """What `best` says; None without it, and where it says nothing."""
        if self.best is None or (found := _BEST.fullmatch(self.best)) is None:
            return None
        return Best(found[1], found[2], is_lower_better=found[3] == "min")

    def check(self, where: str) -> None:
        """Raises UserError for a `best` that names no number of a benchmark."""
        if self.best is not None and self.best_number is None:
            raise UserError(
                f"{where}.best={quote(self.best)}: expected BENCHMARK/NUMBER, such as "
                "geneval/overall, or with :min behind it where less is better"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Scales of guidance: none (one pass), text (two passes), or text and image (three)."""

    text: float | None = setting(
        None, "scale of the text", least=0, none="no guidance", unit="factor"
    )
    image: float | None = setting(
        None, "scale of the image", least=0, none="of the text only", unit="factor"
    )

    def check(self, where: str) -> None:
        """Raises UserError for an image scale alone."""
        if self.image is not None and self.text is None:
            raise UserError(f"{where}: guidance needs a text scale when it has an image scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the flow is solved."""

    solver: str = setting("euler", "one or two evaluations a step", names=SOLVERS)
    steps: int = setting(50, "steps of the solver", least=1, unit="steps")
    shift: float = setting(1.0, "spaces the times as in training (SD3)", above=0, unit="factor")
    rescale: float = setting(
        0.0,
        "pulls the guided velocity's deviation back to the conditional one's (2305.08891, 3.4)",
        least=0,
        most=1,
        unit="fraction",
    )
    interval: tuple[float, float] = setting(
        (0.0, 1.0), "times between which guidance acts (2404.07724)", least=0, most=1, unit="time"
    )

    def check(self, where: str) -> None:
        """Raises UserError for an interval that ends before it begins."""
        if self.interval[0] > self.interval[1]:
            raise UserError(f"{where}.interval={self.interval}: expected two ascending times")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Sampler):
    """The sampler, and the guidance of each task; a task that is not named takes one pass."""

    guidance: Mapping[str, Guidance] = setting(
        factory=lambda: dict(
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
    """All of a run's settings. Raises UserError for what cannot be."""

    name: str = setting("base", "of the run, in messages and reports", least=1)
    seed: int = setting(0, "of all that is random", least=0, most=MAX_SEED, unit="seed")
    tasks: Mapping[str, Task] = setting(
        factory=lambda: dict(t2i=Task(weight=1.0, sources=("scenes",)))
    )
    data: Data = setting(factory=Data)
    conditioning: Conditioning = setting(factory=Conditioning)
    model: Model = setting(factory=Model)
    flow: Flow = setting(factory=Flow)
    optim: Optim = setting(factory=Optim)
    mesh: Mesh = setting(factory=Mesh)
    init_from: InitFrom = setting(factory=InitFrom)
    train: Train = setting(factory=Train)
    sampling: Sampling = setting(factory=Sampling)

    def __post_init__(self) -> None:
        for name, value in fields.read_fields(Config, self, "").items():
            object.__setattr__(self, name, value)
        if not any(task.weight > 0 for task in self.tasks.values()):
            raise UserError("no task has a weight above zero")
        if self.data.batch_size % self.optim.accumulate:
            raise UserError(
                f"optim.accumulate={self.optim.accumulate} does not divide "
                f"data.batch_size={self.data.batch_size}"
            )
        end = self.optim.decay_steps
        if self.optim.schedule == "cosine" and end is not None and end <= self.optim.warmup:
            raise UserError(
                f"optim.decay_steps={end}: expected more than optim.warmup={self.optim.warmup}, "
                "after which the cosine begins"
            )

    def begun(self) -> "Config":
        """With the settings that are fixed when a run begins, where they are None.

        What else they depend on may change later and does not move them. A run that ends within its
        warm-up has no cosine yet: the first start with more steps fixes its end.
        """
        optim, parent = self.optim, self.init_from
        fixed: dict[str, Any] = {}
        if optim.schedule == "cosine" and optim.decay_steps is None:
            fixed["decay_steps"] = self.train.steps if self.train.steps > optim.warmup else None
        if optim.ema_fresh is None:
            is_handed_over = bool(parent.path) and parent.which == "ema"
            fixed["ema_fresh"] = parent.new if is_handed_over else (".*",)
        return dataclasses.replace(self, optim=dataclasses.replace(optim, **fixed))

    @classmethod
    def of(cls, config: Any) -> "Config":
        """The settings in a `ConfigDict`, or in nested mappings such as a run's config.json has.

        What is left out takes its default. Raises UserError for an unknown key, with the nearest
        one, and for a value that cannot be.
        """
        if isinstance(config, Config):
            return config
        return fields.make(cls, config.to_dict() if hasattr(config, "to_dict") else config, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, as `of` takes them and config.json has them; no scales that are None."""
        result = dataclasses.asdict(self)
        for scales in result["sampling"]["guidance"].values():
            for name in [name for name, scale in scales.items() if scale is None]:
                del scales[name]
        return result
