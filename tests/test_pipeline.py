"""A trained model as one object: every task, any size, lists, options, and what it refuses."""

import dataclasses
import decimal
import doctest
import fractions
import inspect
import io
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import monitoring
from PIL import Image

from data_pipelines.tasks import TASKS
from tests.evaluation.tiny_pipeline import answering, make_pipeline
from univg_jax import Pipeline, Result, images
from univg_jax.errors import NonFiniteError, NotFoundError, UnsupportedError, UserError
from univg_jax.settings import Config

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture(scope="module")
def pipeline(root):
    return Pipeline.load(root / "stage3")


@pytest.fixture(scope="module")
def tiny():
    """A model with random weights of all tasks but id, that was trained in three shapes."""
    pipe = answering(make_pipeline())
    config = pipe.config.to_dict()
    config["tasks"] = {name: config["tasks"]["ie"] for name in TASKS if name != "id"}
    config["data"]["buckets"] = [[16, 16], [16, 32], [32, 16]]
    return dataclasses.replace(pipe, config=Config.of(config), compiled=set())


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 20:40] = 255
    return mask


def pixels(result):
    return np.asarray(result.image)


def test_loading_sets_no_global_mesh(pipeline, picture):
    assert jax.sharding.get_mesh().empty
    pipeline.depth(picture)
    assert jax.sharding.get_mesh().empty


def test_one_method_a_task(pipeline, picture, mask, tmp_path):
    picture.save(tmp_path / "a.png")
    results = [
        pipeline("a pig on grass", size=picture.size),
        pipeline.edit(picture, "remove the pig"),
        pipeline.inpaint(picture, mask, "a pig"),
        pipeline.layout(picture, "a pig (red block) on grass"),
        pipeline.depth(str(tmp_path / "a.png")),
        pipeline.pose(np.asarray(picture)),
        pipeline.segment(tmp_path / "a.png", "the pig"),
        pipeline.identity(picture, "a portrait of <p>", size=picture.size),
    ]
    assert [result.task for result in results] == list(TASKS)
    for result in results:
        assert isinstance(result, Result)
        assert (len(result.images), result.seeds, result.image.mode) == (1, [0], "RGB")
        assert result.image.size == picture.size, "the answer has the picture's own size"
        assert json.loads(json.dumps(result.settings))["steps"] == 2
    answers = {result.task: result.answer for result in results if result.answer is not None}
    assert {task: (a.shape, str(a.dtype)) for task, a in answers.items()} == {
        "depth": ((40, 50), "float32"),
        "pose": ((17, 3), "float32"),
        "seg": ((40, 50), "uint8"),
    }


