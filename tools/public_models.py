"""Training steps and forward passes of models whose speed on TPUs is public, as small as they go.

They have the shapes, precision, sharding and recomputation of the public programs, so that they
cost the same; nothing trains with them. Parameters are plain trees, sharded over the rows' axis.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from univg_jax.planning.hlo import computed_blocks

ROWS = "rows"  # the one axis of a mesh: of rows of the batch, and of parameters
ATTENTION = "attention"  # the name of the attention kernel's results for policies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A dense decoder as Llama: grouped queries, RMSNorm, SwiGLU, rotary positions.

    Parameters are float32, and products bfloat16. Embeddings are read by a product with one-hot
    tokens (MaxText's `use_iota_embed`), and `offloaded` names what waits in the host's memory for
    the backward pass; the rest of a layer is computed again.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    offloaded: tuple[str, ...] = ("decoder_layer_input", "query", "key", "value", "out")
    block: int = 2048  # of queries and of keys in the attention kernel
    head: int = 128

    def shapes(self) -> dict[str, Any]:
        """The shapes of all parameters; those of layers are stacked."""
        d, queries, keys = self.width, self.heads * self.head, self.kv_heads * self.head
        layers = dict(q=(d, queries), k=(d, keys), v=(d, keys), out=(queries, d))
        layers |= dict(gate=(d, self.mlp), up=(d, self.mlp), down=(self.mlp, d))
        layers |= dict(norm1=(d,), norm2=(d,))
        layers = {name: (self.depth, *shape) for name, shape in layers.items()}
        ends = dict(embedding=(self.vocabulary, d), norm=(d,), logits=(d, self.vocabulary))
        return {"layers": layers, **ends}

    def loss(self, params: PyTree, tokens: Int[Array, "b n"]) -> Float[Array, ""]:
        """Cross-entropy of each next token."""
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(self.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
        layer = jax.checkpoint(self._layer, policy=policy, prevent_cse=False)
        x = jax.nn.one_hot(tokens, self.vocabulary, dtype=jnp.bfloat16) @ _whole(
            params["embedding"]
        )
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), _split(x), params["layers"])
        logits = _rms_norm(x, _whole(params["norm"])) @ _whole(params["logits"])
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), self.vocabulary)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * targets, axis=-1))

    def _layer(self, x: Float[Array, "b n d"], weights: PyTree) -> Float[Array, "b n d"]:
        x = checkpoint_name(x, "decoder_layer_input")
        w = jax.tree.map(_whole, weights)
        h = _rms_norm(x, w["norm1"])
        q, k, v = (_heads(h @ w[name], self.head) for name in "qkv")
        positions = jnp.arange(x.shape[1]) / 500_000 ** jnp.linspace(0, 1, self.head // 2)[:, None]
        q, k = (_rotate(x, positions.T) for x in (q, k))
        q, k, v = (checkpoint_name(x, name) for x, name in ((q, "query"), (k, "key"), (v, "value")))
        out = _attention(q, k, v, block=self.block, causal=True)
        x = x + checkpoint_name(out @ w["out"], "out")
        h = _rms_norm(x, w["norm2"])
        return _split(x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux:
    """Flux.1-dev's network: double blocks with weights for image and text each, then single ones.

    Parameters and products are bfloat16. Results of products and of attention are kept for the
    backward pass, so that only elementwise work is done again.
    """

    width: int = 3072
    double: int = 19
    single: int = 38
    mlp: int = 12288
    channels: int = 64  # of a token of the image: 16 of the latents x 2 x 2
    text: int = 4096
    pooled: int = 768
    time: int = 256
    tokens: tuple[int, int] = (4096, 512)  # of image and text
    block: int = 512
    head: int = 128

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one row's inputs."""
        image, text = self.tokens
        inputs = dict(image=(image, self.channels), text=(text, self.text))
        return inputs | dict(pooled=(self.pooled,), time=(self.time,))

    def shapes(self) -> dict[str, Any]:
        """The shapes of all parameters; those of blocks are stacked."""
        d, c = self.width, self.head

        def dense(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
            return {"kernel": (inputs, outputs), "bias": (outputs,)}

        stream = dict(modulation=dense(d, 6 * d), qkv=dense(d, 3 * d), out=dense(d, d))
        stream |= dict(mlp1=dense(d, self.mlp), mlp2=dense(self.mlp, d), q=(c,), k=(c,))
        single = dict(modulation=dense(d, 3 * d), q=(c,), k=(c,))
        single |= dict(linear1=dense(d, 3 * d + self.mlp), linear2=dense(d + self.mlp, d))
        stacks = {"double": ({"image": stream, "text": stream}, self.double)}
        stacks["single"] = (single, self.single)
        embedders = dict(time=self.time, guidance=self.time, pooled=self.pooled)
        return {
            **{
                name: jax.tree.map(lambda s, n=n: (n, *s), block, is_leaf=_is_shape)
                for name, (block, n) in stacks.items()
            },
            **{name: {"in": dense(n, d), "out": dense(d, d)} for name, n in embedders.items()},
            "image": dense(self.channels, d),
            "text": dense(self.text, d),
            "modulation": dense(d, 2 * d),
            "out": dense(d, self.channels),
        }

    def forward(
        self,
        params: PyTree,
        image: Float[Array, "b n c"],
        text: Float[Array, "b m t"],
        pooled: Float[Array, "b p"],
        time: Float[Array, "b f"],
    ) -> Float[Array, "b n c"]:
        """The velocity of an image's tokens; `time` is embedded, and stands for guidance too."""
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
        )
        remat = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        w = {name: params[name] for name in params if name not in ("double", "single")}
        given = dict(time=time, guidance=time, pooled=pooled)
        v = sum(_dense(jax.nn.silu(_dense(x, w[n]["in"])), w[n]["out"]) for n, x in given.items())
        v = jax.nn.silu(v)
        x, y = _dense(image, w["image"]), _dense(text, w["text"])
        angles = jnp.ones((y.shape[1] + x.shape[1], self.head // 2))
        double = remat(lambda xy, w: self._double(*xy, v, angles, w))
        (x, y), _ = jax.lax.scan(lambda xy, w: (double(xy, w), None), (x, y), params["double"])
        single = remat(lambda z, w: self._single(z, v, angles, w))
        z = jnp.concatenate([y, x], axis=1)
        z, _ = jax.lax.scan(lambda z, w: (single(z, w), None), z, params["single"])
        shift, scale = jnp.split(_dense(v, w["modulation"])[:, None], 2, axis=-1)
        return _dense(_layer_norm(z[:, y.shape[1] :]) * (1 + scale) + shift, w["out"])

    def loss(self, params: PyTree, image: Array, **given: Array) -> Float[Array, ""]:
        """The mean squared error; targets cost nothing, so the image is its own."""
        return jnp.mean((self.forward(params, image, **given) - image).astype(jnp.float32) ** 2)

    def _double(self, x: Array, y: Array, v: Array, angles: Array, w: PyTree) -> tuple:
        streams = [(y, w["text"]), (x, w["image"])]
        parts = [jnp.split(_dense(v, s["modulation"])[:, None], 6, axis=-1) for _, s in streams]
        qkv = [
            self._qkv(_dense(_layer_norm(h) * (1 + m[1]) + m[0], s["qkv"]), s)
            for (h, s), m in zip(streams, parts)
        ]
        q, k, values = (jnp.concatenate(pair, axis=2) for pair in zip(*qkv))
        out = _attention(_rotate(q, angles), _rotate(k, angles), values, block=self.block)
        outs = jnp.split(out, [y.shape[1]], axis=1)
        results = []
        for (h, s), m, attended in zip(streams, parts, outs):
            h = h + m[2] * _dense(attended, s["out"])
            hidden = jax.nn.gelu(_dense(_layer_norm(h) * (1 + m[4]) + m[3], s["mlp1"]))
            results.append(_split(h + m[5] * _dense(hidden, s["mlp2"])))
        return results[1], results[0]

    def _single(self, z: Array, v: Array, angles: Array, w: PyTree) -> Array:
        shift, scale, gate = jnp.split(_dense(v, w["modulation"])[:, None], 3, axis=-1)
        h = _dense(_layer_norm(z) * (1 + scale) + shift, w["linear1"])
        qkv, hidden = jnp.split(h, [3 * self.width], axis=-1)
        q, k, values = self._qkv(qkv, w)
        out = _attention(_rotate(q, angles), _rotate(k, angles), values, block=self.block)
        joined = jnp.concatenate([out, jax.nn.gelu(hidden)], axis=-1)
        return _split(z + gate * _dense(joined, w["linear2"]))

    def _qkv(self, qkv: Array, w: PyTree) -> tuple[Array, Array, Array]:
        q, k, v = (_heads(x, self.head) for x in jnp.split(qkv, 3, axis=-1))
        return _rms_norm(q, w["q"]), _rms_norm(k, w["k"]), v


def train_step(
    model: Decoder | Flux, devices: Sequence[jax.Device], *, dtype: Any, **batch: Any
) -> jax.stages.Lowered:
    """One update by AdamW with clipped gradients, for arrays of `batch`, whose rows are split.

    Parameters, gradients and moments are of `dtype`, and split over all devices.
    """
    mesh = Mesh(np.array(devices), (ROWS,))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-5, b2=0.95))
    params = _arrays(model.shapes(), dtype)
    state = (params, jax.eval_shape(optimizer.init, params))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, _spec(x.shape, mesh.size)), state)

    def step(state: PyTree, batch: PyTree) -> tuple[PyTree, Array]:
        params, moments = state
        loss, gradients = jax.value_and_grad(model.loss)(params, **batch)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings[0])
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return _lowered(jitted, mesh, _placed(state, shardings), batch)


