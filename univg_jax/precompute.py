"""What frozen encoders make of a run's prompts and pictures, computed once and kept on disk.

Each process reads its own rows of every batch and encodes, on its own devices, what no process
had before: the processes exchange the keys of their rows. They write files of their own, and
process 0 the record that makes a cache of them once all are done.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data_pipelines import cache, fit_data, tasks
from data_pipelines.cache_files import KEY_BYTES, Writer, check_unfinished
from data_pipelines.collate import Collator, Row
from data_pipelines.held_out import HeldOut
from data_pipelines.mixture import Stream
from data_pipelines.run_rows import rows_of_run
from data_pipelines.tokenizer import TokenizedText
from univg_jax import assembly, encoders, sharding
from univg_jax.conditioning import encode_images
from univg_jax.errors import check_name
from univg_jax.progress import Bar
from univg_jax.settings import Config
from univg_jax.together import barrier, each_together, of_all, together
from univg_jax.training.initialize import begin_stream, find_parent

WHAT = ("text", "latents")
# Pictures that a device encodes at a time: so many pixels, and no more than so many pictures.
PIXELS, PICTURES = 2**22, 8


def cache_run(
    config: Config, out: epath.PathLike, *, steps: int, what: Sequence[str] = ("text",)
) -> dict[str, int]:
    """Encodes into `out` what the first `steps` steps, validation and previews need.

    `text`: every prompt; with `data.text_cache=out` the run needs no text encoder. `latents`: every
    target, and every source that is not drawn at random; with `data.latent_cache=out` the step does
    not encode them. Returns how many there are of each. A build that was killed goes on. Raises
    UserError, and AlreadyExistsError if there is a finished cache already.
    """
    config = assembly.uncached(config)
    kinds = {"text": cache.TEXT, "latents": cache.LATENTS}
    with together():
        assembly.check_config(config)
        for name in what:
            check_unfinished(out, kinds[check_name(name, WHAT, what="name in --what:")])
    assembly.prepare_data(config)
    with together():
        collator = assembly.make_collator(config)
    builder = _Builder(config=config, out=epath.Path(out), collator=collator)
    makers = {"text": builder.text_writer, "latents": builder.latents_writer}
    writers = {name: makers[name]() for name in what}
    barrier("univg_jax.precompute.begin")  # before anybody writes
    ledgers = {name: _Ledger(writer, width=builder.width(name)) for name, writer in writers.items()}
    if "text" in what:
        ledgers["text"].add(builder.tags())
    hosts, stream = assembly.hosts(), builder.stream()
    rows = rows_of_run(config.data, stream, builder.held_out(stream), steps=steps, hosts=hosts)
    desc, is_main = f"cache {', '.join(what)}", jax.process_index() == 0
    with Bar(rows, desc, total=steps, unit="step", disable=not is_main) as bar:
        for found in each_together(bar):
            for name, ledger in ledgers.items():
                ledger.add([item for row in found for item in builder.items(name, row)])
    with together():
        for writer in writers.values():
            writer.flush()
    with together():
        return {name: writer.finish() if is_main else 0 for name, writer in writers.items()}


_Item = tuple[bytes, TokenizedText | cache.Picture, tuple[int, ...] | None]  # with key and group


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Builder:
    """What of a run's rows is encoded, and by what."""

    config: Config
    out: epath.Path
    collator: Collator

    def stream(self) -> Stream:
        """The run's stream, where the run begins."""
        stream = Stream(
            self.config,
            collator=self.collator,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        begin_stream(self.config, stream)
        return stream

    def held_out(self, stream: Stream) -> Iterator[HeldOut]:
        """The run's held-out examples: for losses in the stream's shapes, for previews square."""
        c = self.config.train
        for num, shapes in ((c.eval_examples, stream.shapes), (c.sample_examples, ())):
            for name in stream.shares if num else ():
                yield HeldOut(
                    self.config,
                    name,
                    split="validation",
                    num=num,
                    collator=self.collator,
                    shapes=shapes,
                    hosts=assembly.hosts(),
                )

    @property
    def mesh(self) -> Mesh:
        """This process's own devices: processes encode different numbers of rows."""
        return sharding.make_mesh(data=1, fsdp=-1, devices=jax.local_devices())

    def text_writer(self) -> Writer:
        """Loads the text encoder."""
        conditioning, mesh = self.config.conditioning, self.mesh
        module, params = encoders.load_text(conditioning, mesh=mesh)
        embed = jax.jit(lambda params, tokens, mask: module.apply({"params": params}, tokens, mask))
        return cache.text_writer(
            self.out,
            embed=_on(
                mesh, lambda tokens, mask: embed(params, jnp.asarray(tokens), jnp.asarray(mask))
            ),
            identity=encoders.text_identity(conditioning, num_tokens=self.config.data.num_tokens),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def latents_writer(self) -> Writer:
        """Loads the codec, or fits it; it stays with the cache."""
        mesh, parent = self.mesh, find_parent(self.config.init_from)
        codec, params = encoders.prepare_codec(
            self.config.conditioning,
            workdir=self.out,
            init_from=parent and parent.encoders_from,
            images=lambda: fit_data.targets(self.config, collator=self.collator),
            mesh=mesh,
        )
        encode = jax.jit(lambda params, pixels: encode_images(codec, params, pixels))

        def batch_size(shape: tuple[int, ...]) -> int:
            return mesh.size * max(1, min(PICTURES, PIXELS // (shape[0] * shape[1])))

        return cache.latents_writer(
            self.out,
            encode=_on(mesh, lambda pixels: encode(params, sharding.shard_batch(pixels, mesh))),
            identity=encoders.codec_identity(self.out, codec),
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def items(self, name: str, row: Row) -> list[_Item]:
        """What is cached of a row."""
        if name == "text":
            # Also the prompt of a row that goes without it: whoever reads the row tokenizes it.
            text = tasks.prompt(row.task, row.example.text)
            prompt = dataclasses.replace(row.prompt, text=text)
            return [(cache.text_key(prompt), prompt, None)]
        found = cache.pictures(row.example, task=row.task, drop=row.drop)
        origin, index = row.origin
        return [
            (
                cache.picture_key(pixels),
                cache.Picture(pixels=pixels, name=f"the {which} of {origin.name}[{index}]"),
                pixels.shape,
            )
            for which, pixels in found.items()
        ]

    def tags(self) -> list[_Item]:
        """The prompts of rows that go without their text."""
        texts = [tasks.prompt(name, "") for name, task in self.config.tasks.items() if task.weight]
        num_tokens = self.config.data.num_tokens
        rows = [
            dataclasses.replace(self.collator.tokenizer(text, num_tokens), text=text)
            for text in texts
        ]
        return [(cache.text_key(row), row, None) for row in rows]

    def width(self, name: str) -> int:
        """The most items that a process has at a time."""
        rows = self.config.data.batch_size // jax.process_count()
        return max(rows * (2 if name == "latents" else 1), len(tasks.TASKS))


class _Ledger:
    """Gives a writer the items that no process had before."""

    def __init__(self, writer: Writer, *, width: int):
        self._writer, self._width, self._seen = writer, width, set(writer.done)

    def add(self, items: Sequence[_Item]) -> None:
        """Every process calls it equally often. Of equal items the first process has the one."""
        all_keys = self._all_keys([key for key, _, _ in items])
        with together():
            for process, keys in enumerate(all_keys):
                for index, key in enumerate(keys):
                    if key not in self._seen:
                        self._seen.add(key)
                        if process == jax.process_index():
                            _, item, group = items[index]
                            self._writer.add(key, item, group=group)

    def _all_keys(self, mine: list[bytes]) -> list[list[bytes]]:
        """The keys of every process."""
        if jax.process_count() == 1:
            return [mine]
        keys = np.zeros((self._width, KEY_BYTES), np.uint8)
        for row, key in enumerate(mine):
            keys[row] = np.frombuffer(key, np.uint8)
        found, counts = of_all((keys, np.int32(len(mine))))
        return [[bytes(key) for key in k[:count]] for k, count in zip(found, counts, strict=True)]


def _on(mesh: Mesh, compute: Callable) -> Callable:
    """`compute` on a mesh, with its result on the host."""

    def computed(*arrays: np.ndarray) -> object:
        with jax.set_mesh(mesh):
            return jax.device_get(compute(*arrays))

    return computed
