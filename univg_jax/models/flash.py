"""Joint attention of an image and a text as one Pallas kernel for TPUs, both ways.

With s a head's learned scales, norm(x) = x / sqrt(mean(x^2) + eps) and one softmax over the keys of
both streams, each stream has

    o = softmax(q' k'^T / sqrt(c)) v,   q' = norm(q) s_q,   k' = norm(k) s_k

What it reads and writes are the projections' own arrays, [rows, tokens, heads x head_dim]: a head
is a window of columns, so nothing is transposed, joined, padded or normalized in memory. Keys and
values of one head stay on the chip while its queries pass in blocks, so each array moves once; that
bounds the tokens (`fits`). Scores are kept as [keys, queries]: the sums of a softmax are then over
rows, which costs a TPU less than over lanes, and no score is transposed backwards
(FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from univg_jax import sharding
from univg_jax.batch import Array
from univg_jax.models.attention import ATTENTION_OUT, LANES
from univg_jax.models.layers import NORM_EPS

SUBLANES = 16  # a block of tokens is whole rows of 16-bit numbers
MAX_BLOCK = 512  # queries and keys of a block of scores: 1 MiB in float32
MAX_MEMORY = 40 * 2**20  # that one head may keep on the chip
# Of the memory on a chip, what a head may keep at most, and what the compiler may use.
KEPT, USED = 0.75, 0.875
# Added to the scores of keys that are not attended to. Infinity would make NaN of an empty softmax.
_NEVER = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """One stream's queries, keys and values, and the scales of their norms (None: no norm).

    Without queries it is only attended to.
    """

    q: Float[Array, "b n a"] | None
    k: Float[Array, "b n a"]
    v: Float[Array, "b n a"]
    q_scale: Float[Array, " c"] | None
    k_scale: Float[Array, " c"] | None


def block_of(tokens: int) -> int:
    """Tokens of a block: the largest divisor up to `MAX_BLOCK` that is whole rows; 0 if none."""
    sizes = range(SUBLANES, min(tokens, MAX_BLOCK) + 1, SUBLANES)
    return max((size for size in sizes if tokens % size == 0), default=0)


def whole_blocks(tokens: int) -> int:
    """The least number of tokens, from this one on, that has blocks of at least `LANES`, or one."""
    count = -(-tokens // SUBLANES) * SUBLANES
    while block_of(count) < min(count, LANES):
        count += SUBLANES
    return count


def chip_memory() -> int:
    """Inside jit: bytes on the chip (VMEM) of the TPU that this is compiled for: 16 to 128 MiB."""
    return pltpu.get_tpu_info().vmem_capacity_bytes


def fits(
    b: int, n: int, m: int, *, num_heads: int, head_dim: int, itemsize: int, memory: int
) -> bool:
    """Whether the kernel can have b rows of n and m tokens: whole lanes and rows, room on the chip.

    `memory` is the chip's. Inside jit also whether the mesh, if any, can split them: not one row,
    which initializes parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (not sharding.rows_divisible(b) or num_heads % mesh.shape["tensor"]):
        return False
    block = block_of(n)
    # Backwards: keys, values and their gradients, each twice, so that the next head's arrive while
    # one is computed; two further copies of the keys, two float32 sums; eight blocks of scores.
    needed = head_dim * (10 * itemsize + 8) * (n + m) + 8 * 4 * block * max(block, m)
    whole = head_dim % LANES == 0 and m % SUBLANES == 0 and block >= min(n, LANES)
    return whole and needed <= min(MAX_MEMORY, KEPT * memory)


