"""Retrieval: whether a picture finds its own caption among others."""

from collections.abc import Sequence

import numpy as np

from univg_jax.evaluation import metrics
from univg_jax.evaluation.benchmark import Case, Cases, ScoreFn
from univg_jax.evaluation.metrics import Image, Ratio, unit_vectors
from univg_jax.evaluation.scorers import Scorers

CANDIDATES = 16  # captions of the retrieval: the true one and 15 others


class Candidates:
    """The captions among which a picture must find its own: the true one, then up to 15 others.

    They are those of other cases, chosen by the case's index. For `retrieval_objects_r1` all have
    the true setting, so that only the objects tell them apart.
    """

    def __init__(self, texts: Sequence[str]):
        self._captions = sorted(set(texts))
        self._objects = sorted({split_caption(caption)[0] for caption in self._captions})

    def __call__(self, text: str, index: int) -> dict[str, list[str]]:
        """The candidates of each metric for the case with this caption and index."""
        objects, setting = split_caption(text)
        chosen = self._choose(objects, self._objects, index)
        return {
            "retrieval_r1": self._choose(text, self._captions, index),
            "retrieval_objects_r1": [other + setting for other in chosen],
        }

    def chance(self) -> dict[str, float]:
        """The expected values of a guess."""
        pools = {"retrieval_r1": self._captions, "retrieval_objects_r1": self._objects}
        return {name: 1 / min(CANDIDATES, len(pool)) for name, pool in pools.items()}

    def _choose(self, true: str, pool: list[str], index: int) -> list[str]:
        others = [text for text in pool if text != true]
        order = np.random.default_rng([CANDIDATES, index]).permutation(len(others))
        return [true, *(others[i] for i in order[: CANDIDATES - 1])]


def split_caption(caption: str) -> tuple[str, str]:
    """The objects and the setting of a caption: "a pig", " on grass under a blue sky"."""
    objects, on, setting = caption.rpartition(" on ")
    return (objects, on + setting) if on else (caption, "")


def score(scorers: Scorers, cases: Cases) -> ScoreFn:
    """Recall at 1 of each metric, by the scene scorer."""
    scene = scorers["scene"]
    candidates = Candidates(cases.texts)
    of_case = [candidates(text, index) for index, text in enumerate(cases.texts)]
    captions = sorted({text for lists in of_case for texts in lists.values() for text in texts})
    vectors = unit_vectors(scene.center(np.asarray(scorers["text_embed"](captions))))
    embedding = dict(zip(captions, vectors, strict=True))

    def score_one(case: Case, image: Image) -> dict[str, Ratio]:
        seen = scene.embed(image[None])[0]
        return {
            name: metrics.recall_at_1(np.stack([embedding[text] for text in texts]) @ seen)
            for name, texts in of_case[case.index].items()
        }

    return score_one
