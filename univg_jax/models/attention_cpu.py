"""Joint attention for CPUs: the scores are written out, as 3-D batched products with a backward pass of their own."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

Array = jax.Array | np.ndarray


def cpu_attention(
    q: Float[Array, "b n k c"], k: Float[Array, "b s k c"], v: Float[Array, "b s k c"], mask: Bool[Array, "b s"] | None
) -> Float[Array, "b n k c"]:
    """`xla_attention`'s softmax(q k^T / sqrt(c)) v, for CPUs: XLA is slow there at 4-D products and their gradients.

    With P the weights and O the output, dS = P (dP - rowsum(dO O)) (FlashAttention, arXiv 2205.14135, appendix B.2):
    P is kept and the scores are gone over once.
    """
    b, n, heads, c = q.shape
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask

    def rows(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(b * heads, x.shape[1], c)

    out = _attend(rows(q * c**-0.5), rows(k), rows(v), jnp.repeat(mask, heads, axis=0)[:, None])
    return out.reshape(b, heads, n, c).swapaxes(1, 2)


def _product(x: Array, y: Array, *, axes: tuple[int, int]) -> Array:
    """Contracts the given axes of each pair of matrices; the result is float32."""
    dimensions = (((axes[0],), (axes[1],)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(
    q: Float[Array, "r n c"], k: Float[Array, "r s c"], v: Float[Array, "r s c"], mask: Bool[Array, "r 1 s"]
) -> Float[Array, "r n c"]:
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    scores = jnp.where(mask, _product(q, k, axes=(2, 2)), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = _product(weights, v, axes=(2, 1)).astype(v.dtype)
    return out, (q, k, v, mask, weights, out)


def _attend_backward(saved: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, weights, out = saved
    d_weights = _product(gradient, v, axes=(2, 2))
    mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    # Where no key counts, the weights are not zero but have no gradient.
    d_scores = jnp.where(mask, weights * (d_weights - mean), 0).astype(v.dtype)
    d_v = _product(weights, gradient, axes=(1, 1))
    d_q, d_k = _product(d_scores, k, axes=(2, 1)), _product(d_scores, q, axes=(1, 1))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
