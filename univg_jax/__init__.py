"""univg_jax: train one generalist image model (UniVG) with JAX on TPU pods."""

__version__ = "0.1.0"
