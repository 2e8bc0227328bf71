"""From a config, or from the folder of a run, to the parts that the library's functions take."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import data_pipelines.datasets.emoji_scenes as emoji_scenes
from data_pipelines import mixture
from data_pipelines.cache import CachedTokenizer
from data_pipelines.sources import open_source
from data_pipelines.tasks import TASKS
from data_pipelines.tokenizer import Tokenizer, load_tokenizer
from univg_jax import checkpoint, encoders, sharding
from univg_jax.batch import Batch, fake_batch
from univg_jax.conditioning import Conditioner
from univg_jax.errors import check_name
from univg_jax.interop.diffusers import transformer_folder
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.univg import UniVG
from univg_jax.sampling import Generator, Sampler, guidance_weights
from univg_jax.training import optim

# What each guided pass goes without, in the order of `univg_jax.sampling`'s table.
DROPS = ("none", "text", "both")

FIT_IMAGES = 1024  # that a linear codec is fitted on
EMBEDDED = {"emoji_scenes": emoji_scenes}


def check_config(config: ConfigDict) -> None:
    """Everything that can be wrong in a config and needs no data: before anything is built or
    claimed.
    """
    if config.data.dataset not in EMBEDDED and not epath.Path(config.data.dir).exists():
        raise FileNotFoundError(
            f"data.dir={config.data.dir!r} does not exist, and data.dataset={config.data.dataset!r} is none of the "
            f"embedded datasets ({', '.join(EMBEDDED)}) that are built on demand"
        )
    mixture.check_weights(config.tasks)
    for task, options in config.tasks.items():
        for source in options.sources:
            if config.data.dataset in EMBEDDED and not epath.Path(source).exists():
                check_name(
                    source, EMBEDDED[config.data.dataset].FAMILIES, what=f"source of task {task}:"
                )
    sampler(config)
    train.training_times(config)
    optim.make_schedule(train.optim_config(config))
    for task in config.sampling.guidance:
        guidance(config, task)
    make_mmdit(config.model.size, **config.model.overrides)
    encoders.check(config.conditioning)
    tokenizer(config)
    for task in config.flow.weight_changes:
        if task not in TASKS:
            raise ValueError(f"flow.weight_changes names {task!r}, which is no task")


def prepare_data(config: ConfigDict) -> None:
    """Builds the dataset if it is an embedded one and not there yet: process 0 does, the others
    wait.
    """
    if config.data.dataset not in EMBEDDED:
        return
    if jax.process_index() == 0:
        EMBEDDED[config.data.dataset].build(config.data.dir, **build_arguments(config))
    multihost_utils.sync_global_devices("univg_jax.prepare_data")


def build_arguments(config: ConfigDict) -> dict[str, Any]:
    arguments = dict(config.data.build)
    return arguments | {"nouns": arguments["nouns"] or None}  # 0: the whole whitelist


def tokenizer(config: ConfigDict) -> Tokenizer:
    """The text encoder's. Raises ValueError if `data.num_tokens` is none of its lengths."""
    loaded = load_tokenizer(encoders.tokenizer_folder(config.conditioning))
    loaded("", config.data.num_tokens)
    if config.data.text_cache:
        identity = encoders.text_identity(config.conditioning, num_tokens=config.data.num_tokens)
        loaded = CachedTokenizer(loaded, config.data.text_cache, identity=identity)
    return loaded


