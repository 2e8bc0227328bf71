"""The scene scorer recognizes unseen pictures of what it was fitted on, and fits the same again."""

import numpy as np
import pytest

from data_pipelines.sources import MemorySource
from tests.evaluation import evaluation_cases as data
from univg_jax.evaluation.metrics import box_iou
from univg_jax.evaluation.scorers.scene import (
    FittedSceneScorer,
    fit_scene_scorer,
    open_scene_scorer,
)

SOURCE = MemorySource("squares", [data.scene(i) for i in range(96)])
WORDS = [*data.COLORS, *data.SKIES]


def embed_text(texts: list[str]) -> np.ndarray:
    """Bags of words: an embedding whose neighbors are known."""
    return np.array([[float(word in text.split()) for word in WORDS] for text in texts])


def noun_of(phrase: str) -> str:
    return phrase.split()[-1]


OPTIONS = dict(noun_of=noun_of, embed_text=embed_text, steps=60)


@pytest.fixture(scope="module")
def scorer() -> FittedSceneScorer:
    return fit_scene_scorer(SOURCE, **OPTIONS)


def test_detects_unseen_scenes(scorer):
    for seed in range(1000, 1008):
        record = data.scene(seed)
        boxes = scorer.detect(record["image"])[noun_of(record["phrases"][0])]
        # A boundary one pixel off on each side of a 16-pixel square leaves 0.62.
        assert max(box_iou(b, record["boxes"][0].astype(float)) for b in boxes) > 0.6


def test_embedding_is_nearest_to_its_own_caption(scorer):
    records = [data.scene(seed) for seed in range(1000, 1016)]
    captions = sorted({r["caption"] for r in records})
    seen = scorer.embed(np.stack([r["image"] for r in records]))
    texts = scorer.center(embed_text(captions))
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    hits = [captions[int(i)] == r["caption"] for i, r in zip((seen @ texts.T).argmax(-1), records)]
    assert np.mean(hits) > 0.9  # plain colors: an occasional miss would still be a fit gone wrong


def test_other_sizes_are_scored_the_same(scorer):
    record = data.scene(1000)
    large = np.kron(record["image"], np.ones((2, 2, 1), np.uint8))  # exact under area averaging
    np.testing.assert_array_equal(
        scorer.segment(large[None]), scorer.segment(record["image"][None])
    )


def test_cache_is_the_same_scorer_and_keyed_by_the_data(tmp_path, scorer):
    def opened(key: str) -> FittedSceneScorer:
        return open_scene_scorer(SOURCE, cache_dir=tmp_path, key=key, **OPTIONS)

    assert opened("a").digest == scorer.digest  # deterministic
    (file,) = tmp_path.iterdir()
    loaded = opened("a")
    assert loaded.digest == scorer.digest
    assert loaded.nouns == tuple(sorted(data.COLORS))
    loaded.save(file)
    assert FittedSceneScorer.load(file).digest == scorer.digest
    opened("b")
    assert len(list(tmp_path.iterdir())) == 2
