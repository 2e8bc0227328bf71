"""MM-DiT: an image and a text stream with their own weights, joined in attention.

Each block computes on each stream x (image, text), with (shift, scale, gate) from c = time + pooled
text:

    a = attention over both streams of norm(x) (1 + scale_1) + shift_1
    x = x + gate_1 W_a a
    x = x + gate_2 MLP(norm(x) (1 + scale_2) + shift_2)

Stable Diffusion 3 (arXiv 2403.03206, section 4), numerically diffusers' `SD3Transformer2DModel`;
shared modulation from DiT-Air (arXiv 2503.10618). Rotary positions and sandwich norms are options
that diffusers lacks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from univg_jax import fields, sharding
from univg_jax.batch import Array
from univg_jax.errors import UserError, check_name
from univg_jax.fields import setting
from univg_jax.models.attention import ATTENTION, ATTENTION_OUT
from univg_jax.models.flash import SUBLANES, Stream, chip_memory, fits, flash, whole_blocks
from univg_jax.models.layers import (
    MLP,
    NORM_EPS,
    Linear,
    RMSNorm,
    Scale,
    add_bias,
    add_gated,
    gelu_tanh,
    modulated_norm,
    rms_norm,
    rotate_2d,
    sincos_table,
    time_features,
)
from univg_jax.settings import DTYPES
from univg_jax.sizes import SIZES


def _all_but_gathers(primitive: Any, *_: Any, **__: Any) -> bool:
    # Conversions too are made again: that of a gathered weight (`sum_dtype`) would keep it.
    return primitive.name not in ("all_gather", "convert_element_type")


# The name of queries, keys and values for remat policies: with their biases, so that these are not
# added again.
PROJECTED = "projected"
# What a block keeps for the backward pass beside its input.
_policies = jax.checkpoint_policies
REMAT = {
    "none": _all_but_gathers,  # everything but gathered weights, which would undo FSDP
    "minimal": _policies.save_from_both_policies(  # the outputs of its linear maps and of attention
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(ATTENTION_OUT, PROJECTED),
    ),
    "full": _policies.save_only_these_names(ATTENTION_OUT),  # the output of attention
    "block": _policies.nothing_saveable,  # nothing
    # the outputs of its linear maps, in the host's memory
    "offload": _policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


FROM_ENCODERS = ("in_channels", "out_channels", "text_dim", "pooled_dim")  # fields of `MMDiT`


class StreamBlock(nn.Module):
    """One stream's part of a block: `project` before the joint attention, `update` after it.

    `final` marks the text stream of the last block: nothing reads its output, so it has keys and
    values only, and its modulation is (scale, shift), in that order, as in diffusers.
    """

    hidden_dim: int
    heads_dim: int
    num_heads: int
    mlp_ratio: int
    qk_norm: str | None
    sandwich_norm: bool
    shared_adaln: bool
    dtype: Any
    sum_dtype: Any
    final: bool = False

    def setup(self):
        d, dtypes = self.hidden_dim, dict(dtype=self.dtype, sum_dtype=self.sum_dtype)
        if self.shared_adaln:
            self.offset = self.param("offset", nn.initializers.zeros, (6 * d,))
        else:
            self.modulation = Linear(
                (2 if self.final else 6) * d, kernel_init=nn.initializers.zeros, **dtypes
            )
        self.k, self.v = Linear(self.heads_dim, **dtypes), Linear(self.heads_dim, **dtypes)
        if self.qk_norm:
            self.k_norm = Scale(self.heads_dim // self.num_heads)
        if self.final:
            return
        self.q = Linear(self.heads_dim, **dtypes)
        if self.qk_norm:
            self.q_norm = Scale(self.heads_dim // self.num_heads)
        self.attn_out = Linear(d, **dtypes)
        self.mlp = MLP(self.mlp_ratio * d, d, gelu_tanh, **dtypes)
        if self.sandwich_norm:
            self.attn_norm, self.mlp_norm = RMSNorm(), RMSNorm()

    def modulate(self, cond: Float[Array, "b e"]) -> list[Float[Array, "b d"]]:
        """(shift, scale, gate) of attention, then of the MLP; (scale, shift) if `final`."""
        if self.shared_adaln:
            chunks = jnp.split(add_bias(cond, self.offset), 6, axis=-1)
            return [chunks[1], chunks[0]] if self.final else chunks
        return jnp.split(self.modulation(cond), 2 if self.final else 6, axis=-1)

    def project(self, x: Float[Array, "b n d"], mod: list) -> Stream:
        """Queries (None if `final`), keys and values, and the scales of their norms."""
        scale, shift = mod if self.final else (mod[1], mod[0])
        h = modulated_norm(x, scale, shift)
        scales = dict(q_scale=None, k_scale=self.k_norm() if self.qk_norm else None)
        k, v = (checkpoint_name(linear(h), PROJECTED) for linear in (self.k, self.v))
        if self.final:
            return Stream(q=None, k=k, v=v, **scales)
        if self.qk_norm:
            scales["q_scale"] = self.q_norm()
        return Stream(q=checkpoint_name(self.q(h), PROJECTED), k=k, v=v, **scales)

    def update(
        self, x: Float[Array, "b n d"], attended: Float[Array, "b n a"], mod: list
    ) -> Float[Array, "b n d"]:
        """x after adding the output of attention, then that of the MLP."""
        _, _, gate_attn, shift, scale, gate_mlp = mod
        y = self.attn_out(attended)
        x = add_gated(x, gate_attn, self.attn_norm(y) if self.sandwich_norm else y)
        y = self.mlp(modulated_norm(x, scale, shift))
        return add_gated(x, gate_mlp, self.mlp_norm(y) if self.sandwich_norm else y)


class JointBlock(nn.Module):
    """A block of both streams; with `final` the text stream is not updated."""

    stream: Mapping[str, Any]  # fields of `StreamBlock`
    attend: Callable  # joint attention of (image, text, text_mask): `joint_attention` or `flash`
    final: bool = False

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], cond: Array, text_mask: Array | None) -> tuple:
        image, text = carry = sharding.constrain_rows(carry)
        streams = [
            StreamBlock(**self.stream, name="image"),
            StreamBlock(**self.stream, final=self.final, name="text"),
        ]
        conds = jnp.split(cond, 2, axis=-1) if self.stream["shared_adaln"] else [cond, cond]
        mods = [s.modulate(c) for s, c in zip(streams, conds, strict=True)]
        projected = (s.project(x, mod) for s, x, mod in zip(streams, carry, mods, strict=True))
        attended = self.attend(*projected, text_mask)
        image = streams[0].update(image, attended[0], mods[0])
        if not self.final:
            text = streams[1].update(text, attended[1], mods[1])
        return (image, text), None


def joint_attention(
    image: Stream,
    text: Stream,
    mask: Bool[Array, "b m"] | None,
    *,
    num_heads: int,
    grid: tuple[int, int] | None,
    attention: Callable,
) -> tuple[Float[Array, "b n a"], Float[Array, "b m a"] | None]:
    """The outputs of both streams, by a function of one; None for a text without queries.

    `grid` is (height, width) in tokens where positions are rotary.
    """
    n = image.k.shape[1]

    def heads(stream: Stream) -> tuple[Array | None, Array, Array]:
        def split(x: Array) -> Array:
            return x.reshape(*x.shape[:-1], num_heads, -1)

        def normed(x: Array, scale: Array | None) -> Array:
            return split(x) if scale is None else rms_norm(split(x), scale, NORM_EPS)

        q = None if stream.q is None else normed(stream.q, stream.q_scale)
        return q, normed(stream.k, stream.k_scale), split(stream.v)

    (q, k, v), (q_text, k_text, v_text) = heads(image), heads(text)
    if grid is not None:
        q, k = (rotate_2d(x, height=grid[0], width=grid[1]) for x in (q, k))
    q = q if q_text is None else jnp.concatenate([q, q_text], axis=1)
    k, v = jnp.concatenate([k, k_text], axis=1), jnp.concatenate([v, v_text], axis=1)
    if mask is not None:
        mask = jnp.concatenate([jnp.ones(image.k.shape[:2], bool), mask], axis=1)
    out = attention(q, k, v, mask)
    out = out.reshape(*out.shape[:2], -1)
    return out[:, :n], None if q_text is None else out[:, n:]


class MMDiT(nn.Module):
    """Velocity of a latent image given text: see the module's docstring.

    All blocks but the last are one stack: their parameters, under `blocks`, have a leading axis of
    depth - 1, whether `scan` loops over them or unrolls. Modulations and the output map start at
    zero, so the initial output is exactly zero (AdaLN-zero).

    Raises UserError for an impossible combination of fields or a latent size that the patch size
    does not divide.
    """

    hidden_dim: int = setting(help="width, a multiple of 4", least=4, unit="channels")
    depth: int = setting(help="blocks", least=1, unit="blocks")
    num_heads: int = setting(help="heads of attention", least=1, unit="heads")
    head_dim: int | None = setting(
        None,
        "width of a head, a multiple of 4; a TPU stores it in whole 128s",
        least=4,
        unit="channels",
        none="hidden_dim / num_heads",
    )
    patch_size: int = setting(2, "latent cells a side of a token", least=1, unit="latent cells")
    in_channels: int = setting(33, "channels of noise, source and mask", least=1, unit="channels")
    source: str = setting(
        "channels",
        "source and mask enter as channels, or as tokens of their own (sequence concatenation)",
        names=("channels", "tokens"),
    )
    out_channels: int = setting(16, "channels of a latent", least=1, unit="channels")
    text_dim: int = setting(4096, "width of the tokens' embeddings", least=1, unit="channels")
    pooled_dim: int = setting(2048, "width of the whole text's embedding", least=1, unit="channels")
    mlp_ratio: int = setting(4, "an MLP's inner width, in widths", least=1, unit="factor")
    qk_norm: str | None = setting(
        "rms_norm", "of queries and keys", names=("rms_norm",), none="no norm"
    )
    position: str = setting("sincos", "of the image's tokens", names=("sincos", "rope"))
    pos_embed_max_size: int = setting(192, "tokens a side, of sincos", least=1, unit="tokens")
    pos_embed_base_size: int = setting(
        64, "the table's extent in units of position, of sincos", least=1, unit="positions"
    )
    sandwich_norm: bool = setting(False, "norms after attention and MLP too")
    shared_adaln: bool = setting(False, "one modulation for all blocks")
    remat: str = setting("none", "what a block keeps for the backward pass", names=tuple(REMAT))
    scan: bool | None = setting(
        None,
        "whether the blocks are a loop: faster to compile, slower on a CPU",
        none="not on a CPU",
    )
    attention: str | Callable = setting(
        "auto", "or a function of the same signature", names=tuple(ATTENTION)
    )
    dtype: Any = setting(jnp.float32, "of the computation; parameters are float32", names=DTYPES)
    # In bfloat16 the sums move half the bytes of float32, and are off by 0.4, 1.0 and 1.9% of their
    # norm over 8, 64 and 256 devices in one ring, by 0.3, 0.6 and 1.0% in our two hops
    # (benchmarks/gradient_sums.py). A batch's own noise is larger, so this is the default: our
    # choice.
    sum_dtype: Any = setting(
        None, "of the sums of kernels' gradients over devices", names=DTYPES, none="dtype"
    )

    def __post_init__(self):
        super().__post_init__()
        fields.read_fields(MMDiT, self, "model.overrides")
        if self.head_dim is None and self.hidden_dim % (4 * self.num_heads):
            raise UserError(
                f"hidden_dim {self.hidden_dim} is not a multiple of 4 * num_heads {self.num_heads}"
            )
        for name in ("hidden_dim", "head_dim"):
            if (getattr(self, name) or 0) % 4:
                raise UserError(f"{name} {getattr(self, name)} is not a multiple of 4")
        if self.source == "tokens" and self.in_channels != 2 * self.out_channels + 1:
            raise UserError(
                f"source='tokens' with in_channels {self.in_channels}: expected noise and source "
                f"of {self.out_channels} channels each, and the mask"
            )

    @property
    def heads_dim(self) -> int:
        """The width of all heads together."""
        return self.num_heads * (self.head_dim or self.hidden_dim // self.num_heads)

    def matmul_flops(self, *, height: int, width: int, num_tokens: int, train: bool) -> float:
        """FLOPs of all matrix products for one example with latents of height x width.

        A multiply-add counts as 2. With n image and m text tokens, a block multiplies each token by
        4 matrices of d x a, where a is the width of all heads, and 2 mlp_ratio of d x d, and scores
        (n + m)^2 pairs; its modulations multiply one vector per example. The last block's text has
        keys and values only. A source as tokens doubles n. In training every product is computed
        three times (itself, and its gradient by either factor), except that the model's inputs need
        no gradient. Recomputation is not counted.
        """
        d, a, m = self.hidden_dim, self.heads_dim, num_tokens
        patch = self.patch_size**2
        outputs = n = height * width // patch
        in_channels = self.in_channels
        if self.source == "tokens":
            n, in_channels = 2 * n, self.out_channels + 1
        token, pairs = (4 * a + 2 * self.mlp_ratio * d) * d, 2 * a
        block = (n + m) * token + pairs * (n + m) ** 2
        last = n * token + 2 * m * d * a + pairs * n * (n + m)
        modulations = 12 * d * d if self.shared_adaln else (12 * (self.depth - 1) + 8) * d * d
        inputs = (n * patch * in_channels + m * self.text_dim + 256 + self.pooled_dim) * d
        # the second maps of the two embeddings, the output's modulation, the output
        ends = 2 * d * d + 2 * d * d + outputs * patch * self.out_channels * d
        inner = (self.depth - 1) * block + last + modulations + ends
        return 2.0 * (3 * inner + 2 * inputs if train else inner + inputs)

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b h w {self.in_channels}"],
        text_emb: Float[Array, "b m {self.text_dim}"],
        pooled_emb: Float[Array, "b {self.pooled_dim}"],
        t: Float[Array, " b"],
        text_mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The predicted velocity at times t in [0, 1].

        Text tokens whose mask is False are not attended to; None attends to all.
        """
        d, p = self.hidden_dim, self.patch_size
        dtypes = dict(dtype=self.dtype, sum_dtype=self.sum_dtype)
        b, height, width, _ = latents.shape
        if height % p or width % p:
            raise UserError(
                f"latents of {height}x{width} are not divisible into patches of {p}x{p}"
            )
        h, w = height // p, width // p
        n = h * w  # tokens that are read out
        if self.source == "tokens":
            latents, h = _one_below_the_other(latents), 2 * h

        patches = latents.reshape(b, h, p, w, p, -1).transpose(0, 1, 3, 2, 4, 5)
        image = Linear(d, **dtypes, name="patch_embed")(patches.reshape(b, h * w, -1))
        if self.position == "sincos":
            table = sincos_table(
                h, w, dim=d, max_size=self.pos_embed_max_size, base_size=self.pos_embed_base_size
            )
            image = image + table[None].astype(self.dtype)
        if sharding.platform() == "tpu":  # once, not in every block: a kernel takes whole rows
            text_emb, text_mask = _padded(text_emb, text_mask)
        attend = functools.partial(
            joint_attention,
            num_heads=self.num_heads,
            grid=(h, w) if self.position == "rope" else None,
            attention=self.attention if callable(self.attention) else ATTENTION[self.attention],
        )
        if self._takes_flash(image, text_emb):
            attend = functools.partial(flash, num_heads=self.num_heads, tokens=h * w)
            image = jnp.pad(image, ((0, 0), (0, whole_blocks(h * w) - h * w), (0, 0)))
        text = Linear(d, **dtypes, name="text_embed")(text_emb)

        small, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        time_embed = MLP(d, d, nn.silu, **dtypes, kernel_init=small, name="time_embed")
        pooled_embed = MLP(d, d, nn.silu, **dtypes, name="pooled_embed")
        cond = nn.silu(time_embed(time_features(t)) + pooled_embed(pooled_emb))
        block_cond = cond
        if self.shared_adaln:
            modulation = Linear(12 * d, **dtypes, kernel_init=zeros, name="shared_modulation")
            block_cond = modulation(cond)

        image = self._run_blocks((image, text), block_cond, text_mask, attend=attend)[:, :n]

        modulation = Linear(2 * d, **dtypes, kernel_init=zeros, name="out_modulation")
        scale, shift = jnp.split(modulation(cond), 2, axis=-1)
        image = modulated_norm(image, scale, shift)
        out_proj = Linear(p * p * self.out_channels, **dtypes, kernel_init=zeros, name="out_proj")
        image = out_proj(image)
        image = image.reshape(b, height // p, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
        return image.reshape(b, height, width, -1)

    @nn.nowrap
    def _takes_flash(self, image: Float[Array, "b n d"], text: Float[Array, "b m e"]) -> bool:
        """Whether attention is the kernel for TPUs, for rows of so many tokens."""
        if self.attention not in ("auto", ATTENTION["auto"]) or self.position != "sincos":
            return False
        sizes = dict(head_dim=self.heads_dim // self.num_heads, num_heads=self.num_heads)
        return sharding.platform() == "tpu" and fits(
            *(len(image), whole_blocks(image.shape[1]), text.shape[1]),
            **sizes,
            itemsize=jnp.dtype(self.dtype).itemsize,
            memory=chip_memory(),
        )

    @nn.nowrap
    def _run_blocks(
        self,
        carry: tuple[Array, Array],
        cond: Float[Array, "b e"],
        text_mask: Bool[Array, "b m"] | None,
        *,
        attend: Callable,
    ) -> Float[Array, "b n d"]:
        """The image stream after all blocks, from both streams (image, text) before them."""
        # The fields of a stream have the same names here.
        names = (field.name for field in dataclasses.fields(StreamBlock))
        options = dict(
            stream={
                name: getattr(self, name)
                for name in names
                if name not in ("final", "parent", "name")
            },
            attend=attend,
        )
        scan = sharding.platform() != "cpu" if self.scan is None else self.scan
        block = JointBlock
        if self.remat != "none" or sharding.is_fsdp():
            # In a scan the loop already separates the recomputation from the forward pass;
            # unrolled, the compiler would merge the two without `prevent_cse`.
            block = nn.remat(JointBlock, prevent_cse=not scan, policy=REMAT[self.remat])
        if self.depth > 1:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.depth - 1,
                unroll=1 if scan else self.depth - 1,
            )
            carry, _ = stack(**options, name="blocks")(carry, cond, text_mask)
        (image, _), _ = block(**options, final=True, name="last_block")(carry, cond, text_mask)
        return image


def _padded(
    text: Float[Array, "b m e"], mask: Bool[Array, "b m"] | None
) -> tuple[Float[Array, "b padded e"], Bool[Array, "b padded"] | None]:
    """Tokens up to a multiple of `SUBLANES`; what is added is not attended to."""
    missing = -text.shape[1] % SUBLANES
    if not missing:
        return text, mask
    mask = jnp.ones(text.shape[:2], bool) if mask is None else mask
    return jnp.pad(text, ((0, 0), (0, missing), (0, 0))), jnp.pad(mask, ((0, 0), (0, missing)))


def _one_below_the_other(latents: Float[Array, "b h w _"]) -> Float[Array, "b 2*h w _"]:
    """[noise, source, mask] along the channels, as a picture [noise, mask] above [source, mask]."""
    c = latents.shape[-1] // 2
    noise, source, mask = jnp.split(latents, [c, 2 * c], axis=-1)
    return jnp.concatenate([jnp.concatenate([x, mask], axis=-1) for x in (noise, source)], axis=1)


def make_mmdit(size: str, **overrides: Any) -> MMDiT:
    """The MM-DiT of a named size, with any of its fields overridden.

    Raises UserError for an unknown size or field, with the nearest name.
    """
    read = fields.read_fields(MMDiT, overrides, "model.overrides")
    return MMDiT(**{**SIZES[check_name(size, SIZES, what="model.size")], **read})
