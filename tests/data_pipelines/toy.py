"""Records of a few pixels that say which they are, their sources, a config and a tokenizer."""

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.collate import Collator
from data_pipelines.mixture import Stream
from data_pipelines.sources import MemorySource
from data_pipelines.tokenizer import TokenizedText
from univg_jax.batch import BatchShape
from univg_jax.settings import Config

SIZE, NUM_TOKENS, NUM_RECORDS = 8, 40, 23


def tokenize(text: str, num_tokens: int) -> TokenizedText:
    """Characters as tokens; a slot where `<p>` begins."""
    tokens = np.zeros(num_tokens, np.int32)
    codes = [ord(c) for c in text[:num_tokens]]
    tokens[: len(codes)] = codes
    slot = np.zeros(num_tokens, bool)
    if 0 <= text.find("<p>") < num_tokens:
        slot[text.find("<p>")] = True
    text_mask = np.arange(num_tokens) < len(codes)
    return TokenizedText(tokens=tokens, text_mask=text_mask, identity_slot=slot, num_truncated=0)


def text_of(tokens: np.ndarray) -> str:
    return "".join(chr(t) for t in tokens if t)


def make_scene(k: int) -> dict:
    """A record whose image tells its number. Every second one has an expression."""
    image = np.full((SIZE, SIZE, 3), k, np.uint8)
    return dict(
        image=image,
        source=255 - image,
        caption=f"pig {k}",
        instruction=f"do {k}",
        masks=np.ones((1, SIZE, SIZE), np.uint8),
        expressions=[f"the pig {k}" if k % 2 else ""],
    )


SCENES = [make_scene(k) for k in range(NUM_RECORDS)]
PERSONS = [
    dict(
        image=np.full((SIZE, SIZE, 3), 100 + k, np.uint8),
        caption="<p> smiles",
        face=np.full((4, 4, 3), k, np.uint8),
    )
    for k in range(7)
]


class CountingSource(MemorySource):
    """Remembers what was read: (index, fields)."""

    def __init__(self, name, items):
        super().__init__(name, items)
        self.reads = []

    def read(self, index, fields=None):
        self.reads.append((index, fields))
        return super().read(index, fields)


class BrokenSource(MemorySource):
    """Cannot read some of its records."""

    def __init__(self, name, items, broken):
        super().__init__(name, items)
        self.broken = broken

    def read(self, index, fields=None):
        if index in self.broken:
            raise ValueError("truncated image")
        return super().read(index, fields)


def sources(**changes) -> dict:
    scenes, persons = MemorySource("scenes", SCENES), MemorySource("persons", PERSONS)
    return dict(scenes=scenes, persons=persons) | changes


def make_config(batch_size: int = 8, seed: int = 0, **weights: float) -> ConfigDict:
    """Tasks of these weights, without dropout."""
    weights = weights or dict(t2i=0.28, ie=0.47, ip=0.2, seg=0.05)
    c = ConfigDict(dict(seed=seed))
    c.tasks = {
        name: dict(
            weight=weight,
            sources=("persons" if name == "id" else "scenes",),
            drop_text=0.0,
            drop_image=0.0,
            drop_both=0.0,
        )
        for name, weight in weights.items()
    }
    c.data = dict(
        dir="memory",
        resolution=SIZE,
        num_tokens=NUM_TOKENS,
        face_resolution=4,
        batch_size=batch_size,
        read_threads=1,
        prefetch=1,
    )
    return c


def make_collator(config: ConfigDict | None = None) -> Collator:
    data = Config.of(config or make_config()).data
    shape, weights = BatchShape.of(data), data.caption_weights
    return Collator(tokenizer=tokenize, shape=shape, caption_weights=weights)


OPEN: list[Stream] = []  # conftest.py closes them after each test


def stream(config: ConfigDict | None = None, **changes) -> Stream:
    config = Config.of(config or make_config())
    options = dict(collator=make_collator(config), sources=sources()) | changes
    OPEN.append(Stream(config, **options))
    return OPEN[-1]


def join(parts) -> object:
    """The global batch of all hosts' parts."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
