"""A model and encoders small enough for tests, with random weights but every part of the real ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import base
from experiments.base import task
from univg_jax import encoders
from univg_jax.batch import Batch, fake_batch
from univg_jax.conditioning import Conditioner
from univg_jax.models.codec import PatchCodec, fit_patch_codec
from univg_jax.models.minilm import MiniLM
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.text import SentenceText
from univg_jax.models.univg import UniVG

SPEC = dict(resolution=16, num_tokens=6, face_resolution=16)
TASKS = ("t2i", "ie")


def tiny_config() -> ConfigDict:
    c = base.get_config()
    c.name = "tiny"
    c.tasks = dict(t2i=task(1.0, "scenes"), ie=task(1.0, "edits"))
    c.data.batch_size = 8
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.optim.update(dict(lr=3e-3, warmup=2, ema=0.9))
    c.train.update(dict(steps=6, log_every=1, save_every=2, eval_every=3, sample_every=100))
    return c


def tiny_conditioner() -> tuple[Conditioner, dict]:
    text = MiniLM(vocab_size=20000, hidden_dim=16, depth=1, num_heads=2, mlp_dim=32, max_tokens=32)
    tokens = jnp.zeros((1, 4), jnp.int32)
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    codec = fit_patch_codec(images, patch=4, channels=8, whiten=0.5)
    frozen = {
        "text": {"encoder": text.init(jax.random.key(0), tokens, tokens == 0)["params"]},
        "codec": jax.tree.map(jnp.asarray, codec),
    }
    return Conditioner(
        text=SentenceText(encoder=text), codec=PatchCodec(patch=4, channels=8)
    ), frozen


def tiny_model(conditioner: Conditioner, **overrides) -> UniVG:
    fields = dict(hidden_dim=32, depth=2, num_heads=2, in_channels=17, out_channels=8) | overrides
    backbone = make_mmdit(
        "tiny", text_dim=conditioner.text_dim, pooled_dim=conditioner.pooled_dim, **fields
    )
    return UniVG(backbone=backbone, face_dim=conditioner.face_dim)


def batch(seed: int = 0, size: int = 8) -> Batch:
    """Rows of both tasks; sample ids go on from seed to seed."""
    fake = fake_batch(seed=seed, batch_size=size, **SPEC)
    fields = {name: getattr(fake, name) for name in fake.__dataclass_fields__}
    fields["task"] = np.arange(size, dtype=np.int32) % 2
    fields["sample_id"] = np.arange(seed * size, (seed + 1) * size, dtype=np.uint32)
    return Batch(**fields)


class CountingStream:
    """An endless stream of `batch(0), batch(1), ...` that remembers what it gave."""

    def __init__(self) -> None:
        self.position, self.seen = 0, []

    def __next__(self) -> Batch:
        made = batch(self.position)
        self.position += 1
        self.seen.extend(made.sample_id.tolist())
        return made

    def get_state(self) -> dict:
        return {"position": self.position}

    def set_state(self, state: dict) -> None:
        self.position = state["position"]


def record_parity(record_property, *, network: str, configuration: str, **errors: float) -> None:
    """What `tools/parity.py` makes a row of docs/parity.md: errors relative to the std of the
    reference's output.
    """
    row = dict(
        network=network,
        configuration=configuration,
        errors={k: float(v) for k, v in errors.items()},
    )
    record_property("parity", json.dumps(row))


ENCODERS = dict(
    text="minilm", codec=dict(kind="linear", patch=4, channels=8, whiten=0.5), identity=None
)
ENCODERS_WITH_FACES = {**ENCODERS, "identity": dict(kind="lda", dim=4)}


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def portraits() -> tuple[np.ndarray, np.ndarray]:
    return images(), np.arange(40) // 4


def unused():
    """For data of a fit that should not happen."""
    raise AssertionError("nothing should be fitted here")


def prepare_encoders(config, workdir, **options):
    options = dict(images=images, portraits=portraits) | options
    return encoders.prepare(config, workdir=workdir, **options)