def test_the_examples_of_the_docstrings_run(pipeline, picture, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("scene.png")
    picture.save("face.png")
    (tmp_path / "runs").symlink_to(root)
    names = {"pipe": pipeline, "np": np, "scene": np.asarray(picture), "Pipeline": Pipeline}
    finder = doctest.DocTestFinder()
    found = [t for c in (Pipeline, Result) for t in finder.find(c, c.__name__, globs=names)]
    shown = {test.name for test in found if test.examples}
    methods = {"__call__", "edit", "inpaint", "outpaint", "layout", "depth", "pose", "segment"}
    methods |= {"identity", "run", "load"}
    assert shown == {"Result", *(f"Pipeline.{name}" for name in methods)}
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert not runner.summarize(verbose=False).failed


def test_paths_pil_and_numpy_are_the_same_input(pipeline, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    given = (picture, np.asarray(picture), tmp_path / "a.png", picture.convert("RGBA"))
    a, *others = (pixels(pipeline.edit(image, "remove it")) for image in given)
    for other in others:
        np.testing.assert_array_equal(a, other)


def test_an_image_does_not_depend_on_its_list(pipeline):
    prompts = ["a pig on grass", "a cat on sand", "a dog"]
    together = pipeline(prompts, seed=5)
    assert (len(together.images), together.seeds) == (3, [5, 6, 7])
    assert together.prompts == prompts
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, seed=5 + i)
        # Float32 in another order may carry a value over the edge between two of the 256 levels.
        assert np.abs(np.asarray(together.images[i]).astype(int) - pixels(alone)).max() <= 1
    many = pipeline("a pig", seed=list(range(11)))
    assert len(many.images) == 11, "more than a batch"
    assert len({image.tobytes() for image in many.images}) == 11
    assert pipeline([]).images == []


def test_inpainting_keeps_the_pixels_outside_the_mask(pipeline, mask):
    image = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    hole = np.zeros((32, 32), np.uint8)
    hole[8:16, 8:16] = 255
    made = pixels(pipeline.inpaint(image, hole))
    np.testing.assert_array_equal(made[hole == 0], image[hole == 0])
    assert (made[hole > 0] != image[hole > 0]).any()


def test_pictures_of_many_shapes_are_one_list(tiny):
    rng = np.random.default_rng(0)
    sizes = [(20, 41), (40, 20), (33, 33), (20, 40), (50, 7), (16, 16)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    told = []
    result = tiny.edit(images, "a cat", seed=3, callback=lambda *done: told.append(done))
    assert [image.size[::-1] for image in result.images] == sizes
    assert told == [(1, 3), (2, 3), (3, 3)], "three shapes of one step each"
    for i, image in enumerate(images):
        alone = pixels(tiny.edit(image, "a cat", seed=3 + i))
        # Another size of batch may carry a value over the edge between two levels, and a cubic
        # resize makes one of it up to two.
        assert np.abs(np.asarray(result.images[i]).astype(int) - alone).max() <= 2


def test_a_size_is_width_and_height(tiny):
    assert tiny("a cat", size=(50, 20)).image.size == (50, 20)
    square = pixels(tiny("a cat"))
    np.testing.assert_array_equal(pixels(tiny("a cat", size=(16, 16))), square)
    assert pixels(tiny("a cat", size=(32, 32))).shape == (32, 32, 3)


def test_what_is_kept_has_its_own_pixels_at_any_size(tiny):
    image = np.random.default_rng(1).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    mask = np.zeros((45, 61), bool)
    mask[10:20, 30:50] = True
    made = pixels(tiny.inpaint(image, mask, "a cat"))
    np.testing.assert_array_equal(made[~mask], image[~mask])
    assert (made[mask] != image[mask]).mean() > 0.5
    wider = tiny.outpaint(image, margins=(3, 0, 9, 5))
    assert wider.task == "ip"
    assert wider.image.size == (3 + 61 + 9, 45 + 5)
    np.testing.assert_array_equal(pixels(wider)[:45, 3:64], image)
    several = tiny.outpaint([image, image[:20]], ["a", "b"], aspect="1:1")
    assert [made.size for made in several.images] == [(61, 61), (61, 61)]


def test_the_settings_of_a_result_make_it_again(tiny):
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    options = dict(
        guidance=3.0, image_guidance=2.0, steps=2, solver="heun", negative_prompt="many dogs"
    )
    made = tiny.edit(image, "a cat", seed=9, **options)
    again = {name: made.settings[name] for name in options}
    assert again == options
    repeated = tiny.run(made.task, image=image, prompt=made.prompts[0], seed=made.seeds, **again)
    np.testing.assert_array_equal(pixels(repeated), pixels(made))
    for name in options:
        other = tiny.edit(image, "a cat", seed=9, **{k: v for k, v in options.items() if k != name})
        assert (pixels(other) != pixels(made)).any(), name
    assert tiny.config.sampling.steps == 1, "a call changes nothing of the pipeline"


def test_a_negative_prompt_stands_where_no_text_did(tiny):
    """v = s F(c) + (1 - s) F(negative), which is F(c) where both are the same."""
    image = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain = pixels(tiny.edit(image, "a cat", guidance=1.0, image_guidance=1.0))
    same = pixels(tiny.edit(image, "a cat", guidance=9, image_guidance=1, negative_prompt="a cat"))
    assert np.abs(plain.astype(int) - same).max() <= 1  # float32 in another order
    none = pixels(tiny.edit(image, "a cat", guidance=9, image_guidance=1))
    assert np.abs(plain.astype(int) - none).max() > 1
    negatives = ["", "a cat"]
    both = tiny.edit(
        image, "a cat", seed=[0, 0], guidance=9, image_guidance=1, negative_prompt=negatives
    )
    for image, alone in zip(both.images, (none, same)):
        assert np.abs(np.asarray(image).astype(int) - alone).max() <= 1


def test_what_a_callback_raises_ends_the_call(tiny):
    def stop(step, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny("a cat", callback=stop)


def test_only_what_the_tasks_need_is_read(pipeline, root, picture):
    some = Pipeline.load(root / "stage3", tasks=["text-to-image", "depth"])
    assert pipeline.frozen.keys() - some.frozen.keys() == {"identity"}
    assert some.tasks == tuple(task for task in TASKS if task != "id")
    np.testing.assert_array_equal(pixels(some("a pig", seed=3)), pixels(pipeline("a pig", seed=3)))
    with pytest.raises(UnsupportedError, match=r"unknown task of .*: 'id' \(known: t2i, ie"):
        some.identity(picture, "a portrait of <p>")
    with pytest.raises(UnsupportedError, match="'depth'"):
        Pipeline.load(root / "stage1", tasks=["depth"])
    with pytest.raises(UserError, match="unknown task 'dept'; did you mean 'depth'"):
        Pipeline.load(root / "stage3", tasks=["dept"])


def test_progress_is_told_and_compiles_nothing_anew(pipeline):
    compiled = []

    def note(event, _, *, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    first, second = [], []
    silent = pixels(pipeline("a pig"))
    heard = pixels(pipeline("a pig", callback=lambda *done: first.append(done)))
    monitoring.register_event_duration_secs_listener(note)
    try:
        pipeline("a cat", callback=lambda *done: second.append(done))
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert first == second == [(1, 2), (2, 2)]
    assert "jit(generate)" not in compiled
    assert np.abs(silent.astype(int) - heard).max() <= 1


def test_compiling_is_said_once_and_leaves_nothing_to_compile(pipeline, caplog):
    caplog.set_level("INFO", logger="absl")
    fresh = dataclasses.replace(pipeline, compiled=set())
    for callback in (None, lambda step, total: None):
        caplog.clear()
        fresh("a pig", callback=callback)
        began, ended = (r.getMessage() for r in caplog.records if "compiling" in r.getMessage())
        assert began.endswith("...")
        assert re.search(r"took \d+\.\d s$", ended)
        fresh("a cat", callback=callback)
        assert sum("compiling" in r.getMessage() for r in caplog.records) == 2


def test_steps_and_parameters_are_chosen_at_loading(root):
    newest = Pipeline.load(root / "stage3")
    assert (newest.step, newest.config.sampling.steps) == (2, 2)
    first = Pipeline.load(root / "stage3", step=1, sampling={"steps": 3}, ema=False)
    assert (first.step, first.config.sampling.steps) == (1, 3)
    assert first.generator.sampler.steps == 3
    same = Pipeline.load(root / "stage3" / "checkpoints" / "1", sampling={"steps": 3}, ema=False)
    np.testing.assert_array_equal(pixels(first("a")), pixels(same("a")))


def test_an_untrained_model_is_the_same_but_for_its_parameters(pipeline):
    untrained = pipeline.untrained(seed=0)
    shapes = lambda p: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), p.params)  # noqa: E731
    assert shapes(untrained) == shapes(pipeline)
    assert untrained("a pig").image.size == (32, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, _: p(" "), "task 't2i' needs a prompt"),
        (lambda p, _: p.run("dept"), "unknown task 'dept'; did you mean 'depth'?"),
        (lambda p, i: p.identity(i, "a portrait"), "has no <p>"),
        (lambda p, i: p.run("t2i", prompt="a", image=i), "takes no image"),
        (lambda p, i: p.inpaint(i, np.zeros((40, 50), np.uint8)), "no white pixel"),
        (lambda p, i: p.inpaint(i, np.eye(30) > 0), "the mask has 30x30 pixels and the image 50x4"),
        (lambda p, i: p.inpaint(i, i), "mask is no mask: "),
        (lambda p, _: p.depth("/"), "image=/ is a folder; expected a picture"),
        (
            lambda p, i: p.run("depth", image=i, prompt="a pig " * 9999),
            "takes no prompt, but has 'a",
        ),
        (lambda p, _: p.depth("nowhere.png"), "image=nowhere.png does not exist"),
        (lambda p, _: p.depth(np.zeros((4, 4, 3))), "image is float64 [4, 4, 3], expected uint8"),
        (lambda p, _: p.depth(__file__), "is not a readable image"),
        (lambda p, _: p(["a", "b"], seed=[1]), "lists of different lengths"),
        (lambda p, _: p("a", seed=-1), "seed=-1: expected a whole number >= 0"),
        (lambda p, _: p(["a", "b"], seed=2**32 - 1), "seed=4294967296: expected a whole number"),
        (lambda p, _: p("a", steps=0), "steps=0: expected a whole number >= 1"),
        (lambda p, _: p("a", size=(9, 0)), "size=0: expected a whole number >= 1"),
        (lambda p, i: p.depth(i, guidance=2.0), "task 'depth' takes no guidance"),
        (lambda p, i: p.edit(i, "a", size=(8, 8)), "takes no size: its answer has that of the im"),
        (lambda p, i: p.outpaint(i), "needs a mask, or margins, aspect or size"),
        (lambda p, i: p.layout(i, "a", boxes=[("a", (0, 0, 1, 1))]), "boxes and a canvas"),
        (lambda p, _: p("a pig \ud800"), "prompt='a pig \\ud800': '\\ud800' is no character"),
        (lambda p, _: p("a", guidance=2, negative_prompt="\udc00"), "negative_prompt='\\udc00': "),
        (lambda p, _: p([]).image, "nothing was made: a list that was given is empty"),
        (lambda p, _: p.depth([]).answer, "nothing was made: a list that was given is empty"),
        (lambda p, _: p.depth("http://x/y.png"), "is an address: expected a local path or gs://"),
        (lambda p, _: p.depth(np.zeros((0, 4, 3), np.uint8)), "image has 4 x 0 pixels: expected"),
        (lambda p, i: p.inpaint(i, Image.new("L", (0, 9))), "mask has 0 x 9 pixels: expected"),
    ],
)
def test_what_cannot_be_is_one_line(pipeline, picture, call, message):
    with pytest.raises(UserError) as error:
        call(pipeline, picture)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_bad_arguments_of_load(root, tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="no step 7"):
        Pipeline.load(root / "stage1", step=7)
    with pytest.raises(UserError, match="did you mean 'steps'"):
        Pipeline.load(root / "stage1", sampling={"step": 4})
    with pytest.raises(UnsupportedError, match="unknown task of"):
        Pipeline.load(root / "stage1").depth(np.zeros((4, 4, 3), np.uint8))


