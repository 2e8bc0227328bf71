"""Programs of a model, exported and called, against the sampler that they were made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from data_pipelines.collate import Collator
from data_pipelines.examples import blank_hole
from data_pipelines.tasks import Example
from data_pipelines.tokenizer import load_tokenizer
from tests.helpers import prepare_encoders, unused
from tests.sd3_folder import write_image_encoder, write_sd3
from univg_jax.batch import BatchShape
from univg_jax.export.programs import Placeholders, make_programs
from univg_jax.flow import sample_noise
from univg_jax.images import to_uint8
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.univg import UniVG
from univg_jax.sampling import NULL_CONDITIONS, Generator, guidance_weights, solver_times
from univg_jax.settings import Guidance, Sampler
from univg_jax.trees import named_leaves

pytestmark = pytest.mark.xdist_group("stablehlo")

HEIGHT, WIDTH, TOKENS = 16, 24, 77 + 12
SHAPE = BatchShape(height=HEIGHT, width=WIDTH, num_tokens=TOKENS, face=20)
SIZE = f"{HEIGHT}x{WIDTH}"
# The program is the same arithmetic, compiled again: float32 sums in another order may carry a
# value over the edge between two of the 256 levels.
TOLERANCE = 1


@dataclasses.dataclass(kw_only=True)
class Made:
    """A model with parameters that are all at work, and its programs."""

    generator: Generator
    params: dict
    frozen: dict
    collator: Collator
    programs: dict

    @property
    def weights(self):
        return named_leaves({"model": self.params, **self.frozen})

    @functools.cached_property
    def read(self):
        """A program by its name, as it is after it went through bytes."""

        @functools.cache
        def read(name):
            program = self.programs[name]
            function = export.export(jax.jit(program.function), platforms=["cpu"])
            return export.deserialize(function(*program.abstract()).serialize())

        return read

    def call(self, name, **inputs):
        """The outputs of a program."""
        program = self.programs[name]
        weights = {k: x for k, x in self.weights.items() if k in program.weights}
        defaults = {k: i.default for k, i in program.inputs.items() if i.default is not None}
        rows = len(next(iter(inputs.values())))
        given = {
            k: np.broadcast_to(
                np.asarray((defaults | inputs)[k], i.dtype),
                np.shape(inputs[k]) if k in inputs else (rows, *i.shape[1:]),
            )
            for k, i in program.inputs.items()
        }
        return self.read(name).call(weights, given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")
    write_image_encoder(folder / "image_encoder")
    config = dict(text=dict(kind="sd3"), codec=dict(kind="vae"), identity=dict(kind="clip"))
    found = prepare_encoders(
        dict(config, folder=str(folder)),
        tmp_path_factory.mktemp("run"),
        images=unused,
        portraits=unused,
    )
    c = found.conditioner
    backbone = make_mmdit(
        "tiny",
        hidden_dim=32,
        depth=3,
        num_heads=2,
        in_channels=9,
        out_channels=4,
        text_dim=c.text_dim,
        pooled_dim=c.pooled_dim,
    )
    model = UniVG(backbone=backbone, face_dim=c.face_dim)
    params = model.init_params(jax.random.key(0), *c.encoded_spec(found.frozen, SHAPE.spec(1)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, noisy)
    tokenizer = load_tokenizer(str(folder))
    parts = tokenizer.parts(TOKENS).values()
    generator = Generator(
        model=model, conditioner=c, sampler=Sampler(solver="heun", steps=3, shift=3.0)
    )
    frozen = dict(found.frozen)
    weights = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in named_leaves({"model": params, **frozen}).items()
    }
    programs = make_programs(
        generator,
        weights,
        shapes=[SHAPE],
        placeholders=Placeholders(
            placeholder=np.array([p.placeholder for p, n in parts for _ in range(n)], np.int32),
            stand_in=np.array([p.stand_in for p, n in parts for _ in range(n)], np.int32),
        ),
    )
    return Made(
        generator=generator,
        params=params,
        frozen=frozen,
        collator=Collator(tokenizer=tokenizer, shape=SHAPE),
        programs=programs,
    )


@pytest.fixture(scope="module")
def batch(made):
    """A row of each sort of inputs: none, a picture, a picture with a mask, a face."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    face = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    mask = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    mask[4:12, 8:20] = 1
    blank = np.zeros_like(picture)
    examples = {
        "t2i": Example(target=blank, text="a cat"),
        "ie": Example(target=blank, source=picture, text="at it"),
        "ip": Example(target=blank, source=blank_hole(picture, mask), mask=mask, text="so"),
        "id": Example(target=blank, face=face, text="a <p> at it"),
    }
    rows = [made.collator.row(e, task=task, sample_id=0) for task, e in examples.items()]
    return made.collator(rows)


def read_tokens(made, batch):
    """The tokens of a batch as the tokenizers' own files have them, where `<p>` has its id."""
    parts = made.collator.tokenizer.parts(TOKENS).values()
    placeholder = np.array([part.placeholder for part, n in parts for _ in range(n)], np.int32)
    return np.where(batch.identity_slot, placeholder[None], batch.tokens)


