"""A trained model, ready: load it, then one method a task.

    pipe = Pipeline.load("runs/stage3")
    fox = pipe("a red fox in the snow", seed=7).image
    winter = pipe.edit(fox, "make it snow")

The command line, evaluation and the previews of a training all go through `Pipeline`, so what is
measured is what users get.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, PyTree, UInt8

from data_pipelines.collate import Collator
from data_pipelines.tasks import TASKS, find_task
from data_pipelines.tokenizer import TokenizedText, Tokenizer, load_tokenizer
from univg_jax import assembly, encoders, sharding, tpu
from univg_jax.batch import Batch, BatchShape, Text
from univg_jax.errors import NotFoundError, UnsupportedError, UserError, quote
from univg_jax.images import Picture, check_finite, to_uint8
from univg_jax.inputs import (
    Boxes,
    Callback,
    Margins,
    Request,
    RunOptions,
    Size,
    SizedOptions,
    check_seeds,
    check_text,
    each_of,
    make_request,
    sampling_options,
)
from univg_jax.pretrained import local_path
from univg_jax.progress import timed
from univg_jax.result import Result
from univg_jax.sampling import NULL_CONDITIONS, Generator, guidance_weights
from univg_jax.settings import Config, Guidance, Options
from univg_jax.trained import open_trained

Pixels = UInt8[np.ndarray, "b h w 3"]
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
        tasks: Sequence[str] | None = None,
        step: int | None = None,
        ema: bool = True,
        sampling: Options | None = None,
        pretrained: str | None = None,
    ) -> "Pipeline":
        """The run in a workdir, at its newest sound checkpoint or at `step`.

        `path` may also be a checkpoint, `workdir/checkpoints/STEP`, or a folder that `univg export`
        wrote as safetensors or orbax; it may be `gs://`. `tasks` are those that will be asked for,
        by default all: without one that has a face, the face encoder is not read, and the model
        has no such task. `ema=False` takes the raw parameters instead of their average. `sampling`
        replaces values of the run's `sampling` settings, such as `{"steps": 20}`. `pretrained` is
        where pretrained encoders lie, if no longer where the run found them.

        Parameters are split as in training where that mesh fits the devices at hand, else over all
        of them. Raises NotFoundError if there is no checkpoint, UnsupportedError for a task that
        the run was not trained on, and UserError if what is there does not fit together.

        Example:

            >>> Pipeline.load("runs/stage3", tasks=["edit", "depth"]).tasks
            ('t2i', 'ie', 'ip', 'lg', 'depth', 'pose', 'seg')
        """
        tpu.silence_if_absent()
        trained = open_trained(path, step=step)
        config = load_config(trained.path, sampling=sampling, pretrained=pretrained)
        known = trained_tasks(config)
        asked = known if tasks is None else [_check_task(t, known, trained.path) for t in tasks]
        has_faces = any("face" in TASKS[task].inputs for task in asked)
        try:
            mesh = assembly.make_mesh(config)
        except UserError:
            mesh = sharding.make_mesh(data=1, fsdp=-1)
        which = trained.which(ema=ema)
        found = encoders.load(
            trained.folder,
            folder=config.conditioning.folder,
            mesh=mesh,
            skip=() if has_faces else ("identity",),
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
            which=which,
            digests={
                "weights": "",
                **encoders.digests(trained.folder),
                "tokenizer": tokenizer.fingerprint,
            },
        )
        return blank.at(trained.path)

    def at(self, path: epath.PathLike) -> "Pipeline":
        """The same model with the parameters of another checkpoint of its run.

        All else stays, the sampling too, and nothing is compiled again. Raises UserError if there
        is no checkpoint, or it is not of this model.
        """
        trained = open_trained(path)
        step, weights = trained.step, trained.digest
        abstract = jax.eval_shape(self._init_params, jax.random.key(0))
        params = trained.load_params(
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

    # One method a task. Pictures are paths, PIL images or numpy uint8 [h w 3], of any size. A list
    # of any argument makes a list of images.

    def __call__(self, prompt: str | Sequence[str], **options: Unpack[SizedOptions]) -> Result:
        """Text to image.

        Example:

            >>> pipe("a pig on grass", seed=7).image.size
            (32, 32)
            >>> len(pipe(["a pig", "a cat"], size=(48, 32)).images)
            2
        """
        return self.run("t2i", prompt=prompt, **options)

    def edit(
        self,
        image: Picture | Sequence[Picture],
        instruction: str | Sequence[str],
        **options: Unpack[RunOptions],
    ) -> Result:
        """The image changed as the instruction says.

        Example:

            >>> pipe.edit("scene.png", "make it snow", image_guidance=2.0).image.size
            (50, 40)
        """
        return self.run("ie", image=image, prompt=instruction, **options)

    def inpaint(
        self,
        image: Picture | Sequence[Picture],
        mask: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        **options: Unpack[RunOptions],
    ) -> Result:
        """The image with what is white in `mask` made anew; the rest keeps its pixels.

        Example:

            >>> mask = np.zeros((40, 50), np.uint8)
            >>> mask[10:30, 20:40] = 255
            >>> filled = pipe.inpaint("scene.png", mask, "a pig on grass")
            >>> bool((np.asarray(filled.image) == scene)[mask == 0].all())
            True
        """
        return self.run("ip", image=image, mask=mask, prompt=prompt, **options)

    def outpaint(
        self,
        image: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        *,
        margins: Margins | None = None,
        aspect: float | int | str | None = None,
        **options: Unpack[SizedOptions],
    ) -> Result:
        """The image on a larger canvas, of which the rest is made; the image keeps its pixels.

        One of: `margins` in pixels, on every side or (left, top, right, bottom); `size`, in the
        middle of which the image lies; or `aspect`, width to height as in 1.5 or "3:2".

        Example:

            >>> pipe.outpaint("scene.png", "a pig on grass", margins=(0, 0, 30, 0)).image.size
            (80, 40)
            >>> pipe.outpaint("scene.png", aspect="2:1").image.size
            (80, 40)
        """
        return self.run("ip", image=image, prompt=prompt, margins=margins, aspect=aspect, **options)

    def layout(
        self,
        canvas: Picture | Sequence[Picture] | None = None,
        prompt: str | Sequence[str] = "",
        *,
        boxes: Boxes | Sequence[Boxes] | None = None,
        **options: Unpack[SizedOptions],
    ) -> Result:
        """A picture laid out as the canvas of colored blocks that the prompt names, or as `boxes`.

        A box is (name, (left, top, right, bottom)), in fractions of the picture. Its name is a
        phrase of the prompt; its color is the one that the prompt names behind it, as in "a pig
        (red block)", or a free one, which is then named there. `size` is for boxes.

        Example:

            >>> boxes = [("a pig", (0.1, 0.5, 0.5, 0.9)), ("an apple", (0.6, 0.6, 0.8, 0.8))]
            >>> laid_out = pipe.layout(prompt="a pig and an apple on grass", boxes=boxes)
            >>> laid_out.prompts
            ['a pig (red block) and an apple (blue block) on grass']
        """
        return self.run("lg", image=canvas, prompt=prompt, boxes=boxes, **options)

    def depth(self, image: Picture | Sequence[Picture], **options: Unpack[RunOptions]) -> Result:
        """The depth of the image, near is bright. The answer is in meters.

        Example:

            >>> depth = pipe.depth("scene.png")
            >>> depth.answer.shape, depth.answer.dtype
            ((40, 50), dtype('float32'))
        """
        return self.run("depth", image=image, **options)

    def pose(self, image: Picture | Sequence[Picture], **options: Unpack[RunOptions]) -> Result:
        """The skeleton of the person in the image. The answer is COCO's 17 joints.

        Example:

            >>> pipe.pose("scene.png").answer.shape
            (17, 3)
        """
        return self.run("pose", image=image, **options)

    def segment(
        self,
        image: Picture | Sequence[Picture],
        expression: str | Sequence[str],
        **options: Unpack[RunOptions],
    ) -> Result:
        """The mask of what the expression refers to, white on black. The answer is 0 or 1.

        Example:

            >>> pipe.segment("scene.png", "the pig").answer.shape
            (40, 50)
        """
        return self.run("seg", image=image, prompt=expression, **options)

    def identity(
        self,
        face: Picture | Sequence[Picture],
        prompt: str | Sequence[str],
        **options: Unpack[SizedOptions],
    ) -> Result:
        """A picture of the person with this face, who is `<p>` in the prompt.

        Example:

            >>> pipe.identity("face.png", "a portrait of <p>").image.size
            (32, 32)
        """
        return self.run("id", face=face, prompt=prompt, **options)

    def run(
        self,
        task: str,
        *,
        prompt: str | Sequence[str] = "",
        image: Picture | Sequence[Picture] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        face: Picture | Sequence[Picture] | None = None,
        boxes: Boxes | Sequence[Boxes] | None = None,
        margins: Margins | None = None,
        aspect: float | int | str | None = None,
        size: Size | None = None,
        seed: int | Sequence[int] = 0,
        guidance: float | int | None = None,
        image_guidance: float | int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        negative_prompt: str | Sequence[str] = "",
        callback: Callback | None = None,
    ) -> Result:
        """The answer to any task, by its name. All options of all methods are described here.

        Lists must be of one length, and single values stand for every image. An image is a function
        of its inputs and its seed, whatever list it is in: with a single `seed`, image i of a list
        has seed + i.

        A picture may have any size: it is put into the nearest of the shapes that the run was
        trained on, and the answer has the picture's size. `size` is (width, height) of an answer
        that no picture gives a size; by default the square that the run was trained on.

        `guidance` is the scale of the text and `image_guidance` that of the image; `steps` and
        `solver` ("euler" or "heun") solve the flow. By default they are the run's. What
        `negative_prompt` says is avoided: guidance leads away from it instead of from no text.
        `callback(step, total)` is called after each step of the solver; what it raises ends the
        call.

        Raises UnsupportedError for a task that the model does not have and for an input or option
        that the task does not take, NotFoundError for a file that does not exist, UserError for
        what is missing or cannot be, and NonFiniteError if the model's picture is not finite.

        Example:

            >>> result = pipe.run("edit", image="scene.png", prompt="make it snow", seed=3)
            >>> result.task, result.seeds, result.settings["steps"]
            ('ie', [3], 2)
        """
        task = self.check_task(task)
        if not (callback is None or callable(callback)):
            raise UserError(f"callback={quote(callback)}: expected a function of (step, total)")
        given = dict(
            prompt=prompt,
            image=image,
            mask=mask,
            face=face,
            boxes=boxes,
            seed=seed,
            negative_prompt=negative_prompt,
        )
        rows = each_of(given)
        seeds = check_seeds([row.pop("seed") for row in rows])
        if not isinstance(seed, list | tuple):
            seeds = check_seeds([seed + i for i, seed in enumerate(seeds)])
        negatives = [check_text("negative_prompt", row.pop("negative_prompt")) for row in rows]
        pipeline = self.with_options(
            task,
            guidance=guidance,
            image_guidance=image_guidance,
            steps=steps,
            solver=solver,
            negative_prompt=negative_prompt,
        )
        requests = [
            make_request(
                task, **row, margins=margins, aspect=aspect, size=size, data=self.config.data
            )
            for row in rows
        ]
        made = list(
            pipeline.answer(requests, seeds=seeds, negative_prompts=negatives, callback=callback)
        )
        return Result(
            task=task,
            images=[result.image for result in made],
            seeds=seeds,
            prompts=[request.example.text for request in requests],
            settings=pipeline.settings(task, negative_prompt=negative_prompt),
            answers=[result.answer for result in made],
        )

    def with_options(
        self,
        task: str,
        *,
        guidance: float | int | None = None,
        image_guidance: float | int | None = None,
        steps: int | None = None,
        solver: str | None = None,
        negative_prompt: str | Sequence[str] = "",
    ) -> "Pipeline":
        """The same model with these options of `run` for a task; None leaves the run's.

        Raises UnsupportedError for an option that the task does not take, and UserError for a value
        that cannot be.
        """
        options = sampling_options(
            self.config,
            task,
            guidance=guidance,
            image_guidance=image_guidance,
            steps=steps,
            solver=solver,
            negative_prompt=negative_prompt,
        )
        return self.with_sampling(options) if options else self

    def settings(self, task: str, *, negative_prompt: str | Sequence[str] = "") -> dict[str, Any]:
        """What a task's pictures are made with, as a `Result` says it."""
        sampling = self.config.sampling
        scales = sampling.guidance.get(task) or Guidance()
        return {
            "guidance": scales.text,
            "image_guidance": scales.image,
            **dataclasses.asdict(sampling.sampler),
            "negative_prompt": negative_prompt,
            "checkpoint": self.path,
            "checkpoint_step": self.step,
            "which": self.which,
            "weights": self.digests.get("weights", ""),
        }

    def answer(
        self,
        requests: Sequence[Request],
        *,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] = (),
        batch_size: int | None = None,
        callback: Callback | None = None,
    ) -> Iterator[Result]:
        """A result of one image for each request, in order, as soon as it can be.

        `batch_size` images are made at a time, or as many more as divide over the devices; by
        default up to `MAX_BATCH`. Batches of another size may round a pixel otherwise, by 1 of 255.
        Those of one task and shape are made together.
        """
        unit = self.rows
        most = -(-batch_size // unit) * unit if batch_size else max(unit, MAX_BATCH // unit * unit)
        negatives = list(negative_prompts) or [""] * len(requests)
        alike: dict[tuple[str, tuple[int, int]], list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault((request.task, request.letterbox.canvas), []).append(i)
        chunks = [
            (task, shape, size, indices[start : start + size])
            for (task, shape), indices in alike.items()
            # With one size for all batches of a shape, one program serves all.
            for size in [min(-(-len(indices) // unit) * unit, most)]
            for start in range(0, len(indices), size)
        ]
        rows = [
            self.collator.resized(*request.letterbox.canvas).row(
                request.example, task=request.task, sample_id=0
            )
            for request in requests
        ]
        steps = self.config.sampling.steps

        def of_chunk(k: int) -> Callback | None:
            if callback is None:
                return None
            return lambda step, _: callback(k * steps + step, len(chunks) * steps)

        done: dict[int, Result] = {}
        given = 0
        for k, (task, shape, size, indices) in enumerate(chunks):
            padded = indices + indices[-1:] * (size - len(indices))
            batch = self.collator.resized(*shape)([rows[i] for i in padded])
            made = self.generate_batch(
                batch,
                task,
                seed=[seeds[i] for i in padded],
                negative_prompts=[negatives[i] for i in padded],
                callback=of_chunk(k),
            )
            for i, pixels in zip(indices, made):  # without the padding
                image, answer = requests[i].finish(pixels)
                done[i] = Result(
                    task=task,
                    images=[image],
                    seeds=[int(seeds[i])],
                    prompts=[requests[i].example.text],
                    settings=self.settings(task, negative_prompt=negatives[i]),
                    answers=[answer],
                )
            while given in done:
                yield done.pop(given)
                given += 1

    def generate_batch(
        self,
        batch: Batch,
        task: str,
        *,
        seed: int | Sequence[int] = 0,
        negative_prompts: Sequence[str] = (),
        callback: Callback | None = None,
    ) -> Pixels:
        """Images for this process's rows of a batch of one task: guidance, solver and decoder.

        The noise of a row is a function of (seed, its sample id); `seed` may be one for each row.
        `negative_prompts` are what guidance leads each row away from; without them, from no text.
        `callback(step, total)` is called after each step of the solver; of several processes all or
        none must have one.
        """
        seeds = np.array(check_seeds(np.broadcast_to(np.asarray(seed), (batch.size,)).tolist()))
        names = [
            f"{task}: the picture of seed {s}, sample {i}"
            for s, i in zip(seeds, batch.sample_id, strict=True)
        ]
        weights = guidance_weights(self.config.sampling.guidance.get(task))
        drops = NULL_CONDITIONS[: len(weights)]
        passes = [
            self.collator.drop_conditions(batch, drop, instead=negative_prompts) for drop in drops
        ]
        total = self.config.sampling.steps
        on_step = None if callback is None else lambda step: callback(step, total)
        with jax.set_mesh(self.mesh):
            passes, seeds = sharding.shard_batch((passes, seeds.astype(np.uint32)), self.mesh)
            arguments = (self.params, self.frozen, passes)
            shape = batch.target.shape[:3]
            program = (self.generator, shape, len(passes), callback is None)
            if program not in self.compiled:
                with timed("compiling the sampler (batch of {}, {}x{} px)".format(*shape)):
                    self.generator.compile(
                        *arguments, weights=weights, seeds=seeds, stepwise=callback is not None
                    )
                self.compiled.add(program)
            images = self.generator(*arguments, weights=weights, seeds=seeds, on_step=on_step)
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
        config = with_sampling(self.config, options)
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

        Raises UserError for one that is unknown, and UnsupportedError for one that the model was
        not trained on.
        """
        return _check_task(task, self.tasks, self.path)

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
        """The tasks that the model was trained on and is loaded for, in the order of TASKS."""
        trained = trained_tasks(self.config)
        if self.generator.conditioner.identity is None or "identity" in self.frozen:
            return trained
        return tuple(task for task in trained if "face" not in TASKS[task].inputs)


def _check_task(task: str, known: Sequence[str], path: os.PathLike | str) -> str:
    """The name in TASKS of a task that may be given by another of its names.

    Raises UserError for one that is unknown, and UnsupportedError for one that is not `known`.
    """
    name = find_task(task).name
    if name not in known:
        raise UnsupportedError(
            f"unknown task of {os.fspath(path) or 'this run'}: {name!r} (known: {', '.join(known)})"
        )
    return name


def _to_pixels(images: Float[np.ndarray, "b h w 3"], names: Sequence[str]) -> Pixels:
    check_finite(images, names, what="picture")
    return to_uint8(images)


def with_sampling(config: Config, options: Options) -> Config:
    """The config with other `sampling` settings. Raises UserError for what cannot be."""
    stored = config.to_dict()
    return Config.of({**stored, "sampling": {**stored["sampling"], **options}})


def trained_tasks(config: Config) -> tuple[str, ...]:
    """The tasks that a run trains on, in the order of TASKS."""
    return tuple(t for t in TASKS if t in config.tasks and config.tasks[t].weight > 0)


def load_config(
    path: epath.PathLike, *, sampling: Options | None = None, pretrained: str | None = None
) -> Config:
    """The config of `Pipeline.load`, which takes the same arguments, without the model."""
    if pretrained is not None and not local_path(pretrained).is_dir():
        raise NotFoundError(f"pretrained={pretrained} is not a folder")
    stored = open_trained(path).config()
    stored["sampling"] = {**stored["sampling"], **(sampling or {})}
    # A cache has the prompts and the pictures of the training only.
    stored["data"]["text_cache"] = stored["data"]["latent_cache"] = ""
    if pretrained is not None:
        stored["conditioning"]["folder"] = pretrained
    return Config.of(stored)
