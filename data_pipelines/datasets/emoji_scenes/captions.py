"""The language of a scene: its caption, the phrase of each box, referring expressions."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.datasets.emoji_scenes.scene import Scene, Thing
from data_pipelines.datasets.emoji_scenes.sprites import NOUNS

_COUNTS = {2: "two", 3: "three"}


def with_article(phrase: str) -> str:
    """`phrase` after "a" or "an", by its first letter, which suits every noun of the whitelist."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name(thing: Thing) -> str:
    """ "red apple", or "pig" for what cannot be painted."""
    return f"{thing.color} {thing.noun}" if thing.color else thing.noun


def phrases(scene: Scene) -> list[str]:
    """The noun phrase of each thing, as the caption has it: "a red apple".

    Things of one name share a phrase: of two pigs both have "two pigs".
    """
    result = []
    for thing in scene.things:
        count = sum(name(other) == name(thing) for other in scene.things)
        if count == 1:
            result.append(with_article(name(thing)))
        else:
            plural = NOUNS[thing.noun].plural
            result.append(" ".join(filter(None, [_COUNTS[count], thing.color, plural])))
    return result


def setting(ground: str, sky: str) -> str:
    return f"on {ground} under a {sky} sky"


def caption(scene: Scene) -> str:
    """ "a red apple and a pig on grass under a blue sky": from left to right, each phrase once."""
    left_to_right = np.argsort([thing.x for thing in scene.things], kind="stable")
    phrase_of = phrases(scene)
    unique = list(dict.fromkeys(phrase_of[k] for k in left_to_right))
    return f"{enumeration(unique)} {setting(scene.ground, scene.sky)}"


def enumeration(items: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def side(x: float) -> str:
    return "on the left" if x < 0.4 else "on the right" if x > 0.6 else "in the middle"


def expressions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """For each thing a random expression that is true of it alone; "" if there is none.

    It says the noun ("the pig"), the color ("the red apple") or the place among things of the same
    noun ("the pig on the left").
    """
    result = []
    for thing in scene.things:
        nouns = [other.noun for other in scene.things]
        names = [name(other) for other in scene.things]
        same_noun = [other for other in scene.things if other.noun == thing.noun]
        place = side(thing.x)
        options = []
        if nouns.count(thing.noun) == 1:
            options += [f"the {thing.noun}"] * 2  # the most natural one, so twice as often
        if thing.color and names.count(name(thing)) == 1:
            options.append(f"the {name(thing)}")
        if len(scene.things) > 1 and sum(side(other.x) == place for other in same_noun) == 1:
            options.append(f"the {thing.noun} {place}")
        result.append(str(rng.choice(options)) if options else "")
    return result
