"""What frozen encoders make of a run's inputs, computed once and kept on disk."""

import jax
import jax.numpy as jnp
from etils import epath

from data_pipelines import cache
from univg_jax import assembly, encoders
from univg_jax.errors import AlreadyExistsError
from univg_jax.settings import Config
from univg_jax.training.initialize import begin_stream


def cache_prompts(config: Config, out: epath.PathLike, *, steps: int) -> int:
    """Embeds every prompt of the first `steps` steps, of validation and of previews, into `out`.

    With `data.text_cache=out` the run then needs no text encoder. Returns the number of prompts.
    Raises UserError if there is a cache already.
    """
    assembly.check_config(config)
    if (epath.Path(out) / cache.RECORD).exists():
        raise AlreadyExistsError(f"{out} has a cache; choose another folder or delete it")
    assembly.prepare_data(config)
    mesh = assembly.make_mesh(config)
    prompts = cache.prompts(
        config,
        assembly.make_collator(config),
        steps=steps,
        begin=lambda stream: begin_stream(config.init_from, stream),
    )
    module, params = encoders.load_text(config.conditioning, mesh=mesh)
    embed = jax.jit(lambda params, tokens, mask: module.apply({"params": params}, tokens, mask))
    with jax.set_mesh(mesh):
        return cache.write_cache(
            out,
            prompts,
            embed=lambda tokens, mask: jax.device_get(
                embed(params, jnp.asarray(tokens), jnp.asarray(mask))
            ),
            identity=encoders.text_identity(config.conditioning, num_tokens=config.data.num_tokens),
        )