def sampler_inputs(made, batch, *, passes, rows=slice(None)):
    null = made.collator.drop_conditions(batch, "text")
    inputs = dict(
        tokens=read_tokens(made, batch),
        text_mask=batch.text_mask,
        seeds=np.arange(7, 7 + batch.size, dtype=np.uint32),
        source=batch.source,
        has_source=batch.has_source,
        mask=batch.mask,
        has_mask=(batch.mask == 0).any((1, 2, 3)),
        face=batch.face,
        has_face=batch.has_face,
    )
    if passes > 1:
        inputs |= dict(null_tokens=null.tokens, null_text_mask=null.text_mask)
    return {name: value[rows] for name, value in inputs.items()}


SCALES = {
    "sample_none": Guidance(),
    "sample_text": Guidance(text=3.0),
    "sample_text_image": Guidance(text=3.0, image=1.5),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_sampler_makes_the_generators_pictures(made, batch, name):
    weights = guidance_weights(SCALES[name])
    inputs = sampler_inputs(made, batch, passes=len(weights))
    passes = [made.collator.drop_conditions(batch, d) for d in NULL_CONDITIONS[: len(weights)]]
    expected = made.generator(
        made.params, made.frozen, passes, weights=weights, seeds=jnp.asarray(inputs["seeds"])
    )
    expected = np.where(batch.mask == 0, batch.source, to_uint8(expected))
    times = np.asarray(solver_times(made.generator.sampler))
    options = dict(guidance_weights=np.array(weights), times=times)
    found = made.call(f"{SIZE}/{name}", **inputs, **options)
    assert found["finite"].all()
    difference = np.abs(np.asarray(found["images"]).astype(int) - expected)
    assert difference.max() <= TOLERANCE
    # The same program, of another number of rows.
    inputs = sampler_inputs(made, batch, passes=len(weights), rows=slice(2, 4))
    some = made.call(f"{SIZE}/{name}", **inputs, **options)
    assert np.abs(np.asarray(some["images"]).astype(int) - expected[2:4]).max() <= TOLERANCE
    assert expected.std() > 20, "pictures of one color would always be equal"


def test_the_parts_make_the_whole(made, batch):
    """A step from noise to data by `text`, `encode`, `identity`, `step` and `decode`."""
    inputs = sampler_inputs(made, batch, passes=1)
    # Heun's step needs the velocity at both ends.
    whole = made.call(
        f"{SIZE}/sample_none", **inputs, guidance_weights=np.ones(1), times=np.array([1.0, 0.0])
    )
    conditions = made.call("text", tokens=inputs["tokens"], text_mask=batch.text_mask)
    np.testing.assert_array_equal(conditions["identity_slot"], batch.identity_slot)
    latents = made.call(f"{SIZE}/encode", images=batch.source)["latents"]
    faces = made.call("identity", face=batch.face)["face_emb"]
    h, w = latents.shape[1:3]
    cells = batch.mask.reshape(batch.size, h, HEIGHT // h, w, WIDTH // w, 1).max((2, 4))
    conditions |= dict(
        cond_latents=latents * batch.has_source[:, None, None, None],
        mask=cells,
        face_emb=faces * batch.has_face[:, None],
    )

    def velocity(x, t):
        t = np.full(batch.size, t, np.float32)
        return made.call(f"{SIZE}/step", x_t=x, t=t, **conditions)["velocity"]

    keys = [jax.random.key(seed) for seed in inputs["seeds"]]
    noise = jnp.concatenate([sample_noise(k, jnp.zeros(1, jnp.uint32), (h, w, 4)) for k in keys])
    first = velocity(noise, 1.0)
    x0 = noise - (first + velocity(noise - first, 0.0)) / 2
    images = np.asarray(made.call(f"{SIZE}/decode", latents=x0)["images"])
    images = np.where(batch.mask == 0, batch.source, images)
    assert np.abs(images.astype(int) - np.asarray(whole["images"])).max() <= TOLERANCE


def test_what_is_no_number_is_said_of_its_row(made):
    latents = np.zeros((3, 4, 6, 4), np.float32)
    latents[1, 2, 2, 0] = np.nan
    found = made.call(f"{SIZE}/decode", latents=latents)
    assert found["finite"].tolist() == [True, False, True]


def test_parameters_in_bfloat16_are_numbers_in_float32(made, batch):
    """Where the model computes in float32, rounding is the only difference."""
    program = made.programs[f"{SIZE}/step"]
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.normal(size=(2, *i.shape[1:])).astype(np.float32).astype(i.dtype)
        for name, i in program.inputs.items()
    }
    short = {k: x.astype(jnp.bfloat16) for k, x in made.weights.items() if k in program.weights}
    back = {k: x.astype(jnp.float32) for k, x in short.items()}
    a, b = (jax.jit(program.function)(weights, inputs)["velocity"] for weights in (short, back))
    np.testing.assert_allclose(a, b, atol=1e-5)  # compiled anew: float32 sums in another order