def prepare_encoders(
    config: ConfigDict, workdir: epath.PathLike, mesh: jax.sharding.Mesh
) -> tuple[Conditioner, Any]:
    """The frozen encoders of a run: its own, its parent's, or fitted on its training data."""

    def images() -> np.ndarray:
        name = next(iter(config.tasks.values())).sources[0]
        source = open_source(name, "train", data_dir=config.data.dir)
        indices = np.linspace(0, len(source) - 1, min(FIT_IMAGES, len(source))).astype(int)
        return np.stack([source.read(int(i), ("image",))["image"] for i in indices])

    def portraits() -> tuple[np.ndarray, np.ndarray]:
        source = open_source(config.tasks.id.sources[0], "train", data_dir=config.data.dir)
        read = [source.read(i, ("image", "person")) for i in range(len(source))]
        return np.stack([r["image"] for r in read]), np.array([r["person"] for r in read])

    return encoders.prepare(
        config.conditioning,
        workdir=workdir,
        init_from=None
        if transformer_folder(config.init_from.path)
        else config.init_from.path or None,
        images=images,
        portraits=portraits,
        mesh=mesh,
        without=("text",) if config.data.text_cache else (),
    )


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` over all devices. Raises ValueError where it does not fit them."""
    width = make_mmdit(config.model.size, **config.model.overrides).hidden_dim
    return sharding.make_mesh(**config.mesh, width=width)


def make_model(config: ConfigDict, conditioner: Conditioner) -> UniVG:
    backbone = make_mmdit(
        config.model.size,
        in_channels=2 * conditioner.latent_channels + 1,
        out_channels=conditioner.latent_channels,
        text_dim=conditioner.text_dim,
        pooled_dim=conditioner.pooled_dim,
        **config.model.overrides,
    )
    return UniVG(backbone=backbone, face_dim=conditioner.face_dim)


def make_init(
    config: ConfigDict, model: UniVG, conditioner: Conditioner
) -> Callable[[Any, jax.Array], Any]:
    """`init(frozen, key)`: the parameters of the model before any training."""
    c = config.data
    batch = fake_batch(  # only its shapes matter
        batch_size=jax.device_count(),
        resolution=c.resolution,
        num_tokens=c.num_tokens,
        face_resolution=c.face_resolution,
    )

    def init(frozen: Any, key: jax.Array) -> Any:
        x0, conditions = (
            conditioner.target_latents(frozen, batch),
            conditioner.conditions(frozen, batch),
        )
        return model.init(key, x0, jnp.zeros(batch.size), conditions)["params"]

    return init


def sampler(config: ConfigDict) -> Sampler:
    c = config.sampling
    return Sampler(
        solver=c.solver,
        steps=c.steps,
        shift=c.shift,
        rescale=c.rescale,
        interval=(c.interval[0], c.interval[1]),
    )


def guidance(config: ConfigDict, task: str) -> tuple[float, ...]:
    """The weights of a task's passes; one pass for a task without guidance."""
    return guidance_weights(**config.sampling.guidance.get(task, {}))


def guided_passes(batch: Batch, config: ConfigDict, task: str, tokenizer: Tokenizer) -> list[Batch]:
    """The conditions of a task's guided passes: `batch` itself, then what each pass goes without."""
    count = len(guidance(config, task))
    return [mixture.drop_conditions(batch, drop, tokenizer=tokenizer) for drop in DROPS[:count]]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255."""
    return np.rint((np.asarray(images) + 1) * 127.5).astype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained model, ready to generate on the mesh; every process calls its methods, with its own
    rows.
    """

    path: str
    step: int
    config: ConfigDict
    params: Any
    frozen: Any
    mesh: jax.sharding.Mesh
    generator: Generator
    tokenizer: Tokenizer

    def generate(
        self, batch: Batch, task: str, *, seed: int = 0, on_step: Callable[[], Any] | None = None
    ) -> np.ndarray:
        """Images [b h w 3] in 0..255 for this process's rows of a batch of one task.

        `on_step` is called as steps are done, in a run of one process.
        """
        passes = guided_passes(batch, self.config, task, self.tokenizer)
        sharded = [sharding.shard_batch(p, self.mesh) for p in passes]
        weights = guidance(self.config, task)
        # A callback into one process would make programs that differ from process to process.
        generator = dataclasses.replace(
            self.generator, on_step=on_step if jax.process_count() == 1 else None
        )
        images = generator(self.params, self.frozen, sharded, weights=weights, seed=seed)
        return to_uint8(sharding.local_rows(images, self.mesh))

    def reconstruct(self, batch: Batch) -> np.ndarray:
        """What the codec makes of the targets, [b h w 3] in 0..255, for this process's rows."""
        target = sharding.shard_batch(batch.target, self.mesh)
        return to_uint8(sharding.local_rows(self._reconstruct(self.frozen, target), self.mesh))

    @functools.cached_property
    def _reconstruct(self) -> Callable[[Any, Any], jax.Array]:
        conditioner = self.generator.conditioner
        return jax.jit(
            lambda frozen, images: conditioner.decode(frozen, conditioner.encode(frozen, images))
        )

    def initial_params(self, *, seed: int) -> Any:
        """The parameters of the same model before any training."""
        init = make_init(self.config, self.generator.model, self.generator.conditioner)
        shardings = jax.tree.map(lambda x: x.sharding, self.params)
        return jax.jit(init, out_shardings=shardings)(self.frozen, jax.random.key(seed))

    @property
    def rows(self) -> int:
        """The rows of each process in the smallest batch that divides over all devices."""
        return jax.local_device_count()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(
            name
            for name in TASKS
            if name in self.config.tasks and self.config.tasks[name].weight > 0
        )


def load_run(
    path: str,
    *,
    which: str = "ema",
    overrides: dict[str, Any] | None = None,
    pretrained: str | None = None,
) -> Run:
    """The run in a workdir, or at one of its checkpoints; `overrides` are of its `sampling` config.

    Its parameters are split as in training where its mesh fits the devices at hand, else over all
    of them. `pretrained` is where pretrained encoders lie, if no longer where the run found them.

    Raises FileNotFoundError if there is no checkpoint, ValueError if what is there does not fit
    together.
    """
    config = ConfigDict(checkpoint.load_config(path))
    for name, value in (overrides or {}).items():
        if value is not None:
            config.sampling[name] = value
    if pretrained is not None:
        config.conditioning.folder = pretrained
    config.data.text_cache = ""  # of the prompts of its training
    workdir = checkpoint.workdir_of(path)
    try:
        mesh = make_mesh(config)
    except ValueError:
        mesh = sharding.make_mesh(data=1, fsdp=-1)
    jax.set_mesh(mesh)
    conditioner, frozen = encoders.load(workdir, folder=config.conditioning.folder, mesh=mesh)
    model = make_model(config, conditioner)
    abstract = jax.eval_shape(make_init(config, model, conditioner), frozen, jax.random.key(0))
    params = checkpoint.load_params(
        path, which=which, abstract=abstract, shardings=sharding.tree_shardings(abstract, mesh)
    )
    return Run(
        path=str(path),
        step=checkpoint.step_of(path),
        config=config,
        params=params,
        frozen=frozen,
        mesh=mesh,
        generator=Generator(model=model, conditioner=conditioner, sampler=sampler(config)),
        tokenizer=tokenizer(config),
    )