def flash(
    image: Stream,
    text: Stream,
    mask: Bool[Array, "b m"] | None,
    *,
    num_heads: int,
    tokens: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b n a"], Float[Array, "b m a"] | None]:
    """Joint attention: each stream's outputs; None for a stream without queries.

    Text tokens whose mask is False are not attended to, nor what pads the image after so many
    `tokens` (None: nothing does). Each device computes its own rows and heads. `interpret` runs it
    on a CPU. The caller has asked `fits`.
    """
    mask = jnp.ones(text.k.shape[:2], bool) if mask is None else mask
    bias = jnp.where(mask, 0.0, _NEVER).astype(jnp.float32)[..., None]
    c = image.k.shape[-1] // num_heads
    scales = [image.q_scale, image.k_scale, text.q_scale, text.k_scale]
    normed = image.k_scale is not None
    ones = jnp.ones(c, jnp.float32)
    scales = jnp.stack([ones if scale is None else scale for scale in scales])
    arrays = (image.q, image.k, image.v, text.q, text.k, text.v)
    tokens = image.k.shape[1] if tokens is None else tokens
    options = _Options(c=c, tokens=tokens, normed=normed, interpret=interpret)
    return _attend(arrays, scales, bias, options)


@dataclasses.dataclass(frozen=True)
class _Options:
    c: int  # channels of a head
    tokens: int  # of the image that are attended to
    normed: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(arrays: tuple, scales: Array, bias: Array, options: _Options) -> tuple:
    return _attend_forward(arrays, scales, bias, options)[0]


def _attend_forward(arrays: tuple, scales: Array, bias: Array, options: _Options) -> tuple:
    heads, columns = _specs()
    has_queries = arrays[3] is not None
    out = (columns, columns if has_queries else None)
    sums = (heads, heads if has_queries else None)
    texts = tuple(None if x is None else columns for x in arrays)
    run = _on_devices(
        functools.partial(_forward, options=options),
        (texts, P(), P(sharding.ROWS)),
        (out, sums),
    )
    outputs, lse = run(arrays, scales, bias)
    outputs, lse = jax.tree.map(lambda x: checkpoint_name(x, ATTENTION_OUT), (outputs, lse))
    return outputs, (arrays, scales, bias, outputs, lse)


def _attend_backward(options: _Options, saved: tuple, gradients: tuple) -> tuple:
    arrays, scales, bias, outputs, lse = saved
    heads, columns = _specs()

    def like(tree: tuple, spec: P) -> tuple:
        return tuple(None if x is None else spec for x in tree)

    run = _on_devices(
        functools.partial(_backward, options=options),
        (
            like(arrays, columns),
            *(P(), P(sharding.ROWS)),
            *(like(outputs, columns), like(lse, heads), like(outputs, columns)),
        ),
        (like(arrays, columns), heads),
    )
    gradients = tuple(None if x is None else g for x, g in zip(outputs, gradients, strict=True))
    of_arrays, of_scales = run(arrays, scales, bias, outputs, lse, gradients)
    return of_arrays, jnp.sum(of_scales, axis=(0, 1)), jnp.zeros_like(bias)


_attend.defvjp(_attend_forward, _attend_backward)


def _specs() -> tuple[P, P]:
    """Where [rows, heads, ...] and [rows, tokens, heads x head_dim] live."""
    return P(sharding.ROWS, "tensor"), P(sharding.ROWS, None, "tensor")


def _on_devices(run: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    if jax.sharding.get_abstract_mesh().empty:
        return run
    # The compiler cannot split a Pallas kernel by itself.
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Steps (row, head, block of queries); the last block is the text's, if it has queries."""

    b: int
    heads: int
    n: int  # tokens of the image
    m: int  # of the text
    c: int
    tokens: int  # of the image that are attended to
    has_text: bool

    @classmethod
    def of(cls, arrays: tuple, options: _Options) -> "_Grid":
        (b, n, width), m = arrays[1].shape, arrays[4].shape[1]
        has_text = arrays[3] is not None
        return cls(b, width // options.c, n, m, options.c, options.tokens, has_text)

    @property
    def block(self) -> int:
        return block_of(self.n)

    @property
    def blocks(self) -> int:
        return self.n // self.block

    @property
    def steps(self) -> tuple[int, int, int]:
        return self.b, self.heads, self.blocks + self.has_text

    # A window that does not move is fetched, or written, once. So while the text has its turn the
    # image's window stays at its last block.
    @property
    def of_block(self) -> pl.BlockSpec:
        last = self.blocks - 1
        return pl.BlockSpec((1, self.block, self.c), lambda b, h, i: (b, jnp.minimum(i, last), h))

    @property
    def of_sums(self) -> pl.BlockSpec:
        last = self.blocks - 1
        shape = (1, 1, 1, 1, self.block)
        return pl.BlockSpec(shape, lambda b, h, i: (b, h, jnp.minimum(i, last), 0, 0))

    def of_head(self, tokens: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, self.c), lambda b, h, i: (b, 0, h))

    @property
    def of_text_sums(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, self.m), lambda b, h, i: (b, h, 0, 0))

    @property
    def of_scales(self) -> pl.BlockSpec:
        return pl.BlockSpec((4, self.c), lambda b, h, i: (0, 0))

    @property
    def of_bias(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.m, 1), lambda b, h, i: (b, 0, 0))

    def scores(self, j: int, key: Array, query: Array, text_bias: Array) -> Array:
        """Those [keys, queries] of piece j of the keys, the last of which is the text's."""
        scores = _dot(key, query, (1, 1), dtype=key.dtype)
        if j == self.blocks:
            return scores + text_bias
        if (real := self.tokens - j * self.block) < self.block:
            position = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            scores = jnp.where(position < real, scores, _NEVER)
        return scores

    def call(
        self, kernel: Callable, name: str, in_specs: Sequence, out: Sequence, scratch: Sequence,
        *, interpret: bool,
    ) -> Callable:  # fmt: skip
        return pl.pallas_call(
            kernel,
            grid=self.steps,
            in_specs=in_specs,
            out_specs=[spec for spec, _ in out],
            out_shape=[shape for _, shape in out],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=None if interpret else int(USED * chip_memory()),
            ),
            name=name,
            interpret=interpret,
        )


