"""A model and encoders small enough for tests: random weights, but every part of the real ones."""

import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import base
from experiments.base import task
from univg_jax import encoders, sharding
from univg_jax.batch import Batch, BatchShape
from univg_jax.conditioning import Conditioner
from univg_jax.encoders import Encoders
from univg_jax.models.codec import PatchCodec, fit_patch_codec
from univg_jax.models.minilm import MiniLM
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.text import SentenceText
from univg_jax.models.univg import UniVG
from univg_jax.settings import Conditioning, Config
from univg_jax.training.loop import train
from univg_jax.training.step import TrainState, TrainStep

SHAPE = BatchShape(height=16, width=16, num_tokens=6, face=16)
TASKS = ("t2i", "ie")


def tiny_config() -> ConfigDict:
    """A run of six steps; a test changes what it is about."""
    c = base.get_config()
    c.name = "tiny"
    c.tasks = dict(t2i=task(1.0, "scenes"), ie=task(1.0, "edits"))
    c.data.batch_size = 8
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.optim.update(dict(lr=3e-3, warmup=2, ema=0.9))
    c.train.update(dict(steps=6, log_every=1, save_every=2, eval_every=3, sample_every=100))
    return c


def tiny_conditioner() -> tuple[Conditioner, dict]:
    """Frozen encoders and their parameters."""
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
    """A model for the latents and embeddings of `tiny_conditioner`."""
    fields = dict(hidden_dim=32, depth=2, num_heads=2, in_channels=17, out_channels=8) | overrides
    backbone = make_mmdit(
        "tiny", text_dim=conditioner.text_dim, pooled_dim=conditioner.pooled_dim, **fields
    )
    return UniVG(backbone=backbone, face_dim=conditioner.face_dim)


def fake_batch(*, shape: BatchShape, batch_size: int, seed: int = 0) -> Batch:
    """Random but well-formed rows: every other one has a source, all text, none a face."""
    rng = np.random.default_rng(seed)
    spec, b, m = shape.spec(batch_size), batch_size, shape.num_tokens
    lengths = rng.integers(2, m + 1, size=b)
    has_source = np.arange(b) % 2 == 1
    shown = has_source[:, None, None, None].astype(np.uint8)
    return Batch(
        target=rng.integers(0, 256, spec.target.shape, dtype=np.uint8),
        source=rng.integers(0, 256, spec.source.shape, dtype=np.uint8) * shown,
        mask=np.ones(spec.mask.shape, np.uint8),
        loss_mask=np.ones(spec.loss_mask.shape, np.uint8),
        tokens=rng.integers(1000, 20000, (b, m)).astype(np.int32),
        text_mask=np.arange(m)[None] < lengths[:, None],
        identity_slot=np.zeros((b, m), bool),
        face=np.zeros(spec.face.shape, np.uint8),
        has_source=has_source,
        has_face=np.zeros(b, bool),
        task=np.zeros(b, np.int32),
        sample_id=np.arange(b, dtype=np.uint32),
        valid=np.ones(b, bool),
    )


def batch(seed: int = 0, size: int = 8) -> Batch:
    """Rows of both tasks; sample ids go on from seed to seed."""
    fake = fake_batch(seed=seed, batch_size=size, shape=SHAPE)
    fields = {name: getattr(fake, name) for name in fake.__dataclass_fields__}
    fields["task"] = np.arange(size, dtype=np.int32) % 2
    fields["sample_id"] = np.arange(seed * size, (seed + 1) * size, dtype=np.uint32)
    return Batch(**fields)


class CountingStream:
    """An endless stream of `batch(0), batch(1), ...` that remembers what it gave."""

    def __init__(self, size: int = 8) -> None:
        self.position, self.seen, self.size, self.after = 0, [], size, 0

    def __next__(self) -> Batch:
        made = batch(self.position, self.size)
        self.position += 1
        self.seen.extend(made.sample_id.tolist())
        return made

    def specs(self) -> list[Batch]:
        return [SHAPE.spec(self.size)]

    failure = None

    def counters(self) -> dict[str, int]:
        """As if every batch had met a damaged record."""
        return {"quarantined": len(self.seen) // self.size}

    def get_state(self) -> dict:
        return {"position": self.position}

    def set_state(self, state: dict) -> None:
        self.position = state["position"]

    def continue_from(self, state: dict) -> None:
        self.after = state["position"]


def tiny_step(config: ConfigDict, **model_overrides) -> tuple[TrainStep, dict]:
    """The functions of a tiny run, and its encoders' parameters."""
    conditioner, frozen = tiny_conditioner()
    step_fns = TrainStep(
        config=Config.of(config),
        model=tiny_model(conditioner, **model_overrides),
        conditioner=conditioner,
        task_names=TASKS,
    )
    return step_fns, frozen


def train_tiny(
    config: ConfigDict,
    workdir,
    *,
    stream=None,
    validation: Mapping[str, Iterable[Batch]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    model: Mapping = MappingProxyType({}),
    change_frozen: Callable[[dict], None] = lambda frozen: None,
    **options,
) -> TrainState:
    """`loop.train` of a tiny run; `model` are fields of its model that differ."""
    step_fns, frozen = tiny_step(config, **model)
    change_frozen(frozen)
    if mesh is None:
        width = step_fns.model.backbone.hidden_dim
        mesh = sharding.make_mesh(**config.mesh.to_dict(), width=width)
    with jax.set_mesh(mesh):
        return train(
            step_fns,
            workdir=workdir,
            stream=stream or CountingStream(),
            frozen=frozen,
            validation=validation or {"t2i": [batch(1000)], "ie": [batch(1001)]},
            **options,
        )


def record_parity(record_property, *, network: str, configuration: str, **errors: float) -> None:
    """What `tools/parity.py` makes a row of docs/parity.md.

    Errors are relative to the standard deviation of the reference's output.
    """
    errors = {name: float(error) for name, error in errors.items()}
    row = dict(network=network, configuration=configuration, errors=errors)
    record_property("parity", json.dumps(row))


ENCODERS = dict(
    text="minilm", codec=dict(kind="linear", patch=4, channels=8, whiten=0.5), identity=None
)
ENCODERS_WITH_FACES = {**ENCODERS, "identity": dict(kind="lda", dim=4)}


def images() -> np.ndarray:
    """What a codec is fitted on."""
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def portraits() -> list[tuple[np.ndarray, int]]:
    """What an identity encoder is fitted on: ten persons with four pictures each."""
    return [(image, i // 4) for i, image in enumerate(images())]


def unused():
    """For data of a fit that should not happen."""
    raise AssertionError("nothing should be fitted here")


def prepare_encoders(config: Mapping, workdir, **options) -> Encoders:
    """`encoders.prepare` on the data above."""
    options = dict(images=images, portraits=portraits) | options
    return encoders.prepare(Conditioning(**config), workdir=workdir, **options)