def forward(
    model: Flux, devices: Sequence[jax.Device], *, dtype: Any, **batch: Any
) -> jax.stages.Lowered:
    """One pass of the network, with all parameters on each device."""
    mesh = Mesh(np.array(devices), (ROWS,))
    params = _arrays(model.shapes(), dtype)
    placed = _placed(params, jax.tree.map(lambda _: NamedSharding(mesh, P()), params))
    jitted = jax.jit(lambda params, batch: model.forward(params, **batch))
    return _lowered(jitted, mesh, placed, batch)


def _lowered(function: Callable, mesh: Mesh, first: PyTree, batch: PyTree) -> jax.stages.Lowered:
    rows = jax.tree.map(lambda _: NamedSharding(mesh, P(ROWS)), batch)
    with jax.set_mesh(mesh):
        return function.trace(first, _placed(batch, rows)).lower(lowering_platforms=("tpu",))


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def _arrays(shapes: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=_is_shape)


def _placed(arrays: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, shardings
    )


def _spec(shape: tuple[int, ...], parts: int) -> P:
    """The first dimension of a matrix that divides into `parts`, but for that of a stack."""
    for i in range(max(len(shape) - 2, 0), len(shape)):
        if len(shape) > 1 and shape[i] % parts == 0:
            return P(*[None] * i, ROWS)
    return P()


