"""From a config to the parts of a run: `make_run` composes what the other functions make."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from absl import logging
from etils import epath
from jaxtyping import PyTree

from data_pipelines import build, fit_data
from data_pipelines.cache import CachedLatents, CachedTokenizer
from data_pipelines.collate import Collator
from data_pipelines.datasets import DATASETS
from data_pipelines.held_out import HeldOut, HeldOutBatches, Hosts
from data_pipelines.mixture import Stream
from data_pipelines.quarantine import quarantine_file
from data_pipelines.sources import open_sources
from data_pipelines.tasks import TASKS
from data_pipelines.tokenizer import Tokenizer, load_tokenizer
from univg_jax import checkpoint, encoders, sharding, tpu
from univg_jax.batch import BatchShape
from univg_jax.conditioning import Conditioner
from univg_jax.encoders import Encoders
from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.files import check_output, read_json
from univg_jax.lock import WorkdirLock
from univg_jax.models.mmdit import FROM_ENCODERS, make_mmdit
from univg_jax.models.univg import UniVG
from univg_jax.sampling import Generator
from univg_jax.settings import Config
from univg_jax.together import most_of_all, together
from univg_jax.training import loop
from univg_jax.training.initialize import begin_stream, find_parent
from univg_jax.training.step import TrainState, TrainStep
from univg_jax.training.watchdog import Watchdog
from univg_jax.workdir import is_claimed, newest_step, probe, resume


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run's parts, ready to train."""

    config: Config
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    collator: Collator
    step_fns: TrainStep
    frozen: PyTree
    stream: Stream
    lock: WorkdirLock
    allow_config_change: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the run trains, in the order of TASKS."""
        return tuple(name for name in TASKS if name in self.stream.shares)

    @property
    def generator(self) -> Generator:
        """What samples from the model in training."""
        return make_generator(self.config, self.step_fns.model, self.step_fns.conditioner)

    def validation(
        self, *, num: int, batch_size: int, in_buckets: bool = False
    ) -> dict[str, HeldOutBatches]:
        """This process's batches of the first `num` validation examples of each task.

        They are squares of `data.resolution`, or `in_buckets` of the shapes that the stream has.
        There are none where `num` is 0, and the split then need not exist. All processes call it.
        """
        if not num:
            return {}
        c = self.config
        with Watchdog(self.workdir, c.train, part="the validation data"):
            sources = open_sources(_source_names(c), "validation", data_dir=c.data.dir)
            return {
                name: HeldOutBatches(
                    HeldOut(
                        c,
                        name,
                        split="validation",
                        num=num,
                        collator=self.collator,
                        shapes=self.stream.shapes if in_buckets else (),
                        hosts=hosts(),
                        sources=sources,
                    ),
                    batch_size=batch_size,
                    collator=self.collator,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                )
                for name in self.tasks
            }

    def train(
        self, *, preview: loop.Preview | None = None, profile: range | None = None
    ) -> TrainState:
        """Trains to the config's last step, from wherever the workdir is; see `loop.train`.

        Gives the workdir back to other processes.
        """
        c = self.config
        validation = self.validation(
            num=c.train.eval_examples, batch_size=c.data.batch_size, in_buckets=True
        )
        with self.lock, jax.set_mesh(self.mesh):
            state = loop.train(
                self.step_fns,
                workdir=self.workdir,
                stream=self.stream,
                frozen=self.frozen,
                validation=validation,
                preview=preview,
                profile=profile,
                check=self.lock.check,
                confirm=self.lock.confirm,
                allow_config_change=self.allow_config_change,
            )
        self.stream.close()
        return state


def make_run(
    config: Config,
    workdir: epath.PathLike,
    *,
    fallback: bool = False,
    takeover: bool = False,
    allow_config_change: Sequence[str] = (),
) -> Run:
    """All that `config` needs to train in `workdir`: checked, built, read or fitted.

    All that can be wrong with the config and its data is checked before anything is built or
    written. The workdir becomes this config's only when it trains (`loop.train`): until then
    another config may take its place. The run holds the workdir (`WorkdirLock`) until it is
    trained; `takeover` takes it from a process that lives. With `fallback` newest checkpoints that
    are damaged are set aside. `allow_config_change`: see `workdir.resume`. Raises UserError.
    """
    tpu.silence_if_absent()
    workdir = epath.Path(workdir).expanduser()
    with Watchdog(workdir, config.train, part="the config") as watchdog:
        config = resume(workdir, config, allow=allow_config_change)
        mesh = _check(config, workdir)
        watchdog.begin("the data", is_bounded=False)
        prepare_data(config)
        watchdog.begin("the data")
        collator, stream = _open_stream(config, workdir)
        if len(stream.shapes) > 1:
            logging.info("%s", "\n".join(["buckets of the stream:", *stream.describe_buckets()]))
        lock = WorkdirLock(workdir, active=jax.process_index() == 0, takeover=takeover)
        try:
            probe(workdir)  # also a barrier: the first process has the workdir
            if fallback:
                checkpoint.fall_back(workdir)
            begin_stream(config, stream, workdir=workdir)  # refuses data that has changed
            watchdog.begin("the encoders")
            found = prepare_encoders(config, workdir, mesh, before_write=lock.confirm)
            with together():
                if collator.latents is not None:
                    codec = found.conditioner.codec
                    collator.latents.check(encoders.codec_identity(workdir, codec))
        except BaseException:
            lock.release()
            raise
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        collator=collator,
        step_fns=TrainStep(
            config=config,
            model=make_model(config, found.conditioner),
            conditioner=found.conditioner,
            task_names=tuple(TASKS),
        ),
        frozen=found.frozen,
        stream=stream,
        lock=lock,
        allow_config_change=tuple(allow_config_change),
    )


def _check(config: Config, workdir: epath.Path) -> jax.sharding.Mesh:
    """Raises UserError for what can be wrong before any data is there; returns the mesh."""
    with together():
        check_config(config)
    mesh = make_mesh(config)
    devices = sharding.num_row_shards(mesh)
    if config.data.batch_size % devices:
        raise UserError(
            f"data.batch_size={config.data.batch_size}: expected a multiple of the {devices} "
            "devices that share its rows (mesh.data x mesh.fsdp)"
        )
    if not newest_step(workdir) and (parent := find_parent(config.init_from)):
        parent.check()
        with together():
            encoders.check(config.conditioning, init_from=parent.encoders_from)
    return mesh


def hosts() -> Hosts:
    """The processes of this run, which read held-out examples together."""
    return Hosts(index=jax.process_index(), count=jax.process_count(), agree=most_of_all)


def _open_stream(config: Config, workdir: epath.Path) -> tuple[Collator, Stream]:
    """Opens the data, and tries some of it; raises on all processes what goes wrong on one."""
    process = dict(process_index=jax.process_index(), process_count=jax.process_count())
    with together():
        if config.train.eval_examples or config.train.sample_examples:
            check_data(config, "validation")
        collator = make_collator(config)
        file = quarantine_file(workdir, **process)
        return collator, Stream(config, collator=collator, quarantine=file, **process)


def is_finished(
    config: Config, workdir: epath.PathLike, *, allow_config_change: Sequence[str] = ()
) -> bool:
    """Whether `workdir` has the last step of `config` and its summary.

    Raises UserError if what is in it is of another config.
    """
    workdir = epath.Path(workdir).expanduser()
    file = workdir / "summary.json"
    try:
        summary = read_json(file)
    except NotFoundError:
        return False
    except UserError as error:
        logging.warning("%s: it is made again", error)
        return False
    resume(workdir, config, allow=allow_config_change)
    return summary.get("steps") == newest_step(workdir) == config.train.steps


def check_config(config: Config) -> None:
    """Raises UserError for all that can be wrong in a config and needs no data.

    Sections check their own values (`settings`); here are the names that other rooms define.
    """
    dataset = DATASETS.get(config.data.dataset)
    if dataset is None and not epath.Path(config.data.dir).exists():
        raise NotFoundError(
            f"data.dir={config.data.dir!r} does not exist, and data.dataset="
            f"{config.data.dataset!r} is none of the datasets that are built on demand "
            f"({', '.join(DATASETS)})"
        )
    if dataset is not None:
        dataset.make_options(config.data.build)
    used = {name: task.source_names for name, task in config.tasks.items()}
    for name, sources in [*used.items(), *config.conditioning.fit_on.items()]:
        check_name(name, TASKS, what="task")
        for source in sources:
            if dataset is not None and not epath.Path(source).exists():
                families = dataset.families or (dataset.name,)
                check_name(source, families, what=f"source of task {name}:")
    for name in config.flow.weight_changes:
        check_name(name, TASKS, what="task in flow.weight_changes:")
    for name in config.sampling.guidance:
        check_name(name, TASKS, what="task in sampling.guidance:")
    for name in FROM_ENCODERS:
        if name in config.model.overrides:
            raise UserError(f"model.overrides.{name}: it follows from the encoders; leave it out")
    encoders.check(config.conditioning)
    make_tokenizer(config)
    conditioner = encoders.abstract(config.conditioning).conditioner
    cell, patch = conditioner.downsampling, make_model(config, conditioner).backbone.patch_size
    sides = {f"data.resolution={config.data.resolution}": (config.data.resolution,)}
    sides |= {f"data.buckets: {h}x{w}": (h, w) for h, w in config.data.buckets}
    for given, pixels in sides.items():
        if any(side % (cell * patch) for side in pixels):
            raise UserError(
                f"{given}: expected a multiple of {cell * patch} "
                f"(latent cells of {cell} pixels, patches of {patch} cells)"
            )


def prepare_data(config: Config) -> None:
    """Process 0 builds `data.dataset` where it is not there yet; the others wait."""
    if (dataset := DATASETS.get(config.data.dataset)) is None:
        return
    with together():
        if jax.process_index() == 0:
            if not epath.Path(config.data.dir).is_dir():
                check_output(config.data.dir, flag="data.dir", folder=True)
            build.build(dataset, config.data.dir, dataset.make_options(config.data.build))


def check_data(config: Config, split: str) -> None:
    """Opens every source that the config reads, which checks its files.

    Raises UserError (NotFoundError) with the file that is missing or not what it should be.
    """
    open_sources(_source_names(config), split, data_dir=config.data.dir)


def _source_names(config: Config) -> list[str]:
    """The sources that have a weight, each once."""
    tasks = [task for task in config.tasks.values() if task.weight]
    return list(dict.fromkeys(name for task in tasks for name in task.source_names))


def make_tokenizer(config: Config) -> Tokenizer:
    """The text encoder's tokenizer, with cached embeddings where the config has a cache.

    Raises UserError if `data.num_tokens` is none of the encoder's lengths.
    """
    loaded = load_tokenizer(encoders.tokenizer_folder(config.conditioning))
    loaded("", config.data.num_tokens)
    if config.data.text_cache:
        identity = encoders.text_identity(config.conditioning, num_tokens=config.data.num_tokens)
        loaded = CachedTokenizer(loaded, config.data.text_cache, identity=identity)
    return loaded


def make_collator(config: Config) -> Collator:
    """What makes batches of a config's shape from rows, with what the config has cached.

    Whether cached latents are those of the run's codec is known once there is one (`make_run`).
    """
    data, latents = config.data, None
    if data.latent_cache:
        latents = CachedLatents(
            data.latent_cache,
            draws_sources=draws_sources(config),
            encode_missing=data.encode_missing,
        )
    return Collator(
        tokenizer=make_tokenizer(config),
        shape=BatchShape.of(data),
        caption_weights=data.caption_weights,
        latents=latents,
    )


def draws_sources(config: Config) -> bool:
    """Whether the run trains a task whose sources are drawn at random, which no cache has."""
    return any(task.weight and TASKS[name].draws_source for name, task in config.tasks.items())


def prepare_encoders(
    config: Config,
    workdir: epath.PathLike,
    mesh: jax.sharding.Mesh,
    *,
    before_write: Callable[[], None] = lambda: None,
) -> Encoders:
    """The frozen encoders of a run: its own, its parent's, or fitted on its training data.

    A run that has checkpoints has its encoders, and neither opens its parent nor fits others.
    """
    skip = ("text",) if config.data.text_cache else ()
    if newest_step(workdir):
        folder = config.conditioning.folder
        return encoders.load(workdir, folder=folder, mesh=mesh, skip=skip)

    # Without a cache, which need not have the prompts of the rows that encoders are fitted on.
    plain = uncached(config)
    parent = find_parent(config.init_from)
    return encoders.prepare(
        config.conditioning,
        workdir=workdir,
        # A cache of latents keeps the codec that it was made with.
        init_from=(parent and parent.encoders_from) or config.data.latent_cache or None,
        images=lambda: fit_data.targets(config, collator=make_collator(plain)),
        portraits=lambda: fit_data.portraits(config, collator=make_collator(plain)),
        mesh=mesh,
        skip=skip,
        anew=not is_claimed(workdir),
        before_write=before_write,
    )


def uncached(config: Config) -> Config:
    """The config of the same run without its caches."""
    data = dataclasses.replace(config.data, text_cache="", latent_cache="")
    return dataclasses.replace(config, data=data)


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` over all devices. Raises UserError where it does not fit them."""
    width = make_mmdit(config.model.size, **config.model.overrides).hidden_dim
    return sharding.make_mesh(**dataclasses.asdict(config.mesh), width=width)


def make_model(config: Config, conditioner: Conditioner) -> UniVG:
    """The model of `config.model` for the latents and embeddings of these encoders."""
    backbone = make_mmdit(
        config.model.size,
        in_channels=2 * conditioner.latent_channels + 1,
        out_channels=conditioner.latent_channels,
        text_dim=conditioner.text_dim,
        pooled_dim=conditioner.pooled_dim,
        **config.model.overrides,
    )
    return UniVG(backbone=backbone, face_dim=conditioner.face_dim)


def make_generator(config: Config, model: UniVG, conditioner: Conditioner) -> Generator:
    """The sampler of `config.sampling` for a model."""
    return Generator(model=model, conditioner=conditioner, sampler=config.sampling.sampler)
