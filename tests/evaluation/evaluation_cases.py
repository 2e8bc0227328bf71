"""Small scenes of colored squares, as records, and batches and systems without a model."""

import numpy as np

from data_pipelines.collate import Collator
from data_pipelines.tokenizer import TokenizedText
from univg_jax.batch import BatchShape
from univg_jax.evaluation.benchmark import Cases
from univg_jax.evaluation.benchmarks.emoji_scenes import BENCHMARK

COLORS = {"apple": (220, 40, 40), "frog": (40, 180, 60), "car": (40, 80, 220)}
SKIES = {"blue": (150, 200, 250), "pink": (250, 200, 210)}


def scene(seed: int, size: int = 48) -> dict:
    """One colored square on a plain ground, with all labels that the tasks on scenes and edits
    need.
    """
    rng = np.random.default_rng(seed)
    noun, sky = str(rng.choice(list(COLORS))), str(rng.choice(list(SKIES)))
    side = size // 3
    x, y = (int(v) for v in rng.integers(0, size - side, 2))
    before = np.full((size, size, 3), SKIES[sky], np.uint8)
    image, mask = before.copy(), np.zeros((size, size), np.uint8)
    image[y : y + side, x : x + side] = COLORS[noun]
    mask[y : y + side, x : x + side] = 1
    depth = np.repeat(np.linspace(8, 1, size, dtype=np.float32)[:, None], size, axis=1)
    depth[mask > 0] = 2 + seed % 3
    return {
        "image": image,
        "source": before,
        "edit_mask": mask,
        "instruction": f"add a {noun}",
        "caption": f"a {noun} on grass under a {sky} sky",
        "boxes": np.array([[x, y, x + side, y + side]], np.float32) / size,
        "phrases": [f"a {noun}"],
        "masks": mask[None],
        "expressions": [f"the {noun}"],
        "depth": depth,
    }


def make_cases(task: str, records, **options) -> Cases:
    """Cases of the size of the scenes."""
    fields = BENCHMARK.tasks[task].needs_fields
    return Cases(task, records, resolution=48, fields=fields, **options)


def tokenize(text: str, num_tokens: int) -> TokenizedText:
    """Lengths of words as tokens."""
    tokens = np.array([*map(len, text.split()), *[0] * num_tokens], np.int32)[:num_tokens]
    blank = np.zeros(num_tokens, bool)
    return TokenizedText(tokens=tokens, text_mask=tokens > 0, identity_slot=blank, num_truncated=0)


COLLATOR = Collator(tokenizer=tokenize, shape=BatchShape(height=48, width=48, num_tokens=4, face=8))


def noise(batch) -> np.ndarray:
    """Images that depend on nothing but the sample id."""
    shape = batch.target.shape[1:]
    return np.stack(
        [
            np.random.default_rng(int(i)).integers(0, 256, shape, dtype=np.uint8)
            for i in batch.sample_id
        ]
    )


def blurred(batch) -> np.ndarray:
    """The target, a quarter of it noise."""
    return np.rint(0.75 * batch.target + 0.25 * noise(batch)).astype(np.uint8)
