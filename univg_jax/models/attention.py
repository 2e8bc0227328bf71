"""Attention, softmax(q k^T / sqrt(c)) v, with one implementation for each kind of device.

    xla       keeps all scores in memory; runs anywhere
    cpu       the same, with matrix products and a gradient that are faster on CPUs
    splash    Pallas kernel for TPUs
    cudnn     NVIDIA's kernel for GPUs
    auto      chooses by the platform of the process that compiles it
    portable  chooses when a program is lowered for a platform, which may be another one

In MM-DiT `auto` is a kernel of ours on TPUs, where that fits: `models.flash`.

The two kernels compute scores in blocks, so that no [queries x keys] array is ever in memory. All
have the same signature and give the same numbers up to the rounding of the dtype. Every query
attends to every key whose mask is True.
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

# The name of the result for remat policies. A policy that keeps it saves running the kernel again
# in the backward pass.
ATTENTION_OUT = "attention_out"
LANES = 128  # splash blocks are multiples of a TPU's vector width
# A block has 4 MiB of float32 scores, of the 16 MiB that a kernel may use. Blocks are long in keys
# because the backward pass writes a gradient of all queries for each block of keys. Forwards up to
# `MAX_KEYS` stay on the chip, so that they are read once for all blocks of queries.
MAX_BLOCK = dict(queries=512, keys=2048)
MAX_KEYS = 5120
MAX_PADDING = 1.06  # a larger block may lengthen the padded sequence by this factor


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

    Keys whose mask is False get no weight, and with `causal` neither do keys after the query.
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
    return checkpoint_name(jnp.einsum("bkns,bskc->bnkc", weights, v), ATTENTION_OUT)


def cpu_attention(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b n k c"]:
    """`xla_attention` for CPUs, where XLA is slow at 4-D products and their gradients.

    Let P be the weights, S the scores and O the output. Then dS = P (dP - rowsum(dO O))
    (FlashAttention, arXiv 2205.14135, appendix B.2). P is kept for the backward pass, which thus
    reads [queries x keys] arrays only once.
    """
    b, n, heads, c = q.shape
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask

    def rows(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(b * heads, x.shape[1], c)

    out = _attend(rows(q * c**-0.5), rows(k), rows(v), jnp.repeat(mask, heads, axis=0)[:, None])
    return checkpoint_name(out.reshape(b, heads, n, c).swapaxes(1, 2), ATTENTION_OUT)


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


@jax.named_scope("attention")
def _attend_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    scores = jnp.where(mask, _product(q, k, axes=(2, 2)), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = _product(weights, v, axes=(2, 1)).astype(v.dtype)
    return out, (q, k, v, mask, weights, out)


@jax.named_scope("attention")
def _attend_backward(saved: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, weights, out = saved
    d_weights = _product(gradient, v, axes=(2, 2))
    mean = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    # If all keys of a row are masked, its softmax is uniform, not zero; the gradient must be zero.
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

    The kernel demands the same dtype for all three inputs, and a mask of [b 1 n s].
    """
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None, None], (len(mask), 1, q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return checkpoint_name(out, ATTENTION_OUT)


def splash_block(length: int, *, largest: int) -> int:
    """The largest block size that pads a sequence little further than the smallest block does.

    Larger blocks run faster, but padding costs time in proportion to its length (`MAX_PADDING`).
    """
    least = _round_up(length, LANES)
    blocks = range(LANES, min(least, largest) + 1, LANES)
    return max(block for block in blocks if _round_up(length, block) <= MAX_PADDING * least)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def splash(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "b n k c"]:
    """`xla_attention` by Pallas' splash kernel; each device computes its own rows and heads.

    Both sequences are padded to whole blocks. Real queries and keys are segment 1, masked keys and
    padding segment 0; the kernel attends only within a segment. `interpret` runs it on a CPU.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and not sharding.rows_divisible(len(q)):
        # One row, as used to initialize parameters, cannot be split over the devices.
        return xla_attention(q, k, v, mask)
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    rows, heads = P(sharding.ROWS), P(sharding.ROWS, "tensor")
    blocks = (
        splash_block(q.shape[1], largest=MAX_BLOCK["queries"]),
        splash_block(k.shape[1], largest=MAX_BLOCK["keys"]),
    )
    run = functools.partial(_splash_rows, blocks=blocks, interpret=interpret)
    if not mesh.empty:
        # The compiler cannot split a Pallas kernel by itself.
        run = jax.shard_map(
            run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    out = run(*(x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v)), mask)
    return out.swapaxes(1, 2)


def _splash_rows(
    q: Float[Array, "b k n c"],
    k: Float[Array, "b k s c"],
    v: Float[Array, "b k s c"],
    mask: Bool[Array, "b s"],
    *,
    blocks: tuple[int, int],
    interpret: bool,
) -> Float[Array, "b k n c"]:
    """Splash attention of one device's rows and heads, with blocks of (queries, keys)."""
    _, heads, n, _ = q.shape
    q, k, v = (_pad(x, 2, block) for x, block in ((q, blocks[0]), (k, blocks[1]), (v, blocks[1])))
    segments = splash_attention.SegmentIds(
        q=(jnp.arange(q.shape[2]) < n).astype(jnp.int32),
        kv=_pad(mask.astype(jnp.int32), 1, blocks[1]),
    )
    keys = k.shape[2]
    full = splash_attention.FullMask((q.shape[2], k.shape[2]))
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([full] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=blocks[0],
            block_kv=keys if keys <= MAX_KEYS else blocks[1],
            block_kv_compute=blocks[1],
            block_q_dkv=blocks[0],
            block_kv_dkv=blocks[1],
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=ATTENTION_OUT,
        interpret=interpret,
    )
    over_rows = jax.vmap(kernel, in_axes=(0, 0, 0, splash_attention.SegmentIds(q=None, kv=0)))
    return over_rows(q, k, v, segments)[:, :, :n]


def _pad(x: Array, axis: int, block: int) -> Array:
    """x with zeros at the end of an axis, up to whole blocks."""
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def auto(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b n k c"]:
    """The implementation for the platform that this is compiled for, by its dtype.

    `splash` on TPUs, `cudnn` on NVIDIA GPUs for 16-bit floats, `cpu` on CPUs, else `xla`.
    """
    platform = sharding.platform()
    if platform == "tpu":
        return splash(q, k, v, mask)
    if platform in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16):
        return cudnn_attention(q, k, v, mask)
    if platform == "cpu":
        return cpu_attention(q, k, v, mask)
    return xla_attention(q, k, v, mask)


def portable(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b n k c"]:
    """The implementation for the platform that the program is lowered for: for `jax.export`.

    For TPUs `splash`, whose kernels a program may hold for later versions of their compiler; for
    CPUs `cpu`, else `xla`: what holds cuDNN's kernel is bound to its version. JAX lowers a Pallas
    kernel for one platform at a time, so each platform needs a program of its own.
    """
    return jax.lax.platform_dependent(
        q, k, v, mask, tpu=splash, cpu=cpu_attention, default=xla_attention
    )


ATTENTION: dict[str, Callable] = {
    "auto": auto,
    "xla": xla_attention,
    "splash": splash,
    "cudnn": cudnn_attention,
    "cpu": cpu_attention,
    "portable": portable,
}
