"""Random scenes, and which of them each split may show.

A tenth of the combinations (pairs of nouns, or a noun and a ground) is held out for validation, and
another tenth for test: training never shows them. Which they are depends on the names alone, not on
the seed. So of two datasets with the same nouns, neither trains on what the other validates on.
"""

import functools
import itertools
import zlib

import numpy as np

from data_pipelines.datasets.emoji_scenes.scene import GROUNDS, SKIES, Scene, Thing
from data_pipelines.datasets.emoji_scenes.sprites import COLORS, NOUNS

# How far below the horizon things stand, in image heights, by their number. Nearer things are
# larger (`scene`): one, two or three things are as large as fit side by side.
_DROPS = {1: (0.42, 0.50), 2: (0.34, 0.43), 3: (0.25, 0.29)}


def paint(rng: np.random.Generator, noun: str) -> str | None:
    """A color for the noun: its own more often than another; None if it cannot be painted."""
    native = NOUNS[noun].color
    if native is None or rng.random() < 0.6:
        return native
    return str(rng.choice(list(COLORS)))


def sample_scene(
    rng: np.random.Generator,
    nouns: list[str],
    *,
    count: int | None = None,
    including: str | None = None,
) -> Scene:
    """A scene of one to three large things side by side.

    `count` fixes their number, and then no noun comes twice. `including` is a noun that must be
    there.
    """
    may_repeat = count is None
    count = count or int(rng.choice([1, 2, 3], p=[0.38, 0.54, 0.08]))
    chosen = [str(noun) for noun in rng.choice(nouns, size=count, replace=False)]
    if including and including not in chosen:
        chosen[0] = including
    colors = [paint(rng, noun) for noun in chosen]
    if may_repeat and count > 1 and rng.random() < 0.15:
        chosen[1] = chosen[0]
        colors[1] = colors[0] if rng.random() < 0.7 else paint(rng, chosen[0])
    order = rng.permutation(count)
    horizon = float(rng.uniform(0.32, 0.45))
    things = []
    for slot, k in enumerate(order):
        drop = float(rng.uniform(*_DROPS[count]))
        thing = Thing(chosen[k], colors[k], 0.5, drop)
        free = max(0.0, 1 / count - thing.width)
        x = (slot + 0.5) / count + float(rng.uniform(-0.5, 0.5)) * min(free, 0.3)
        x = float(np.clip(x, thing.width / 2, 1 - thing.width / 2))
        things.append(Thing(chosen[k], colors[k], x, drop))
    ground, sky = str(rng.choice(list(GROUNDS))), str(rng.choice(list(SKIES)))
    return Scene(tuple(things), ground, sky, horizon)


def combinations(scene: Scene) -> set[tuple[str, str]]:
    """What may be held out of a scene: its pairs of different nouns.

    A scene with only one noun has the pair (noun, ground) instead.
    """
    nouns = sorted({thing.noun for thing in scene.things})
    if len(nouns) == 1:
        return {(nouns[0], scene.ground)}
    return set(itertools.combinations(nouns, 2))


@functools.cache
def held_out(nouns: tuple[str, ...]) -> dict[str, frozenset[tuple[str, str]]]:
    """The combinations that only validation, and only test, may show.

    For each it is a tenth of the noun pairs and a tenth of the (noun, ground) pairs, at least one.
    """
    noun_pairs = list(itertools.combinations(sorted(nouns), 2))
    ground_pairs = list(itertools.product(sorted(nouns), GROUNDS))
    result: dict[str, set] = {"validation": set(), "test": set()}
    for pairs in (noun_pairs, ground_pairs):
        # An order that looks random and depends on the names alone.
        ranked = sorted(pairs, key=lambda combination: zlib.crc32("/".join(combination).encode()))
        tenth = max(1, len(ranked) // 10)
        result["validation"].update(ranked[:tenth])
        result["test"].update(ranked[tenth : 2 * tenth])
    return {split: frozenset(pairs) for split, pairs in result.items()}


def belongs(scene: Scene, split: str, nouns: tuple[str, ...]) -> bool:
    """Whether the split may show the scene.

    Training shows nothing that is held out. Validation and test show something that is held out for
    them, and nothing that is held out for the other.
    """
    shown = combinations(scene)
    touched = {name for name, pairs in held_out(nouns).items() if shown & pairs}
    return touched == (set() if split == "train" else {split})