def _forward(arrays: tuple, scales: Array, bias: Array, *, options: _Options) -> tuple:
    """((o of the image, of the text), (log of the sum of exponentials of each))."""
    grid, dtype = _Grid.of(arrays, options), arrays[0].dtype
    c, m, block = grid.c, grid.m, grid.block
    head = functools.partial(_head, normed=options.normed)
    dot = functools.partial(_dot, dtype=dtype)

    def kernel(scales, bias, k, v, k_text, v_text, *rest):
        # [keys, c] and, of the values, [c, keys]: in pieces of a block, then the text's
        inputs, rest = rest[: 1 + grid.has_text], rest[1 + grid.has_text :]
        outputs, (keys, values, text_keys, text_values) = rest[:-4], rest[-4:]
        i = pl.program_id(2)

        @pl.when(i == 0)
        def _():
            for j in range(grid.blocks):
                keys[j] = head(k[0, _piece(j, block)], scales[1:2])[0].astype(dtype)
                values[j] = _transposed(v[0, _piece(j, block)])
            text_keys[...] = head(k_text[0], scales[3:4])[0].astype(dtype)
            text_values[...] = _transposed(v_text[0])

        def attend(q, scale, o, sums):
            q = (head(q[0], scale)[0] * c**-0.5).astype(dtype)
            top = jnp.full((1, q.shape[0]), _NEVER, jnp.float32)
            total, result = jnp.zeros_like(top), jnp.zeros((c, q.shape[0]), jnp.float32)
            for j in range(grid.blocks + 1):
                is_text = j == grid.blocks
                scores = grid.scores(j, text_keys[...] if is_text else keys[j], q, bias[0])
                highest = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
                weights, shrink = jnp.exp(scores - highest), jnp.exp(top - highest)
                total = total * shrink + jnp.sum(weights, axis=0, keepdims=True)
                of_values = text_values[...] if is_text else values[j]
                result = result * shrink + dot(of_values, weights.astype(dtype), (1, 0))
                top = highest
            o[0] = (result / total).T.astype(dtype)
            sums[...] = (top + jnp.log(total)).reshape(sums.shape)

        @pl.when(i < grid.blocks)
        def _():
            attend(inputs[0], scales[0:1], *outputs[:2])

        if grid.has_text:

            @pl.when(i == grid.blocks)
            def _():
                attend(inputs[1], scales[2:3], *outputs[2:])

    f32 = jnp.float32
    out = [
        (grid.of_block, jax.ShapeDtypeStruct(arrays[0].shape, dtype)),
        (grid.of_sums, jax.ShapeDtypeStruct((grid.b, grid.heads, grid.blocks, 1, block), f32)),
        (grid.of_head(m), jax.ShapeDtypeStruct(arrays[4].shape, dtype)),
        (grid.of_text_sums, jax.ShapeDtypeStruct((grid.b, grid.heads, 1, m), f32)),
    ]
    of_n, of_m = grid.of_head(grid.n), grid.of_head(m)
    in_specs = [grid.of_scales, grid.of_bias, of_n, of_n, of_m, of_m, grid.of_block, of_m]
    queries = [x for x in (arrays[0], arrays[3]) if x is not None]
    run = grid.call(
        kernel,
        "flash_forward",
        in_specs[: 6 + len(queries)],
        out[: 2 * len(queries)],
        [
            pltpu.VMEM((grid.blocks, block, c), dtype),
            pltpu.VMEM((grid.blocks, c, block), dtype),
            pltpu.VMEM((m, c), dtype),
            pltpu.VMEM((c, m), dtype),
        ],
        interpret=options.interpret,
    )
    found = run(scales, bias, arrays[1], arrays[2], arrays[4], arrays[5], *queries)
    found = [*found, None, None]
    return (found[0], found[2]), (found[1], found[3])


