"""Stage I: text-to-image from scratch (UniVG, training stages)."""

from ml_collections import ConfigDict

from experiments import base, pods
from univg_jax import buckets as shapes
from univg_jax.errors import UserError

# Batch 512 for 400K steps are the paper's; learning rate and the rest are base.py's, our choice.
ENCODERS = ("embedded", "sd3")


def get_config(
    *,
    size: str = "xl",
    res: int = 256,
    encoders: str = "embedded",
    data: str = "embedded",
    folder: str = "",
    pod: str = "",
    buckets: bool = False,
) -> ConfigDict:
    """size: a named size of the MM-DiT. res: pixels a side; above 256 times shift by the square
    root of the pixels. buckets: train in the standard shapes of that area (`univg_jax.buckets`),
    not in squares alone.

    encoders: `embedded` (MiniLM and a linear codec: nothing to download), or `sd3` (Stable
    Diffusion 3's three text encoders and VAE, from the pipeline's folder `conditioning.folder`).
    data: `embedded` (drawings that are built on demand) or `recipe` (the paper's datasets, each
    built into `data.dir` by `univg data build`).
    folder: pictures of one's own with captions, instead of `data`.
    pod: a name of `pods.TOPOLOGIES`, whose memory is then used as recommended; without one, what
    fits most.
    """
    if encoders not in ENCODERS:
        raise UserError(f"encoders={encoders!r} is not one of {', '.join(ENCODERS)}")
    c = base.get_config()
    c.name = "stage1_t2i"
    c.model.size = size
    c.data.resolution = res
    c.data.buckets = shapes.standard(res) if buckets else ()
    c.data.face_resolution = min(res, 256)
    c.data.dir = f"runs/data/emoji_{res}px"
    c.data.build = dict(resolution=res, num_scenes=10_000, seed=0, nouns=0)
    c.conditioning.codec.patch = 8
    c.tasks = base.text_to_image(data)
    if data == "recipe":
        c.data.dataset, c.data.dir, c.data.build = "recipe", "data", {}
    # The codec is fitted once, for all three stages.
    stages = (c.tasks, base.multitask(data=data), base.with_identity(data))
    c.conditioning.fit_on = base.by_rows(stages, steps=(1.0, 1.0, 0.1))
    if encoders == "sd3":
        text = dict(kind="sd3", dtype="float32" if size == "tiny" else "bfloat16")
        c.conditioning = dict(
            folder="pretrained/sd3", text=text, codec=dict(kind="vae"), identity=None, fit_on={}
        )
        c.data.num_tokens = 77 + 77  # CLIP's positions, then T5's
    if size != "tiny":
        c.model.overrides = dict(dtype="bfloat16", remat="full")
    if folder:
        base.use_folder(c, folder)
    if pod:
        pods.fit(c, pod)
    c.flow.shift = max(1.0, res / 256)
    c.sampling.shift = c.flow.shift
    if size == "tiny":  # the local mode: a CPU, minutes
        c.data.batch_size = 16
        c.optim.warmup = 50
        c.optim.ema = 0.995
        c.train.steps = 500
        c.train.log_every = 10
        c.train.eval_every = c.train.sample_every = c.train.save_every = 250
    return c
