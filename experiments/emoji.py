"""The three stages on the embedded dataset, for a CPU: the quickstart, a longer run and a smoke
test.

Everything but sizes and step counts is what the paper's stages use: the same readers, tasks,
mixture, model, losses and hand-off.
"""

from ml_collections import ConfigDict

from experiments import base
from experiments.base import task
from univg_jax.errors import UserError

# What a preset is: its data, latent channels, the model's difference from `tiny`, rows of a step,
# steps of the three stages.
PRESETS = dict(
    smoke=dict(
        build=dict(resolution=32, num_scenes=64, nouns=4),
        channels=8,
        model=dict(hidden_dim=64, depth=2, num_heads=2, patch_size=1),
        batch_size=16,
        steps=(20, 20, 20),
    ),
    quickstart=dict(
        build=dict(resolution=32, num_scenes=4000, nouns=8),
        channels=16,
        model=dict(hidden_dim=192, depth=4, num_heads=3, patch_size=1),
        batch_size=32,
        steps=(350, 830, 220),
    ),
    long=dict(
        build=dict(resolution=48, num_scenes=16_000, nouns=12),
        channels=16,
        model=dict(hidden_dim=192, depth=6, num_heads=3, patch_size=1),
        batch_size=32,
        steps=(1500, 4000, 1000),
    ),
)


def get_config(*, stage: int = 1, preset: str = "quickstart", init_from: str = "") -> ConfigDict:
    """stage: 1, 2 or 3. preset: a name in PRESETS. init_from: the last stage's workdir."""
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")
    if stage not in (1, 2, 3):
        raise UserError(f"stage={stage} is not 1, 2 or 3")
    p = PRESETS[preset]
    c = base.get_config()
    c.name = f"emoji_{preset}_stage{stage}"
    c.data.dir = f"runs/data/emoji_{preset}"
    c.data.build = dict(**p["build"], seed=0)
    c.data.resolution = c.data.face_resolution = p["build"]["resolution"]
    c.data.num_tokens = 36  # the longest layout prompt has 34
    c.data.batch_size = p["batch_size"]
    c.data.read_threads = 1  # of rows this small; two would wait for each other in Python
    # Small patches: at this width a token of many channels would spend all it has on carrying
    # noise. Yet with 8 channels the codec loses the thin limbs of a pose.
    c.conditioning.codec = dict(kind="linear", patch=4, channels=p["channels"], whiten=0.5)
    c.model = dict(size="tiny", overrides=p["model"])
    c.mesh = dict(data=-1, fsdp=1, tensor=1)
    c.optim.name = "muon"  # docs/performance.md has it against AdamW
    c.optim.lr = 5e-3
    c.optim.b2 = 0.98
    c.optim.schedule = "cosine"
    c.optim.ema = 0.995
    # A picture of few pixels shows what it is, a mask above all, through much noise: with times of
    # the middle a model would hardly learn to find it without. docs/decisions.md has the figures.
    c.flow.shift = c.sampling.shift = 5.0
    c.flow.weight_changes = ("ip",)  # the hole; all else can be copied
    c.train.steps = p["steps"][stage - 1]
    c.optim.warmup = min(50, c.train.steps // 4)
    c.train.log_every = 10
    c.train.save_every = 200
    c.train.eval_every = c.train.sample_every = min(1500, c.train.steps)
    c.train.eval_examples = 16
    c.sampling.steps = 8
    for scales in c.sampling.guidance.values():
        scales.text = 2.5
    c.sampling.guidance.ip.text = 1.5

    stages = (c.tasks, tasks(), dict(**tasks(0.65), id=task(0.35, "persons")))
    c.tasks = stages[stage - 1]
    # The first stage fits the codec, and all of them use it.
    c.conditioning.fit_on = base.by_rows(stages, steps=p["steps"])
    if stage == 3:
        c.conditioning.identity = dict(kind="lda", dim=64)
        c.init_from.new = ("identity_projector/.*",)
    c.init_from.path = init_from
    return c


def tasks(scale: float = 1.0) -> dict[str, ConfigDict]:
    """Stage II's tasks. In a few hundred steps the paper's 1% would hardly be seen: the shares are
    evened out.
    """
    shares = dict(t2i=0.15, ie=0.16, ip=0.28, lg=0.18, depth=0.04, pose=0.08, seg=0.11)
    paper = base.multitask()
    for name, share in shares.items():
        paper[name].weight = share * scale
    return paper
