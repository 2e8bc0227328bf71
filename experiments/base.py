"""The complete configuration with every default. Stages and runs start from it and change a few
lines.
"""

from ml_collections import ConfigDict


def task(
    weight: float,
    *sources: str,
    drop_text: float = 0.05,
    drop_image: float = 0.05,
    drop_both: float = 0.05,
) -> ConfigDict:
    """A task's share of the stream and the dataset families it reads.

    The three kinds of condition dropout are disjoint events (InstructPix2Pix, arXiv 2211.09800,
    3.2.1); they make guidance possible.
    """
    return ConfigDict(
        dict(
            weight=weight,
            sources=sources,
            drop_text=drop_text,
            drop_image=drop_image,
            drop_both=drop_both,
        )
    )


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "base"
    c.seed = 0

    # What is learnt, in which shares (relative weights).
    c.tasks = dict(t2i=task(1.0, "scenes"))
    c.data = dict(
        dataset="emoji_scenes",  # built on demand when embedded; any folder of records otherwise
        dir="runs/data/emoji_64px",
        build=dict(resolution=64, num_scenes=10_000, seed=0, nouns=0),  # nouns: 0 = all
        resolution=64,
        face_resolution=64,
        num_tokens=32,
        # a folder of prompts' embeddings (univg data cache): the run then holds no text encoder
        text_cache="",
        batch_size=512,  # global
        read_threads=2,
        prefetch=8,
    )

    # The frozen encoders.
    c.conditioning = dict(
        folder="",  # where pretrained encoders lie, of those kinds that do not come by pip
        text="minilm",
        codec=dict(kind="linear", patch=4, channels=16, whiten=0.5),
        identity=None,
    )

    # The model: a named size and any fields of `univg_jax.models.mmdit.MMDiT` that differ from it.
    c.model = dict(size="xl", overrides=ConfigDict())

    c.flow = dict(
        distribution="logit_normal",
        mean=0.0,
        std=1.0,
        shift=1.0,
        weight_changes=(),  # tasks whose loss weighs changed regions (OmniGen), e.g. ("ie",)
    )
    c.optim = dict(
        name="adamw",
        lr=1e-4,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        warmup=1000,
        schedule="constant",
        accumulate=1,
        mu_dtype="float32",
        ema=0.9999,
        ema_warmup=10.0,
        freeze=(),  # regexes over parameter paths
    )
    # -1 is the rest; of two, fsdp takes as many devices of a slice as divide the model's width.
    c.mesh = dict(data=-1, fsdp=-1, tensor=1)

    # Where parameters come from when the workdir has no checkpoint of its own: another run's.
    c.init_from = dict(path="", which="ema", new=(), dropped=())

    c.train = dict(
        steps=400_000,
        log_every=100,
        eval_every=10_000,
        sample_every=10_000,
        save_every=2_000,
        keep=3,
        eval_examples=64,  # a task, at 8 fixed times each
        sample_examples=4,  # a task, in the grids
    )
    c.sampling = dict(
        solver="euler",
        steps=50,
        shift=1.0,
        rescale=0.0,
        interval=(0.0, 1.0),
        # Scales a task: text alone (two passes), or text and image (three). Absent tasks: one pass.
        guidance=dict(
            t2i=dict(text=5.0),
            ie=dict(text=5.0, image=1.5),
            ip=dict(text=3.0),
            lg=dict(text=5.0),
            id=dict(text=3.0),
        ),
    )
    return c