def _backward(
    arrays: tuple, scales: Array, bias: Array, outputs: tuple, lse: tuple, gradients: tuple,
    *, options: _Options,
) -> tuple:  # fmt: skip
    """The gradients of the arrays, and those of the scales for each row and head."""
    grid, dtype = _Grid.of(arrays, options), arrays[0].dtype
    c, m, block, blocks = grid.c, grid.m, grid.block, grid.blocks
    head = functools.partial(_head, normed=options.normed)
    dot = functools.partial(_dot, dtype=dtype)
    count = 1 + grid.has_text

    def kernel(scales, bias, k, v, k_text, v_text, *rest):
        inputs, rest = rest[: 4 * count], rest[4 * count :]
        (dk, dv, dk_text, dv_text, dscales, *dq), scratch = rest[: 5 + count], rest[5 + count :]
        keys, keys_t, text_keys, text_keys_t, sum_k, sum_v, sum_k_text, sum_v_text = scratch
        i = pl.program_id(2)

        @pl.when(i == 0)
        def _():
            for j in range(blocks):
                key = head(k[0, _piece(j, block)], scales[1:2])[0]
                keys[j], keys_t[j] = key.astype(dtype), key.T.astype(dtype)
            key = head(k_text[0], scales[3:4])[0]
            text_keys[...], text_keys_t[...] = key.astype(dtype), key.T.astype(dtype)
            for sums in (sum_k, sum_v, sum_k_text, sum_v_text, dscales):
                sums[...] = jnp.zeros_like(sums)

        def attend(position, q, o, do, lse, dq):
            scale = scales[position : position + 1]
            scaled, normed, inverse = head(q[0], scale)
            query = (scaled * c**-0.5).astype(dtype)
            lse = lse[...].reshape(1, -1)
            gradient = do[0]
            products = gradient.astype(jnp.float32) * o[0].astype(jnp.float32)
            mean = jnp.sum(products.T, axis=0, keepdims=True)
            result = jnp.zeros((c, query.shape[0]), jnp.float32)
            for j in range(blocks + 1):
                is_text = j == blocks
                key, key_t = (text_keys, text_keys_t) if is_text else (keys.at[j], keys_t.at[j])
                value = v_text[0] if is_text else v[0, _piece(j, block)]
                of_k, of_v = (sum_k_text, sum_v_text) if is_text else (sum_k.at[j], sum_v.at[j])
                scores = grid.scores(j, key[...], query, bias[0])
                weights = jnp.exp(scores - lse)
                of_v[...] += dot(weights.astype(dtype), gradient, (1, 0))
                of_scores = weights * (dot(value, gradient, (1, 1)) - mean)
                of_scores = of_scores.astype(dtype)
                of_k[...] += dot(of_scores, query, (1, 0))
                result += dot(key_t[...], of_scores, (1, 0))
            of_q, of_scale = _head_gradient(result.T * c**-0.5, scale, normed, inverse)
            dq[0] = of_q.astype(dtype)
            dscales[0, 0, position : position + 1] += of_scale

        @pl.when(i < blocks)
        def _():
            attend(0, *inputs[:4], dq[0])

        if grid.has_text:

            @pl.when(i == blocks)
            def _():
                attend(2, *inputs[4:], dq[1])

        @pl.when(i == pl.num_programs(2) - 1)
        def _():
            def finish(position, k, of_k, of_v, dk, dv):
                scale = scales[position : position + 1]
                _, normed, inverse = head(k, scale)
                gradient, of_scale = _head_gradient(of_k, scale, normed, inverse)
                dscales[0, 0, position : position + 1] += of_scale
                dk[...], dv[...] = gradient.astype(dtype), of_v.astype(dtype)

            for j in range(blocks):
                where = (0, _piece(j, block))
                finish(1, k[where], sum_k[j], sum_v[j], dk.at[where], dv.at[where])
            finish(3, k_text[0], sum_k_text[...], sum_v_text[...], dk_text.at[0], dv_text.at[0])

    like = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (arrays[1], arrays[4])]
    of_n, of_m = grid.of_head(grid.n), grid.of_head(m)
    of_dscales = pl.BlockSpec((1, 1, 4, c), lambda b, h, i: (b, h, 0, 0))
    out = [
        *((of_n, like[0]), (of_n, like[0]), (of_m, like[1]), (of_m, like[1])),
        (of_dscales, jax.ShapeDtypeStruct((grid.b, grid.heads, 4, c), jnp.float32)),
        *((grid.of_block, like[0]), (of_m, like[1])),
    ]
    in_specs = [grid.of_scales, grid.of_bias, of_n, of_n, of_m, of_m]
    in_specs += [grid.of_block, grid.of_block, grid.of_block, grid.of_sums]
    in_specs += [of_m, of_m, of_m, grid.of_text_sums]
    operands = [arrays[0], outputs[0], gradients[0], lse[0]]
    operands += [arrays[3], outputs[1], gradients[1], lse[1]] if grid.has_text else []
    run = grid.call(
        kernel,
        "flash_backward",
        in_specs[: 6 + len(operands)],
        out[: 5 + count],
        [
            pltpu.VMEM((blocks, block, c), dtype),
            pltpu.VMEM((blocks, c, block), dtype),
            *(pltpu.VMEM((m, c), dtype), pltpu.VMEM((c, m), dtype)),
            *[pltpu.VMEM((blocks, block, c), jnp.float32)] * 2,
            *[pltpu.VMEM((m, c), jnp.float32)] * 2,
        ],
        interpret=options.interpret,
    )
    found = run(scales, bias, arrays[1], arrays[2], arrays[4], arrays[5], *operands)
    dk, dv, dk_text, dv_text, dscales, dq, *dq_text = found
    return (dq, dk, dv, *(dq_text or [None]), dk_text, dv_text), dscales


def _piece(j: int, block: int) -> slice:
    return slice(j * block, (j + 1) * block)


def _transposed(x: Array) -> Array:
    return x.astype(jnp.float32).T.astype(x.dtype)  # a TPU transposes 32-bit numbers


def _dot(x: Array, y: Array, axes: tuple[int, int], *, dtype: jnp.dtype) -> Array:
    """The product that contracts these axes, in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _head(x: Array, scale: Array, *, normed: bool) -> tuple[Array, Array, Array | None]:
    """(norm(x) scale, norm(x), the factor of the norm) in float32."""
    x = x.astype(jnp.float32)
    if not normed:
        return x, x, None
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)
    return x * inverse * scale, x * inverse, inverse


def _head_gradient(
    gradient: Array, scale: Array, normed: Array, inverse: Array | None
) -> tuple[Array, Array]:
    """The gradients of x and of the scale by that of `_head`."""
    of_scale = jnp.sum(gradient * normed, axis=0, keepdims=True)
    if inverse is None:
        return gradient, jnp.zeros_like(of_scale)
    y = gradient * scale
    return inverse * (y - normed * jnp.mean(y * normed, axis=-1, keepdims=True)), of_scale
