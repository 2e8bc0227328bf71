"""The dataset as a pure function: (options, family, split, index) -> record, in any process."""

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from data_pipelines.datasets.emoji_scenes import (
    PICTURES,
    SPLITS,
    Options,
    captions,
    portraits,
    puppet,
    splits,
)
from data_pipelines.datasets.emoji_scenes.edits import KINDS, Edit
from data_pipelines.datasets.emoji_scenes.scene import Scene, render
from data_pipelines.datasets.emoji_scenes.sprites import WHITELIST
from univg_jax.errors import UserError
from univg_jax.images import png_bytes

MIN_NOUNS = 4  # fewer leave no pair for each split
MAX_ATTEMPTS = 300  # for an edit of its turn's kind, before any kind is taken


def check(options: Options) -> Options:
    """The options, with the number of nouns where they say 0: all.

    Raises UserError for a value out of range.
    """
    options = dataclasses.replace(options, nouns=options.nouns or len(WHITELIST))
    if not MIN_NOUNS <= options.nouns <= len(WHITELIST):
        raise UserError(
            f"nouns is {options.nouns}; expected 0 (all), or {MIN_NOUNS} to {len(WHITELIST)}"
        )
    persons = sum(options.count("persons", split) for split in SPLITS) // PICTURES
    if persons > (available := len(portraits.identities(options.seed))):
        raise UserError(
            f"num_scenes is {options.num_scenes}, which needs {persons} persons; "
            f"there are {available} distinct ones"
        )
    return options


def example(options: Options, family: str, split: str, index: int) -> dict[str, Any]:
    """The record, in stored form (`data_pipelines.records`)."""
    return {"scenes": _scene, "edits": _edit, "puppets": _puppet, "persons": _person}[family](
        options, split, index
    )


def noun_names(options: Options) -> tuple[str, ...]:
    """The nouns that scenes are made of."""
    return tuple(noun.name for noun in WHITELIST[: options.nouns])


def _rng(options: Options, family: str, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([options.seed, zlib.crc32(f"{family}/{split}".encode()), index])


def sample_scene(options: Options, split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """The scene of record `index`, and the random generator for whatever else the record has."""
    rng = _rng(options, "scenes", split, index)
    nouns = noun_names(options)
    while not splits.belongs(scene := splits.sample_scene(rng, list(nouns)), split, nouns):
        pass
    return scene, rng


def sample_edit(options: Options, split: str, index: int) -> Edit:
    """The edit of record `index`.

    The kinds take turns. If the combinations that the split may show seem to allow no edit of the
    kind, any kind will do.
    """
    rng = _rng(options, "edits", split, index)
    nouns, kinds = noun_names(options), list(KINDS)
    attempt = 0
    while True:
        kind = kinds[index % len(kinds)] if attempt < MAX_ATTEMPTS else str(rng.choice(kinds))
        edit = KINDS[kind](rng, list(nouns))
        # What a model is tested on is the result. In training it sees both scenes.
        seen = [edit.after] if split != "train" else [edit.before, edit.after]
        if all(splits.belongs(scene, split, nouns) for scene in seen):
            return edit
        attempt += 1


def _scene(options: Options, split: str, index: int) -> dict[str, Any]:
    scene, rng = sample_scene(options, split, index)
    rendered = render(scene, options.resolution)
    return {
        "image": png_bytes(rendered.image),
        "caption": captions.caption(scene),
        "boxes": np.stack([extent(mask) for mask in rendered.masks]),
        "phrases": captions.phrases(scene),
        "masks": [png_bytes(mask * np.uint8(255)) for mask in rendered.masks],
        "expressions": captions.expressions(scene, rng),
        "depth": png_bytes(np.rint(rendered.depth * 1000).astype(np.uint16)),
    }


def _edit(options: Options, split: str, index: int) -> dict[str, Any]:
    edit = sample_edit(options, split, index)
    before, after = (render(scene, options.resolution).image for scene in (edit.before, edit.after))
    return {
        "source": png_bytes(before),
        "image": png_bytes(after),
        "instruction": edit.instruction,
        "caption": captions.caption(edit.after),
        "edit_mask": png_bytes((before != after).any(-1).astype(np.uint8) * np.uint8(255)),
    }


def _puppet(options: Options, split: str, index: int) -> dict[str, Any]:
    figure = puppet.sample_puppet(_rng(options, "puppets", split, index))
    rendered = puppet.render_puppet(figure, options.resolution)
    return {
        "image": png_bytes(rendered.image),
        "caption": figure.caption,
        "joints": np.concatenate([figure.joints, np.ones((17, 1))], 1)[None].astype(np.float32),
        "boxes": extent(rendered.mask)[None],
    }


def _person(options: Options, split: str, index: int) -> dict[str, Any]:
    person, picture = divmod(index, PICTURES)
    rng = _rng(options, "persons", split, person)
    before = (
        sum(options.count("persons", earlier) for earlier in SPLITS[: SPLITS.index(split)])
        // PICTURES
    )
    pictures = portraits.sample_portraits(rng, before + person)
    # Each picture is the face of one other: the persons' faces are seen equally often.
    other = (picture + 1 + person % (PICTURES - 1)) % PICTURES
    return {
        "image": _portrait_png(pictures[picture], options.seed, options.resolution),
        "caption": pictures[picture].caption,
        "face": _portrait_png(pictures[other], options.seed, options.resolution),
        "person": before + person,
    }


# Each picture is the image of one record and the face of another, and is rendered once for both.
@functools.lru_cache(maxsize=2 * PICTURES)
def _portrait_png(portrait: portraits.Portrait, seed: int, resolution: int) -> bytes:
    return png_bytes(portraits.render_portrait(portrait, seed=seed, resolution=resolution))


def extent(mask: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, " 4"]:
    """The box x0 y0 x1 y1, in [0, 1], of a mask's pixels."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array(
        [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height],
        np.float32,
    )
