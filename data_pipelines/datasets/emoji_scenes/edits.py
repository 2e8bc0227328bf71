"""Random edits: two scenes that differ by one change, and the instruction for it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines.datasets.emoji_scenes import captions
from data_pipelines.datasets.emoji_scenes.scene import GROUNDS, SKIES, Scene
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


def _with_things(scene: Scene, *things) -> Scene:
    return dataclasses.replace(scene, things=things)


def _remove(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=2, distinct=True)
    gone, kept = rng.permutation(2)
    return Edit(
        scene, _with_things(scene, scene.things[kept]), f"remove the {scene.things[gone].noun}"
    )


def _add(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=2, distinct=True)
    new, kept = rng.permutation(2)
    thing = scene.things[new]
    phrase = captions.with_article(captions.name(thing))
    return Edit(
        _with_things(scene, scene.things[kept]), scene, f"add {phrase} {captions.side(thing.x)}"
    )


def _replace(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=int(rng.integers(1, 3)), distinct=True)
    k = int(rng.integers(len(scene.things)))
    old = scene.things[k]
    noun = _choose(rng, nouns, excluded={thing.noun for thing in scene.things})
    new = dataclasses.replace(old, noun=noun, color=paint(rng, noun))
    things = (*scene.things[:k], new, *scene.things[k + 1 :])
    instruction = f"replace the {old.noun} with {captions.with_article(captions.name(new))}"
    return Edit(scene, _with_things(scene, *things), instruction)


def _swap(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=2, distinct=True)
    a, b = scene.things
    swapped = (
        dataclasses.replace(a, noun=b.noun, color=b.color),
        dataclasses.replace(b, noun=a.noun, color=a.color),
    )
    return Edit(scene, _with_things(scene, *swapped), f"swap the {a.noun} and the {b.noun}")


def _background(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=int(rng.integers(1, 3)), distinct=True)
    if rng.random() < 0.5:
        ground = _choose(rng, list(GROUNDS), excluded={scene.ground})
        return Edit(
            scene, dataclasses.replace(scene, ground=ground), f"change the background to {ground}"
        )
    sky = _choose(rng, list(SKIES), excluded={scene.sky})
    return Edit(scene, dataclasses.replace(scene, sky=sky), f"change the background to a {sky} sky")


def _recolor(rng: np.random.Generator, nouns: list[str]) -> Edit:
    paintable = [noun for noun in nouns if NOUNS[noun].color]
    scene = sample_scene(
        rng, nouns, count=int(rng.integers(1, 3)), distinct=True, including=_choose(rng, paintable)
    )
    k = int(rng.choice([k for k, thing in enumerate(scene.things) if thing.color]))
    old = scene.things[k]
    color = _choose(rng, list(COLORS), excluded={old.color})
    things = (*scene.things[:k], dataclasses.replace(old, color=color), *scene.things[k + 1 :])
    return Edit(scene, _with_things(scene, *things), f"make the {old.noun} {color}")


def _move(rng: np.random.Generator, nouns: list[str]) -> Edit:
    scene = sample_scene(rng, nouns, count=1, distinct=True)
    thing = dataclasses.replace(scene.things[0], drop=float(rng.uniform(0.36, 0.44)))
    reach = 0.5 - thing.width / 2
    left, right = (
        dataclasses.replace(thing, x=0.5 + sign * reach * float(rng.uniform(0.8, 1)))
        for sign in (-1, 1)
    )
    start, end, place = (right, left, "left") if rng.random() < 0.5 else (left, right, "right")
    if rng.random() < 0.3:
        start = dataclasses.replace(thing, x=0.5)
    return Edit(
        _with_things(scene, start),
        _with_things(scene, end),
        f"move the {thing.noun} to the {place}",
    )


KINDS: dict[str, Callable[[np.random.Generator, list[str]], Edit]] = {
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "swap": _swap,
    "background": _background,
    "recolor": _recolor,
    "move": _move,
}
