"""softmax(q k^T / sqrt(c)) v of joint attention, on each kind of device.

`xla` writes the scores out and runs anywhere; `cpu` does so as a CPU likes it. `splash` (Pallas,
TPU) and `cudnn` (NVIDIA) go over them in blocks, so that no [queries x keys] array lies in memory.
`auto` takes the one of the platform that it is compiled for. All have one signature and give the
same numbers to their dtype's rounding. Every query sees every key whose mask is True.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from univg_jax import sharding
from univg_jax.batch import Array

# what a remat policy may keep, so that the kernel need not run again for its gradient
ATTENDED = "attended"
LANES = 128  # a splash block is a multiple of it
# Scores of a block are float32: 4 MiB of the 16 MiB that a kernel may hold. Long in keys, because
# the backward pass writes a gradient of all queries for every block of keys.
LARGEST_BLOCK = dict(queries=512, keys=2048)
PADDING = 1.06  # of the sequence, that a larger block may cost


def xla_attention(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Float[Array, "k n s"] | None = None,
) -> Float[Array, "b n k c"]:
    """softmax(scale q k^T + bias) v for each head, `scale` by default 1 / sqrt(c).

    Keys whose mask is False, and `causal` later ones, get no weight.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("bnkc,bskc->bkns", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    if causal:
        earlier = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(earlier[None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bkns,bskc->bnkc", weights, v), ATTENDED)


def cpu_attention(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b n k c"]:
    """`xla_attention`'s softmax(q k^T / sqrt(c)) v, for CPUs: XLA is slow there at 4-D products and
    their gradients.

    With P the weights and O the output, dS = P (dP - rowsum(dO O)) (FlashAttention, arXiv
    2205.14135, appendix B.2): P is kept and the scores are gone over once.
    """
    b, n, heads, c = q.shape
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask

    def rows(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(b * heads, x.shape[1], c)

    out = _attend(rows(q * c**-0.5), rows(k), rows(v), jnp.repeat(mask, heads, axis=0)[:, None])
    return checkpoint_name(out.reshape(b, heads, n, c).swapaxes(1, 2), ATTENDED)


def _product(x: Array, y: Array, *, axes: tuple[int, int]) -> Array:
    """Contracts the given axes of each pair of matrices; the result is float32."""
    dimensions = (((axes[0],), (axes[1],)), ((0,), (0,)))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(
    q: Float[Array, "r n c"],
    k: Float[Array, "r s c"],
    v: Float[Array, "r s c"],
    mask: Bool[Array, "r 1 s"],
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


def cudnn_attention(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b n k c"]:
    """`xla_attention` by cuDNN's flash kernel: bfloat16 or float16, NVIDIA GPUs from Ampere on.

    Keys are masked by a [b 1 1 s] mask; with one dtype for all three inputs, the kernel's demand.
    """
    masked = (
        None
        if mask is None
        else jnp.broadcast_to(mask[:, None, None], (mask.shape[0], 1, q.shape[1], k.shape[1]))
    )
    return checkpoint_name(
        jax.nn.dot_product_attention(q, k, v, mask=masked, implementation="cudnn"), ATTENDED
    )


def splash_block(length: int, *, largest: int) -> int:
    """The largest block of a sequence that pads it little more than the smallest one does."""
    least = -(-length // LANES) * LANES
    blocks = range(LANES, min(least, largest) + 1, LANES)
    return max(block for block in blocks if -(-length // block) * block <= PADDING * least)


def splash(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "b n k c"]:
    """`xla_attention` by Pallas' splash kernel, each device its own rows and heads. `interpret`
    runs it on a CPU.

    Both sequences are padded to whole blocks; masked keys and padding are segment 0, not seen by
    queries that count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not sharding.rows_divisible(len(q)):
        return xla_attention(q, k, v, mask)
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), "tensor")
    blocks = (
        splash_block(q.shape[1], largest=LARGEST_BLOCK["queries"]),
        splash_block(k.shape[1], largest=LARGEST_BLOCK["keys"]),
    )
    run = functools.partial(_splash_rows, blocks=blocks, interpret=interpret)
    if not mesh.empty:
        run = jax.shard_map(
            run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    out = run(*(x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)), mask)
    return out.swapaxes(1, 2)


def _splash_rows(q, k, v, mask, *, blocks: tuple[int, int], interpret: bool):
    _, heads, n, _ = q.shape
    q, k, v = (_pad(x, 2, block) for x, block in ((q, blocks[0]), (k, blocks[1]), (v, blocks[1])))
    segments = splash_attention.SegmentIds(
        q=(jnp.arange(q.shape[2]) < n).astype(jnp.int32),
        kv=_pad(mask.astype(jnp.int32), 1, blocks[1]),
    )
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask(
            [splash_attention.FullMask((q.shape[2], k.shape[2]))] * heads
        ),
        block_sizes=splash_attention.BlockSizes(
            block_q=blocks[0],
            block_kv=blocks[1],
            block_q_dkv=blocks[0],
            block_kv_dkv=blocks[1],
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    return jax.vmap(kernel, in_axes=(0, 0, 0, splash_attention.SegmentIds(q=None, kv=0)))(
        q, k, v, segments
    )[:, :, :n]


def _pad(x: Array, axis: int, block: int) -> Array:
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def auto(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b n k c"]:
    """`splash` on TPUs, `cudnn` on NVIDIA GPUs for the dtypes that it takes, `cpu` on CPUs, else
    `xla`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    if device.platform == "tpu":
        return splash(q, k, v, mask)
    if device.platform in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16):
        return cudnn_attention(q, k, v, mask)
    if device.platform == "cpu":
        return cpu_attention(q, k, v, mask)
    return xla_attention(q, k, v, mask)


ATTENTION: dict[str, Callable] = {
    "auto": auto,
    "xla": xla_attention,
    "splash": splash,
    "cudnn": cudnn_attention,
    "cpu": cpu_attention,
}
