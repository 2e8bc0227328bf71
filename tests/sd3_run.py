"""A run on Stable Diffusion 3's encoders whose weights are random, so that all of them matter."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import unused
from univg_jax import assembly, configs, encoders
from univg_jax.batch import BatchShape
from univg_jax.checkpoint import Checkpointer
from univg_jax.settings import Config
from univg_jax.trees import map_named
from univg_jax.workdir import claim_workdir

CONFIG = "experiments/stage3_identity.py:size=tiny,res=32,encoders=sd3"
MODEL = dict(hidden_dim=32, depth=3, num_heads=2, pos_embed_max_size=12, pos_embed_base_size=6)


def write_run(workdir: Path, *, folder: Path, config: str = CONFIG, **settings: object) -> Path:
    """A workdir of one step, with the encoders in `folder`; `settings` by their dotted names."""
    given = dict.fromkeys(()) | {"conditioning.folder": str(folder), "data.num_tokens": 77 + 40}
    given |= {"data.face_resolution": 24, "sampling.steps": 4, "sampling.shift": 2.0}
    given |= {f"model.overrides.{name}": value for name, value in MODEL.items()}
    given |= settings
    loaded = configs.load(config, [f"{name}={value}" for name, value in given.items()])
    config = loaded if isinstance(loaded, Config) else Config.of(loaded)
    found = encoders.prepare(config.conditioning, workdir=workdir, images=unused, portraits=unused)
    rng = np.random.default_rng(0)
    spec = found.conditioner.encoded_spec(found.frozen, BatchShape.of(config.data).spec(1))
    model, key = assembly.make_model(config, found.conditioner), jax.random.key(0)
    abstract = jax.eval_shape(lambda key: model.init_params(key, *spec), key)
    params = map_named(lambda name, x: noisy(name, x.shape, rng), abstract)
    raw = jax.tree.map(lambda x: x + 0.1, params)  # nobody should take these
    claim_workdir(workdir, config)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(1, {"params": raw, "ema": params}, {}, config.to_dict())
    return workdir


def noisy(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """A random parameter: of a norm near 1, else near 0."""
    return jnp.float32(name.endswith("scale") + 0.15 * rng.normal(size=shape))