def test_a_picture_that_is_not_finite_is_named_by_its_seed(pipeline):
    """As an encoder's or a VAE's products in float16 would make it."""
    scale = pipeline.frozen["codec"]["scale"]
    frozen = {**pipeline.frozen, "codec": {**pipeline.frozen["codec"], "scale": scale * jnp.inf}}
    broken = dataclasses.replace(pipeline, frozen=frozen)
    with pytest.raises(
        NonFiniteError, match=r"^t2i: the picture of seed 5, sample 0 is not finite"
    ):
        broken("a pig on grass", seed=5)


def closed():
    """A picture whose file can be read no more."""
    image = Image.open(io.BytesIO(images.png_bytes(np.zeros((4, 4, 3), np.uint8))))
    image.close()
    return image


# What nobody should give, and somebody does; some of it is right for some arguments.
STRANGE = {
    **{repr(x): x for x in (None, True, -1, 0, 5, 10**400, 1.5, math.nan, math.inf, b"x", 1j)},
    **{repr(x): x for x in ("", " ", "a pig", "\ud800", "a\0b", "nowhere.png", "~nobody/x")},
    **{repr(x): x for x in ("http://x/y.png", "s3://b/x.png", "://", "gs:/x", "." * 300)},
    **{repr(x): x for x in ([], [[]], (), ("a", "b"), [None], [b"x"], ["\udc00"], [5, "a"])},
    **{repr(x): x for x in ({}, {"a": 1}, set(), pathlib.Path("nowhere"), object, len)},
    "an object": object(),
    **{repr(x): x for x in ((1, 2), (0, 0), (1, 2, 3, 4), [("a", (0, 0, 1, 1))], [("a", ())])},
    **{repr(x): x for x in (decimal.Decimal(1), fractions.Fraction(1, 3))},
    **{
        f"array {dtype} {shape}": np.zeros(shape, dtype)
        for dtype in ("uint8", "float32", "bool", "object", "datetime64[s]", "U1")
        for shape in ((), (0,), (3,), (0, 0), (0, 4, 3), (4, 0), (4, 4), (4, 4, 3), (4, 4, 5))
    },
    **{
        f"{mode} {size}": Image.new(mode, size)
        for mode in (*Image.MODES, "La", "RGBa", "I;16", "I;16B", "PA", "LAB")
        for size in ((0, 4), (4, 0), (4, 5))
    },
    "closed": closed(),
}
PICTURE = np.full((8, 8, 3), 7, np.uint8)
RIGHT = {
    "t2i": dict(prompt="a pig"),
    "ie": dict(image=PICTURE, prompt="a pig"),
    "ip": dict(image=PICTURE, mask=np.eye(8, dtype=np.uint8) * 255, prompt="a pig"),
    "outpaint": dict(task="ip", image=PICTURE, margins=2),
    "lg": dict(prompt="a pig", boxes=[("a pig", (0, 0, 1, 1))]),
    "depth": dict(image=PICTURE),
    "seg": dict(image=PICTURE, prompt="the pig"),
}
ARGUMENTS = [name for name in inspect.signature(Pipeline.run).parameters if name != "self"]


