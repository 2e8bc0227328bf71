"""A trained model, ready: load it, then one method a task.

    pipeline = Pipeline.load("runs/stage3")
    image = pipeline.generate("a red fox in the snow", seed=7)
    winter = pipeline.edit(image, "make it snow")

The command line, evaluation and the previews of a training all go through `Pipeline`, so what is
measured is what users get.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypedDict, Unpack

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, PyTree, UInt8
from PIL import Image

from data_pipelines.collate import Collator
from data_pipelines.tasks import INPUTS, TASKS, Example, find_task
from data_pipelines.tokenizer import TokenizedText, Tokenizer, load_tokenizer
from univg_jax import assembly, checkpoint, encoders, sharding, tpu
from univg_jax.batch import Batch, BatchShape, Text
from univg_jax.errors import NotFoundError, UserError, check_name, quote
from univg_jax.images import Picture, check_finite, open_any, to_mask, to_rgb, to_uint8
from univg_jax.pretrained import local_path
from univg_jax.progress import timed
from univg_jax.sampling import NULL_CONDITIONS, Generator, guidance_weights
from univg_jax.settings import Config, Options
from univg_jax.workdir import CHECKPOINTS

Pixels = UInt8[np.ndarray, "b h w 3"]
Output = Image.Image | list[Image.Image]  # a list where an argument is one


class RunOptions(TypedDict, total=False):
    """What every method takes beside its inputs; see `Pipeline.run`."""

    seed: int | Sequence[int]
    callback: Callable[[int], object] | None


MAX_BATCH = 8  # images that a list is cut into, where the devices do not ask for more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A trained model with all that it needs to make images.

    `step` is the checkpoint's. `digests` name the content of all that was read with it: the
    weights, each encoder, the tokenizer. They tell models apart that lay at one path. In a run of
    several processes every process makes the same calls, and `generate_batch` takes and gives each
    process its own rows.
    """

    config: Config
    params: PyTree
    frozen: PyTree  # parameters of the encoders
    mesh: jax.sharding.Mesh
    generator: Generator
    collator: Collator
    path: str = ""
    step: int = 0
    which: str = "ema"  # of the checkpoint's parameters: their average, or "params"
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # What was compiled, so as to say it only once; copies with other parameters share it.
    compiled: set[Hashable] = dataclasses.field(default_factory=set, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        step: int | None = None,
        ema: bool = True,
        sampling: Options | None = None,
        pretrained: str | None = None,
    ) -> "Pipeline":
        """The run in a workdir, at its newest sound checkpoint or at `step`.

        `path` may also be a checkpoint, `workdir/checkpoints/STEP`, and may be `gs://`. `ema=False`
        takes the raw parameters instead of their average. `sampling` replaces values of the run's
        `sampling` settings, such as `{"steps": 20}`. `pretrained` is where pretrained encoders lie,
        if no longer where the run found them.

        Parameters are split as in training where that mesh fits the devices at hand, else over all
        of them. Raises UserError if there is no checkpoint, or what is there does not fit together.
        """
        tpu.silence_if_absent()
        path = epath.Path(path).expanduser()
        if step is not None:
            path = checkpoint.workdir_of(path) / CHECKPOINTS / str(step)
        config = load_config(path, sampling=sampling, pretrained=pretrained)
        try:
            mesh = assembly.make_mesh(config)
        except UserError:
            mesh = sharding.make_mesh(data=1, fsdp=-1)
        found = encoders.load(
            checkpoint.workdir_of(path), folder=config.conditioning.folder, mesh=mesh
        )
        model = assembly.make_model(config, found.conditioner)
        tokenizer = load_tokenizer(encoders.tokenizer_folder(config.conditioning))
        blank = cls(
            config=config,
            params=None,
            frozen=found.frozen,
            mesh=mesh,
            generator=assembly.make_generator(config, model, found.conditioner),
            collator=Collator(
                tokenizer=tokenizer,
                shape=BatchShape.of(config.data),
                caption_weights=config.data.caption_weights,
            ),
            which="ema" if ema else "params",
            digests={
                "weights": "",
                **encoders.digests(checkpoint.workdir_of(path)),
                "tokenizer": tokenizer.fingerprint,
            },
        )
        return blank.at(path)

    def at(self, path: epath.PathLike) -> "Pipeline":
        """The same model with the parameters of another checkpoint of its run.

        All else stays, the sampling too, and nothing is compiled again. Raises UserError if there
        is no checkpoint, or it is not of this model.
        """
        step = checkpoint.step_of(path)
        weights = checkpoint.digests(path)[step]
        abstract = jax.eval_shape(self._init_params, jax.random.key(0))
        params = checkpoint.load_params(
            path,
            which=self.which,
            abstract=abstract,
            shardings=sharding.tree_shardings(abstract, self.mesh),
        )
        return dataclasses.replace(
            self,
            params=params,
            path=os.fspath(path),
            step=step,
            digests={**self.digests, "weights": weights},
        )

    # One method a task. Pictures are paths, PIL images or numpy uint8 [h w 3]; they are cropped to
    # the square that the model was trained on. A list of any argument makes a list of images.

    def generate(self, prompt: str | Sequence[str], **options: Unpack[RunOptions]) -> Output:
        """Text to image. Options as in `run`."""
        return self.run("t2i", prompt=prompt, **options)

    def edit(self, image: Picture, instruction: str, **options: Unpack[RunOptions]) -> Output:
        """The image changed as the instruction says. Options as in `run`."""
        return self.run("ie", image=image, prompt=instruction, **options)

    def inpaint(
        self, image: Picture, mask: Picture, prompt: str = "", **options: Unpack[RunOptions]
    ) -> Output:
        """The image with what is white in `mask` made anew; the rest keeps its pixels."""
        return self.run("ip", image=image, mask=mask, prompt=prompt, **options)

    def layout(self, canvas: Picture, prompt: str, **options: Unpack[RunOptions]) -> Output:
        """A picture laid out as the canvas of colored blocks that the prompt names."""
        return self.run("lg", image=canvas, prompt=prompt, **options)

    def depth(self, image: Picture, **options: Unpack[RunOptions]) -> Output:
        """The depth of the image as a picture, near is bright."""
        return self.run("depth", image=image, **options)

    def pose(self, image: Picture, **options: Unpack[RunOptions]) -> Output:
        """The skeleton of the person in the image, as a picture."""
        return self.run("pose", image=image, **options)

    def segment(self, image: Picture, expression: str, **options: Unpack[RunOptions]) -> Output:
        """The mask of what the expression refers to, white on black."""
        return self.run("seg", image=image, prompt=expression, **options)

    def identity(self, face: Picture, prompt: str, **options: Unpack[RunOptions]) -> Output:
        """A picture of the person with this face, who is `<p>` in the prompt."""
        return self.run("id", face=face, prompt=prompt, **options)

    def run(
        self,
        task: str,
        *,
        prompt: str | Sequence[str] = "",
        image: Picture | Sequence[Picture] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        face: Picture | Sequence[Picture] | None = None,
        seed: int | Sequence[int] = 0,
        callback: Callable[[int], object] | None = None,
    ) -> Output:
        """The answer to any task; a list of them if any argument is a list.

        Lists must be of one length, and single values stand for every image. An image is a function
        of its inputs and its seed, whatever list it is in: with a single `seed`, image i of a list
        has seed + i. `callback(n)` is called when n steps of the solver are done.

        Raises UserError for a task that the run was not trained on, a missing or superfluous input,
        or one that cannot be read.
        """
        task = self.check_task(task)
        inputs = dict(prompt=prompt, image=image, mask=mask, face=face)
        lists = {k: v for k, v in {**inputs, "seed": seed}.items() if isinstance(v, list | tuple)}
        count = len(next(iter(lists.values()))) if lists else 1
        if any(len(values) != count for values in lists.values()):
            lengths = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
            raise UserError(f"lists of different lengths: {lengths}")
        if not count:
            return []
        seeds = list(seed) if "seed" in lists else [seed + i for i in range(count)]
        examples = []
        for i in range(count):
            given = {k: v[i] if k in lists else v for k, v in inputs.items()}
            pictures = {name: read_input(name, given[name]) for name in INPUTS}
            examples.append(
                TASKS[task].from_inputs(
                    prompt=given["prompt"], **pictures, resolution=self.config.data.resolution
                )
            )
        images = list(self.answer(task, examples, seeds=seeds, callback=callback))
        return images if lists else images[0]

    def answer(
        self,
        task: str,
        examples: Sequence[Example],
        *,
        seeds: Sequence[int],
        batch_size: int | None = None,
        callback: Callable[[int], object] | None = None,
    ) -> Iterator[Image.Image]:
        """An image for each example and its seed, in order, as soon as its batch is made.

        Examples come from a user's inputs (`Task.from_inputs`) or from data (`HeldOut.row`).
        `batch_size` images are made at a time, or as many more as divide over the devices; by
        default up to `MAX_BATCH`. Batches of another size may round a pixel otherwise, by 1 of 255.
        """
        unit = self.rows
        most = -(-batch_size // unit) * unit if batch_size else max(unit, MAX_BATCH // unit * unit)
        size = min(-(-len(examples) // unit) * unit, most)
        rows = [self.collator.row(example, task=task, sample_id=0) for example in examples]
        for start in range(0, len(rows), size):
            chunk, chunk_seeds = rows[start:][:size], list(seeds[start:][:size])
            padding = size - len(chunk)  # with one size for all batches, one program serves all
            batch = self.collator(chunk + chunk[-1:] * padding)
            made = self.generate_batch(
                batch, task, seed=chunk_seeds + chunk_seeds[-1:] * padding, callback=callback
            )
            for row, pixels in zip(chunk, made):  # without the padding
                if row.example.mask is not None:  # what is kept is the input's own pixels
                    pixels = np.where(row.example.mask > 0, pixels, row.example.source)
                yield Image.fromarray(pixels)

    def generate_batch(
        self,
        batch: Batch,
        task: str,
        *,
        seed: int | Sequence[int] = 0,
        callback: Callable[[int], object] | None = None,
    ) -> Pixels:
        """Images for this process's rows of a batch of one task: guidance, solver and decoder.

        The noise of a row is a function of (seed, its sample id); `seed` may be one for each row.
        `callback(n)` is called when n steps of the solver are done; of several processes all or
        none must have one.
        """
        seeds = np.broadcast_to(np.asarray(seed), (batch.size,))
        if not (np.issubdtype(seeds.dtype, np.integer) and np.all((seeds >= 0) & (seeds < 2**32))):
            raise UserError(f"seed={seed}: expected whole numbers from 0 to {2**32 - 1}")
        names = [
            f"{task}: the picture of seed {s}, sample {i}"
            for s, i in zip(seeds, batch.sample_id, strict=True)
        ]
        weights = guidance_weights(self.config.sampling.guidance.get(task))
        drops = NULL_CONDITIONS[: len(weights)]
        passes = [self.collator.drop_conditions(batch, drop) for drop in drops]
        with jax.set_mesh(self.mesh):
            passes, seeds = sharding.shard_batch((passes, seeds.astype(np.uint32)), self.mesh)
            arguments = (self.params, self.frozen, passes)
            program = (self.generator, batch.size, len(passes), callback is None)
            if program not in self.compiled:
                with timed(f"compiling the sampler (batch of {batch.size})"):
                    self.generator.compile(
                        *arguments, weights=weights, seeds=seeds, stepwise=callback is not None
                    )
                self.compiled.add(program)
            images = self.generator(*arguments, weights=weights, seeds=seeds, on_step=callback)
            return _to_pixels(sharding.local_rows(images, self.mesh), names)

    def embed_prompts(self, prompts: Sequence[TokenizedText]) -> Text:
        """Embeddings of this process's prompts, a batch of which every process passes a part."""
        tokens = np.stack([prompt.tokens for prompt in prompts])
        mask = np.stack([prompt.text_mask for prompt in prompts])
        with jax.set_mesh(self.mesh):
            tokens, mask = sharding.shard_batch((tokens, mask), self.mesh)
            embedded = self._embed_prompts(self.frozen, tokens, mask)
            return jax.tree.map(lambda x: sharding.local_rows(x, self.mesh), embedded)

    @functools.cached_property
    def _embed_prompts(self) -> Callable[[PyTree, jax.Array, jax.Array], Text]:
        return jax.jit(self.generator.conditioner.embed_text)

    def reconstruct(self, batch: Batch) -> Pixels:
        """What the codec makes of the targets, for this process's rows."""
        with jax.set_mesh(self.mesh):
            target = sharding.shard_batch(batch.target, self.mesh)
            images = sharding.local_rows(self._reconstruct(self.frozen, target), self.mesh)
            names = [f"the codec's picture of sample {i}" for i in batch.sample_id]
            return _to_pixels(images, names)

    @functools.cached_property
    def _reconstruct(self) -> Callable[[PyTree, jax.Array], jax.Array]:
        conditioner = self.generator.conditioner
        return jax.jit(
            lambda frozen, images: conditioner.decode(frozen, conditioner.encode(frozen, images))
        )

    def with_sampling(self, options: Options) -> "Pipeline":
        """The same model with other `sampling` settings, such as `{"steps": 20}`.

        Raises UserError for an unknown setting, and for a value that cannot be.
        """
        stored = self.config.to_dict()
        config = Config.of({**stored, "sampling": {**stored["sampling"], **options}})
        generator = dataclasses.replace(self.generator, sampler=config.sampling.sampler)
        return dataclasses.replace(self, config=config, generator=generator)

    def untrained(self, *, seed: int) -> "Pipeline":
        """The same model at its initialization.

        Its output layer is zero, so one step of any solver is the whole flow.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.params)
        with jax.set_mesh(self.mesh):
            init = jax.jit(self._init_params, out_shardings=shardings)
            params = init(jax.random.key(seed))
        sampler = dataclasses.replace(self.generator.sampler, steps=1)
        generator = dataclasses.replace(self.generator, sampler=sampler)
        return dataclasses.replace(self, params=params, generator=generator)

    def _init_params(self, key: jax.Array) -> PyTree:
        spec = self.collator.shape.spec(1)
        encoded = self.generator.conditioner.encoded_spec(self.frozen, spec)
        return self.generator.model.init_params(key, *encoded)

    def check_task(self, task: str) -> str:
        """The name in TASKS of a task, which may be given by another of its names.

        Raises UserError for one that is unknown, or that the model was not trained on.
        """
        name = find_task(task).name
        return check_name(name, self.tasks, what=f"task of {self.path or 'this run'}:")

    @property
    def tokenizer(self) -> Tokenizer:
        """The text encoder's tokenizer."""
        return self.collator.tokenizer

    @property
    def rows(self) -> int:
        """The rows of each process in the smallest batch that divides over all devices."""
        return jax.local_device_count()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the model was trained on, in the order of TASKS."""
        return trained_tasks(self.config)


def _to_pixels(images: Float[np.ndarray, "b h w 3"], names: Sequence[str]) -> Pixels:
    check_finite(images, names, what="picture")
    return to_uint8(images)


def trained_tasks(config: Config) -> tuple[str, ...]:
    """The tasks that a run trains on, in the order of TASKS."""
    return tuple(t for t in TASKS if t in config.tasks and config.tasks[t].weight > 0)


def load_config(
    path: epath.PathLike, *, sampling: Options | None = None, pretrained: str | None = None
) -> Config:
    """The config of `Pipeline.load`, which takes the same arguments, without the model."""
    if pretrained is not None and not local_path(pretrained).is_dir():
        raise NotFoundError(f"pretrained={pretrained} is not a folder")
    stored = checkpoint.load_config(path)
    stored["sampling"] = {**stored["sampling"], **(sampling or {})}
    # A cache has the prompts and the pictures of the training only.
    stored["data"]["text_cache"] = stored["data"]["latent_cache"] = ""
    if pretrained is not None:
        stored["conditioning"]["folder"] = pretrained
    return Config.of(stored)


def read_input(
    name: str, given: Picture | None, *, label: str = ""
) -> UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w"] | None:
    """What a user gives as one of INPUTS: RGB, or of a mask 1 where it is white; None for None.

    Raises UserError, where `label` (`name` without one) says which input cannot be read.
    """
    if given is None:
        return None
    try:
        return (to_mask if name == "mask" else to_rgb)(open_any(given))
    except UserError as error:
        where = label or name
        if isinstance(given, str | os.PathLike):
            path = os.fspath(given)
            where += f"={path if len(path) <= 200 else quote(path, most=200)}"
        raise type(error)(f"{where} {error}") from None
