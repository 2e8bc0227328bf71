"""A model as programs: pure functions of weights and named inputs, for `jax.export`.

| program | inputs -> outputs |
|---|---|
| text | tokens -> conditions of the model |
| identity | portraits -> embeddings of faces; where the model has an identity encoder |
| SIZE/encode | pictures -> latents |
| SIZE/decode | latents -> pictures |
| SIZE/step | noisy latents, time, conditions -> velocity: the MM-DiT once |
| SIZE/SAMPLER | tokens, pictures, seeds -> pictures: all of it |

SIZE is HEIGHTxWIDTH in pixels, SAMPLER one of SAMPLERS, by the kind of guidance. Weights and inputs
are flat dicts, so that whoever calls a program needs none of our classes. The number of rows is
symbolic, and so is that of the solver's steps. A program runs on one device.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Int32, PyTree

from data_pipelines.renderings import GRAY
from univg_jax.batch import Batch, BatchShape, Conditions
from univg_jax.models.attention import portable
from univg_jax.sampling import NULL_CONDITIONS, Generator, solve
from univg_jax.trees import nest

Values = Mapping[str, Any]
Weights = Mapping[str, jax.ShapeDtypeStruct]  # by role and name: model/blocks/..., codec/...
MODEL = "model"  # the role of the trained parameters; the encoders have those of the config
# The samplers by the number of their passes.
SAMPLERS = {1: "sample_none", 2: "sample_text", 3: "sample_text_image"}
# The sizes that may differ from call to call; the solver makes s steps.
ROWS, TIMES = "b", "s + 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One input. A size in `shape` is a number, or the name of one that may differ (ROWS, TIMES).

    `default` stands in all its elements where the input is not given; None: it must be.
    """

    shape: tuple[int | str, ...]
    dtype: np.dtype
    about: str
    default: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """`function(weights, inputs)`, of flat dicts, returns a flat dict."""

    function: Callable[[Values, Values], dict[str, Array]]
    weights: Weights
    inputs: Mapping[str, Input]

    def abstract(self) -> tuple[Weights, dict[str, jax.ShapeDtypeStruct]]:
        """The arguments' shapes, for `jax.export`."""
        scope = export.SymbolicScope()

        def spec(given: Input) -> jax.ShapeDtypeStruct:
            text = ", ".join(map(str, given.shape))
            shape = export.symbolic_shape(text, scope=scope) if given.shape else ()
            return jax.ShapeDtypeStruct(shape, given.dtype)

        return dict(self.weights), {name: spec(given) for name, given in self.inputs.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placeholders:
    """At each position of a row of tokens the id of `<p>`, and the id that is read in its place.

    The first is -1 where a model takes no faces.
    """

    placeholder: Int32[np.ndarray, " m"]
    stand_in: Int32[np.ndarray, " m"]

    def read(self, tokens: Int32[Array, "b m"]) -> tuple[Int32[Array, "b m"], Bool[Array, "b m"]]:
        """The tokens as the encoder reads them, and where a face's embedding belongs."""
        slot = tokens == self.placeholder[None]
        return jnp.where(slot, self.stand_in[None], tokens), slot


def make_programs(
    generator: Generator,
    weights: Weights,
    *,
    shapes: Sequence[BatchShape],
    placeholders: Placeholders,
) -> dict[str, Program]:
    """All programs of a model, by name, for pictures of these shapes.

    `weights` are those of all roles. Parameters of another dtype than float32 are computed with as
    float32 ones of the same value.
    """
    backbone = generator.model.backbone.clone(attention=portable, remat="none", scan=True)
    model = generator.model.clone(backbone=backbone)
    programs = _Programs(
        generator=dataclasses.replace(generator, model=model),
        weights=weights,
        placeholders=placeholders,
        shape=shapes[0],
    )
    made = {"text": programs.text()}
    if generator.conditioner.identity is not None:
        made["identity"] = programs.identity()
    for shape in shapes:
        at_size = dataclasses.replace(programs, shape=shape)
        size = f"{shape.height}x{shape.width}"
        made[f"{size}/encode"], made[f"{size}/decode"] = at_size.encode(), at_size.decode()
        made[f"{size}/step"] = at_size.step()
        for passes, name in SAMPLERS.items():
            made[f"{size}/{name}"] = at_size.sample(passes)
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Programs:
    """The programs of one size of pictures."""

    generator: Generator
    weights: Weights
    placeholders: Placeholders
    shape: BatchShape

    def text(self) -> Program:
        def function(weights: Values, inputs: Values) -> dict[str, Array]:
            tokens, slot = self.placeholders.read(inputs["tokens"])
            frozen = _trees(weights)
            text = self.generator.conditioner.embed_text(frozen, tokens, inputs["text_mask"])
            made = {"text_emb": text.emb, "text_mask": text.mask, "pooled_emb": text.pooled}
            return made | ({} if self._face_dim is None else {"identity_slot": slot})

        return self._program(function, ["text"], self._tokens())

    def identity(self) -> Program:
        def function(weights: Values, inputs: Values) -> dict[str, Array]:
            identify = self.generator.conditioner.identify
            return {"face_emb": identify(_trees(weights), inputs["face"])}

        face = dataclasses.replace(self._face(), default=None)
        return self._program(function, ["identity"], {"face": face})

    def encode(self) -> Program:
        def function(weights: Values, inputs: Values) -> dict[str, Array]:
            encode = self.generator.conditioner.encode
            return {"latents": encode(_trees(weights), inputs["images"])}

        images = _input(self._picture, np.uint8, "RGB, 0 to 255")
        return self._program(function, ["codec"], {"images": images})

    def decode(self) -> Program:
        def function(weights: Values, inputs: Values) -> dict[str, Array]:
            return _pixels(self.generator.decode(_trees(weights), inputs["latents"]))

        latents = _input(self._latent, np.float32, "of about unit variance")
        return self._program(function, ["codec"], {"latents": latents})

    def step(self) -> Program:
        """The MM-DiT once."""
        conditions = self._conditions()

        def function(weights: Values, inputs: Values) -> dict[str, Array]:
            given = {name: inputs[name] for name in conditions}
            if self._face_dim is None:
                tokens = inputs["text_mask"]
                given["face_emb"] = jnp.zeros((tokens.shape[0], 0))
                given["identity_slot"] = jnp.zeros(tokens.shape, bool)
            model, params = self.generator.model, _params(_trees(weights))
            velocity = model.apply(
                {"params": params}, inputs["x_t"], inputs["t"], Conditions(**given)
            )
            return {"velocity": velocity.astype(jnp.float32)}

        noisy = {
            "x_t": _input(self._latent, np.float32, "noisy latents"),
            "t": _input((ROWS,), np.float32, "times: 0 is data, 1 is noise"),
        }
        return self._program(function, [MODEL], noisy | conditions)

    def sample(self, passes: int) -> Program:
        """The whole sampler with so many passes of guidance."""

        def function(weights: Values, inputs: Values) -> dict[str, Array]:
            trees = _trees(weights)
            params, frozen = _params(trees), trees
            batch = self._batch(inputs)
            batches = [batch, *(self._drop(batch, inputs, d) for d in NULL_CONDITIONS[1:passes])]
            generator = self.generator
            noise, conditions = generator.begin(frozen, tuple(batches), inputs["seeds"])
            v = generator.velocity(params, conditions, inputs["guidance_weights"])
            x0 = solve(v, noise, generator.sampler, times=inputs["times"])
            made = _pixels(generator.decode(frozen, x0))
            is_kept = inputs["has_mask"][:, None, None, None] & (inputs["mask"] == 0)
            return made | {"images": jnp.where(is_kept, inputs["source"], made["images"])}

        return self._program(function, self._roles, self._sampler_inputs(passes))

    def _batch(self, inputs: Values) -> Batch:
        """What the inputs of a sampler say, as its batch."""
        tokens, slot = self.placeholders.read(inputs["tokens"])
        b, source = tokens.shape[0], inputs["source"]
        has_mask = inputs["has_mask"][:, None, None, None]
        mask = jnp.where(has_mask, inputs["mask"], 1)
        face = self.shape.face
        has_face = inputs.get("has_face", jnp.zeros(b, bool))
        return Batch(
            target=jnp.zeros(source.shape, jnp.uint8),
            source=jnp.where(has_mask & (mask > 0), jnp.uint8(GRAY), source),
            mask=mask,
            loss_mask=jnp.ones(mask.shape, jnp.uint8),
            tokens=tokens,
            text_mask=inputs["text_mask"],
            identity_slot=slot & has_face[:, None],
            face=inputs.get("face", jnp.zeros((b, face, face, 3), jnp.uint8)),
            has_source=inputs["has_source"],
            has_face=has_face,
            task=jnp.zeros(b, jnp.int32),
            sample_id=jnp.zeros(b, jnp.uint32),
            valid=jnp.ones(b, bool),
        )

    def _drop(self, batch: Batch, inputs: Values, drop: str) -> Batch:
        """`Collator.drop_conditions` of all rows, with the text that is given instead."""
        withheld = dict(
            tokens=inputs["null_tokens"],
            text_mask=inputs["null_text_mask"],
            identity_slot=jnp.zeros_like(batch.identity_slot),
            face=jnp.zeros_like(batch.face),
            has_face=jnp.zeros_like(batch.has_face),
        )
        if drop == "both":
            withheld |= dict(
                source=jnp.zeros_like(batch.source),
                mask=jnp.ones_like(batch.mask),
                has_source=jnp.zeros_like(batch.has_source),
            )
        return dataclasses.replace(batch, **withheld)

    def _sampler_inputs(self, passes: int) -> dict[str, Input]:
        h, w, _ = self._picture[1:]
        null = "what a pass without its text reads: the task's tag alone, or a negative prompt"
        made = {
            **self._tokens(),
            "seeds": _input((ROWS,), np.uint32, "of the noise"),
            "source": _input(self._picture, np.uint8, "the picture to change or to read, RGB", 0),
            "has_source": _input((ROWS,), bool, "whether a row has a source", 0),
            "mask": _input((ROWS, h, w, 1), np.uint8, "1 = generate, 0 = keep", 1),
            "has_mask": _input((ROWS,), bool, "whether a row has a mask", 0),
            "times": _input((TIMES,), np.float32, "of the solver, from 1 down to 0"),
            "guidance_weights": _input((passes,), np.float32, "of the passes, 1 in all"),
        }
        if passes > 1:
            made |= {
                f"null_{name}": dataclasses.replace(given, about=null)
                for name, given in self._tokens().items()
            }
        if self._face_dim is not None:
            made["face"] = self._face()
            made["has_face"] = _input((ROWS,), bool, "whether a row has a face", 0)
        return made

    def _tokens(self) -> dict[str, Input]:
        m = self.shape.num_tokens
        return {
            "tokens": _input((ROWS, m), np.int32, "ids of the prompt with its task's tag"),
            "text_mask": _input((ROWS, m), bool, "True = a token, False = padding"),
        }

    def _face(self) -> Input:
        side = self.shape.face
        return _input((ROWS, side, side, 3), np.uint8, "a portrait, RGB", 0)

    def _conditions(self) -> dict[str, Input]:
        """What `text`, `identity` and `encode` give, as inputs of a step."""
        conditioner = self.generator.conditioner
        spec, frozen = self.shape.spec(1), _trees(self.weights)
        encoded = conditioner.encoded_spec(frozen, spec)[1]
        about = {
            "cond_latents": ("of the source; 0: no source", 0),
            "mask": ("of latent cells: 1 = generate, 0 = keep", 1),
            "text_emb": ("of `text`", None),
            "text_mask": ("of `text`", None),
            "pooled_emb": ("of `text`", None),
            "face_emb": ("of `identity`; 0: no face", 0),
            "identity_slot": ("of `text`", 0),
        }
        return {
            name: _input((ROWS, *leaf.shape[1:]), leaf.dtype, *about[name])
            for name, leaf in vars(encoded).items()
            if self._face_dim is not None or name not in ("face_emb", "identity_slot")
        }

    def _program(
        self,
        function: Callable[[Values, Values], dict[str, Array]],
        roles: Sequence[str],
        inputs: Mapping[str, Input],
    ) -> Program:
        """A program with the weights of these roles."""
        weights = {k: x for k, x in self.weights.items() if k.split("/")[0] in roles}
        return Program(function=function, weights=weights, inputs=inputs)

    @property
    def _roles(self) -> list[str]:
        return list(_trees(self.weights))

    @property
    def _face_dim(self) -> int | None:
        return self.generator.conditioner.face_dim

    @property
    def _picture(self) -> tuple[int | str, ...]:
        return (ROWS, self.shape.height, self.shape.width, 3)

    @property
    def _latent(self) -> tuple[int | str, ...]:
        conditioner = self.generator.conditioner
        cell = conditioner.downsampling
        height, width = self.shape.height // cell, self.shape.width // cell
        return (ROWS, height, width, conditioner.latent_channels)


def _input(
    shape: tuple[int | str, ...], dtype: Any, about: str, default: int | None = None
) -> Input:
    return Input(shape=shape, dtype=np.dtype(dtype), about=about, default=default)


def _trees(weights: Values) -> dict[str, PyTree]:
    """The parameters of each role, nested."""
    return nest(weights)


def _params(trees: Mapping[str, PyTree]) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), trees[MODEL])


def _pixels(images: Float[Array, "b h w 3"]) -> dict[str, Array]:
    """Pictures as bytes, as `images.to_uint8` makes them; `finite`: rows that mean something."""
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    levels = jnp.rint((jnp.nan_to_num(images) + 1) * 127.5)
    return {"images": levels.astype(jnp.uint8), "finite": finite}