@pytest.fixture
def unsampled(tiny):
    """The tiny model, but for its sampling; no annotation is checked, as with a user."""
    blank = lambda self, batch, *_, **__: np.zeros(np.shape(batch.target), np.uint8)  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pipeline, "generate_batch", blank)
        jaxtyping.config.update("jaxtyping_disable", True)
        yield tiny
        jaxtyping.config.update("jaxtyping_disable", False)


def tell(call):
    """Whether a call works; what it raises must be one line for the user."""
    try:
        made = call()
        assert all(min(image.size) > 0 for image in [*made.images, made.image])
    except UserError as error:
        message = str(error)
        assert message
        assert message.isprintable() or "\ud800" in message or "\udc00" in message
        return False
    return True


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_whatever_is_given_is_made_or_refused_in_one_line(unsampled, argument):
    """Each argument of each task, by itself."""
    for task, right in RIGHT.items():
        assert tell(lambda: unsampled.run(**{"task": task} | right))  # noqa: B023
        for value in STRANGE.values():
            tell(lambda: unsampled.run(**{"task": task} | right | {argument: value}))  # noqa: B023


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    right=st.sampled_from(sorted(RIGHT)),
    names=st.dictionaries(st.sampled_from(ARGUMENTS), st.sampled_from(sorted(STRANGE))),
)
def test_so_are_several_at_once(unsampled, right, names):
    strange = {argument: STRANGE[name] for argument, name in names.items()}
    tell(lambda: unsampled.run(**{"task": right} | RIGHT[right] | strange))


@pytest.mark.parametrize("path", STRANGE.values(), ids=STRANGE)
def test_what_is_no_run_is_one_line(unsampled, path):
    with pytest.raises(UserError) as error:
        Pipeline.load(path)
    assert str(error.value)
