"""Random edits: two scenes that differ by one change, and the instruction for it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines.datasets.emoji_scenes import captions
from data_pipelines.datasets.emoji_scenes.scene import GROUNDS, SKIES, Scene, Thing
from data_pipelines.datasets.emoji_scenes.splits import paint, sample_scene
from data_pipelines.datasets.emoji_scenes.sprites import COLORS, NOUNS


@dataclasses.dataclass(frozen=True)
class Edit:
    """A scene before and after an edit, and the instruction for it."""

    before: Scene
    after: Scene
    instruction: str


def _choose(
    rng: np.random.Generator, items: list[str], *, excluded: set[str | None] = frozenset()
) -> str:
    return str(rng.choice([item for item in items if item not in excluded]))


def _with_things(scene: Scene, *things: Thing) -> Scene:
    return dataclasses.replace(scene, things=things)


def _with_changed(scene: Scene, k: int, **changes: str | None) -> Scene:
    """The scene with another noun or color of thing k."""
    changed = dataclasses.replace(scene.things[k], **changes)
    return _with_things(scene, *scene.things[:k], changed, *scene.things[k + 1 :])


def _remove(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=2)
    gone, kept = (scene.things[k] for k in rng.permutation(2))
    return Edit(scene, _with_things(scene, kept), f"remove the {gone.noun}")


def _add(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=2)
    new, kept = (scene.things[k] for k in rng.permutation(2))
    phrase = captions.with_article(captions.name(new))
    return Edit(_with_things(scene, kept), scene, f"add {phrase} {captions.side(new.x)}")


def _replace(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=int(rng.integers(1, 3)))
    k = int(rng.integers(len(scene.things)))
    noun = _choose(rng, nouns, excluded={thing.noun for thing in scene.things})
    after = _with_changed(scene, k, noun=noun, color=paint(rng, noun))
    phrase = captions.with_article(captions.name(after.things[k]))
    return Edit(scene, after, f"replace the {scene.things[k].noun} with {phrase}")


def _swap(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=2)
    a, b = scene.things
    after = _with_changed(scene, 0, noun=b.noun, color=b.color)
    after = _with_changed(after, 1, noun=a.noun, color=a.color)
    return Edit(scene, after, f"swap the {a.noun} and the {b.noun}")


def _background(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=int(rng.integers(1, 3)))
    if rng.random() < 0.5:
        name = ground = _choose(rng, list(GROUNDS), excluded={scene.ground})
        after = dataclasses.replace(scene, ground=ground)
    else:
        sky = _choose(rng, list(SKIES), excluded={scene.sky})
        name, after = f"a {sky} sky", dataclasses.replace(scene, sky=sky)
    return Edit(scene, after, f"change the background to {name}")


def _recolor(rng: np.random.Generator, nouns: list[str]) -> Edit:
    count, including = int(rng.integers(1, 3)), _choose(rng, [n for n in nouns if NOUNS[n].color])
    scene = sample_scene(rng, nouns, count=count, including=including)
    k = int(rng.choice([k for k, thing in enumerate(scene.things) if thing.color]))
    color = _choose(rng, list(COLORS), excluded={scene.things[k].color})
    after = _with_changed(scene, k, color=color)
    return Edit(scene, after, f"make the {scene.things[k].noun} {color}")


def _move(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=1)
    thing = dataclasses.replace(scene.things[0], drop=float(rng.uniform(0.36, 0.44)))
    reach = 0.5 - thing.width / 2
    left, right = (
        dataclasses.replace(thing, x=0.5 + sign * reach * float(rng.uniform(0.8, 1)))
        for sign in (-1, 1)
    )
    start, end, place = (right, left, "left") if rng.random() < 0.5 else (left, right, "right")
    if rng.random() < 0.3:
        start = dataclasses.replace(thing, x=0.5)
    before, after = _with_things(scene, start), _with_things(scene, end)
    return Edit(before, after, f"move the {thing.noun} to the {place}")


KINDS: dict[str, Callable[[np.random.Generator, list[str]], Edit]] = {
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "swap": _swap,
    "background": _background,
    "recolor": _recolor,
    "move": _move,
}
