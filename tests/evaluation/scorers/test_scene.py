"""The scene scorer recognizes unseen pictures of what it was fitted on, and fits the same again."""

import numpy as np
import pytest

from data_pipelines.reader import Reader
from data_pipelines.sources import MemorySource
from tests.evaluation import evaluation_cases as data
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks.emoji_scenes import SCENE_FIELDS
from univg_jax.evaluation.metrics import box_iou, unit_vectors
from univg_jax.evaluation.scorers import segmenter
from univg_jax.evaluation.scorers.scene import (
    FittedSceneScorer,
    fit_scene_scorer,
    open_scene_scorer,
)


def scenes(*others: dict) -> Reader:
    """96 squares, and others."""
    source = MemorySource("squares", [*(data.scene(i) for i in range(96)), *others])
    return Reader("t2i", source, collator=data.COLLATOR, fields=SCENE_FIELDS)


WORDS = [*data.COLORS, *data.SKIES]


def embed_text(texts: list[str]) -> np.ndarray:
    """Bags of words: an embedding whose neighbors are known."""
    return np.array([[float(word in text.split()) for word in WORDS] for text in texts])


def noun_of(phrase: str) -> str:
    return phrase.split()[-1]


OPTIONS = dict(noun_of=noun_of, embed_text=embed_text, steps=60)


@pytest.fixture(scope="module")
def scorer() -> FittedSceneScorer:
    return fit_scene_scorer(scenes(), **OPTIONS)


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


@pytest.fixture
def quick(scorer, monkeypatch):
    """The part of a fit that does not depend on the text is not done again."""
    monkeypatch.setattr(segmenter, "fit", lambda *args, **options: scorer.segmenter)


def opened(folder, *, data="a", text_encoder="bag of words", **options) -> FittedSceneScorer:
    return open_scene_scorer(
        scenes(), cache_dir=folder, data=data, text_encoder=text_encoder, **{**OPTIONS, **options}
    )


def test_a_fit_is_deterministic(scorer):
    assert fit_scene_scorer(scenes(), **OPTIONS).digest == scorer.digest


@pytest.mark.usefixtures("quick")
def test_a_damaged_scene_is_left_out_by_name(scorer, caplog):
    with_damaged = scenes(data.scene(1) | dict(caption=""))
    assert fit_scene_scorer(with_damaged, **OPTIONS).nouns == scorer.nouns
    assert "quarantined squares[96] for task 't2i': field 'caption' is empty" in caplog.text


@pytest.mark.usefixtures("quick")
def test_cache_is_the_same_scorer_and_keyed_by_the_data(tmp_path, scorer):
    assert opened(tmp_path).digest == scorer.digest
    (file,) = tmp_path.iterdir()
    loaded = opened(tmp_path)
    assert loaded.digest == scorer.digest
    assert loaded.nouns == tuple(sorted(data.COLORS))
    loaded.save(file)
    assert FittedSceneScorer.load(file).digest == scorer.digest
    opened(tmp_path, data="b")
    assert len(list(tmp_path.iterdir())) == 2


def recall(scorer, embed) -> float:
    records = [data.scene(seed) for seed in range(1000, 1016)]
    captions = sorted({r["caption"] for r in records})
    texts = unit_vectors(scorer.center(embed(captions)))
    seen = scorer.embed(np.stack([r["image"] for r in records]))
    return float(
        np.mean([captions[i] == r["caption"] for i, r in zip((seen @ texts.T).argmax(-1), records)])
    )


@pytest.mark.usefixtures("quick")
def test_another_text_encoder_of_the_same_width_never_meets_the_scorer_of_this_one(tmp_path):
    def other(texts):
        return embed_text(texts)[:, ::-1]

    assert recall(opened(tmp_path), embed_text) > 0.9
    assert recall(opened(tmp_path, embed_text=other, text_encoder="other"), other) > 0.9
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", ["torn", "empty", "flipped", "foreign"])
def test_a_damaged_cache_is_found_and_made_anew(tmp_path, scorer, fault, caplog):
    opened(tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-1000] ^= 1
    faults = {"torn": content[:-50], "empty": b"", "flipped": bytes(flipped), "foreign": b"x" * 99}
    file.write_bytes(faults[fault])
    with pytest.raises(UserError, match=file.name):
        FittedSceneScorer.load(file)
    assert opened(tmp_path).digest == scorer.digest
    assert f"{file}" in caplog.text
    assert FittedSceneScorer.load(file).digest == scorer.digest
