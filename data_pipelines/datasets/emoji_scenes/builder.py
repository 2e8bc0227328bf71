"""Writes the data set as TFDS ArrayRecord directories, drawn by all cores, the same bytes for any
number of them.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from data_pipelines import records
from data_pipelines.datasets.emoji_scenes import VERSION, family_dir
from data_pipelines.datasets.emoji_scenes.examples import FAMILIES, FIELDS, SPLITS, Build, example
from data_pipelines.datasets.emoji_scenes.sprites import WHITELIST

_CHUNK = 64  # records that one task of a process draws


class EmojiScenes(tfds.core.GeneratorBasedBuilder):
    """Scenes, edits, puppets and persons composed from Twemoji and DiceBear artwork; one builder
    config a family.
    """

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=family) for family in FAMILIES]  # noqa: RUF012 (TFDS's own form)

    def __init__(
        self,
        *,
        draw: Build | None = None,
        ordered_map: Callable[..., Any] = map,
        advance: Callable[[int], Any] = lambda count: None,
        **kwargs: Any,
    ):
        """`draw` is what to generate, by `ordered_map` (a pool's, for example); `advance` hears of
        records done.
        """
        self._draw, self._ordered_map, self._advance = draw, ordered_map, advance
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=records.family_features(FIELDS[self.builder_config.name]),
            license="artwork: Twemoji, CC BY 4.0; Personas by Draftbit, CC BY 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._draw is None:
            raise ValueError(
                "EmojiScenes has nothing to draw; build it with data_pipelines.datasets.emoji_scenes.build()"
            )
        family = self.builder_config.name
        count = self._draw.count(family, split)
        chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        draw = functools.partial(draw_chunk, self._draw, family, split)
        for chunk, drawn in zip(chunks, self._ordered_map(draw, chunks)):
            yield from zip(chunk, drawn)
            self._advance(len(chunk))


def draw_chunk(build: Build, family: str, split: str, indices: range) -> list[dict[str, Any]]:
    """The records of `indices`, drawn where this is called."""
    return [example(build, family, split, index) for index in indices]


def build(
    data_dir: str | os.PathLike,
    *,
    resolution: int,
    num_scenes: int,
    seed: int = 0,
    nouns: int | None = None,
    progress: bool = True,
    processes: int | None = None,
) -> None:
    """Build the families that are not complete yet, each into `family_dir(data_dir, family)`.

    `resolution` is the pictures' side in pixels; training gets `num_scenes` scenes, half as many
    edits, a fifth as many puppets and a twentieth as many persons of 4 pictures; `nouns` takes only
    the first of the whitelist (None: all); `processes` None is one a core. The records do not
    depend on `processes`.

    Raises ValueError for arguments out of range, or if `data_dir` holds a build by other arguments
    (`build.json`).
    """
    arguments = Build(
        resolution=resolution,
        num_scenes=num_scenes,
        seed=seed,
        nouns=len(WHITELIST) if nouns is None else nouns,
    )
    data_dir = epath.Path(data_dir)
    _claim(data_dir, arguments)
    missing = [family for family in FAMILIES if not is_complete(data_dir, family)]
    if not missing:
        return
    totals = {family: sum(arguments.count(family, split) for split in SPLITS) for family in missing}
    processes = min(processes or _cores(), -(-sum(totals.values()) // (4 * _CHUNK)))
    # TFDS's bars count shards; ours count records and know how many there will be
    tfds.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        ordered_map: Callable[..., Any] = map
        if processes > 1:  # spawned, because the caller may hold JAX's threads
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn)
            )
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            ordered_map = pool.map
        for family in missing:
            with tqdm(
                total=totals[family], desc=f"draw {family}", unit="", disable=not progress
            ) as bar:
                _write(
                    data_dir, family, draw=arguments, ordered_map=ordered_map, advance=bar.update
                )


def is_complete(data_dir: str | os.PathLike, family: str) -> bool:
    """Whether the family was written to its end: its directory is moved into place only then."""
    return (family_dir(data_dir, family) / "dataset_info.json").exists()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(data_dir: epath.Path, family: str, **how: Any) -> None:
    staging, final = data_dir / f".{family}.unfinished", family_dir(data_dir, family)
    for leftover in (staging, final):
        if leftover.exists():
            leftover.rmtree()
    writer = EmojiScenes(config=family, data_dir=staging, **how)
    # TFDS tells that it downloads, which it does not
    with contextlib.redirect_stdout(io.StringIO()):
        writer.download_and_prepare(download_dir=staging / "downloads")
    epath.Path(writer.data_dir).rename(final)
    staging.rmtree()


def _claim(data_dir: epath.Path, arguments: Build) -> None:
    """Write the arguments into an unclaimed `data_dir`, or compare them with those it was claimed
    by.
    """
    wanted = {**dataclasses.asdict(arguments), "version": VERSION}
    path = data_dir / "build.json"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        partial = data_dir / ".build.json"
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        partial.replace(path)
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); remove {data_dir} and build again"
        ) from None
    for field, value in wanted.items():
        if found.get(field) != value:
            raise ValueError(
                f"{data_dir} was built with {field}={found.get(field)}, not {value}: "
                "choose another directory, or remove it"
            )