def _whole(x: Array) -> Array:
    """A parameter, gathered in bfloat16."""
    return jax.lax.with_sharding_constraint(x.astype(jnp.bfloat16), P())


def _split(x: Array) -> Array:
    """An activation, each device with its own rows."""
    return jax.lax.with_sharding_constraint(x, P(ROWS))


def _dense(x: Array, w: PyTree) -> Array:
    return x @ _whole(w["kernel"]) + _whole(w["bias"])


def _rms_norm(x: Array, scale: Array) -> Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def _layer_norm(x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    return (centered * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def _heads(x: Float[Array, "b n d"], size: int) -> Float[Array, "b k n c"]:
    return x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)


def _rotate(x: Float[Array, "b k n c"], angles: Float[Array, "n h"]) -> Float[Array, "b k n c"]:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _attention(
    q: Float[Array, "b k n c"],
    k: Float[Array, "b l n c"],
    v: Float[Array, "b l n c"],
    *,
    block: int,
    causal: bool = False,
) -> Float[Array, "b n d"]:
    """Splash attention, whose heads may share keys and values."""
    b, heads, n, _ = q.shape
    count = n // block
    kind = splash_attention.CausalMask if causal else splash_attention.FullMask
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([kind((n, n))] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=ATTENTION,
    )
    rows = P(ROWS)
    run = jax.shard_map(
        jax.vmap(kernel), in_specs=(rows, rows, rows), out_specs=rows, check_vma=False
    )
    with computed_blocks(count * (count + 1) // 2 if causal else count**2, of=count**2):
        out = run(q * q.shape[-1] ** -0.5, k, v)
    return out.swapaxes(1, 2).reshape(b, n, -1)
