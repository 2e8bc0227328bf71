"""JAX as a command wants it: quiet where there is no TPU, with a cache of compiled programs.

The cache is XLA's own, on disk, so that compiled programs outlive their process.
"""

import atexit
import dataclasses
import os

import jax
from absl import logging
from etils import epath
from jax import monitoring

from univg_jax import tpu

FOLDER = "~/.cache/univg_jax/xla"

# Programs that compile faster are not kept. Reading one back takes time too, above all from a
# bucket, and a run has hundreds of tiny ones.
MIN_SECONDS = 0.3

_EVENTS = {
    "/jax/compilation_cache/cache_hits": "hits",
    "/jax/compilation_cache/cache_misses": "misses",
}


def configure_jax() -> "CacheUse":
    """What every command that computes wants of JAX; call it before JAX is first used."""
    tpu.silence_if_absent()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Random numbers must not depend on how arrays are split over devices.
    jax.config.update("jax_threefry_partitionable", True)
    return enable_cache()


@dataclasses.dataclass(kw_only=True)
class CacheUse:
    """How many programs this process read from the cache, and how many it compiled and wrote there.

    Programs that compile in less than `MIN_SECONDS`, or that call back into Python, are neither.
    """

    hits: int = 0
    misses: int = 0

    def __str__(self) -> str:
        return f"{self.hits} hits, {self.misses} misses"


_use: CacheUse | None = None


def enable_cache() -> CacheUse:
    """Turns the persistent cache on, counts its use, and logs the count when the process ends.

    The folder is JAX's own `JAX_COMPILATION_CACHE_DIR` (a local path or `gs://`; empty: no cache),
    else `FOLDER`. An entry's key holds the program, the versions and options of the compiler, and
    the kind of the devices, for a CPU its instruction sets too. So an entry of another kind of
    machine is a miss, never a wrong program. Of several processes JAX lets only the first one
    write, so a cache for all hosts must be where all can read it.
    """
    global _use
    if jax.config.jax_compilation_cache_dir is None:
        folder = epath.Path(FOLDER).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a home that cannot be written is no reason not to run
            logging.warning(
                "no compilation cache: %s; JAX_COMPILATION_CACHE_DIR names another folder", error
            )
            folder = ""
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if _use is None:  # once a process, since listeners stay registered
        use = _use = CacheUse()

        def count(event: str, **_: str | int) -> None:
            if name := _EVENTS.get(event):
                setattr(use, name, getattr(use, name) + 1)

        def report() -> None:
            if use.hits or use.misses:  # otherwise an error's one line would not be the only one
                logging.info("compilation cache %s: %s", jax.config.jax_compilation_cache_dir, use)

        monitoring.register_event_listener(count)
        atexit.register(report)
    return _use
