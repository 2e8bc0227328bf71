"""The paper's ablations on the embedded dataset, for a CPU: what is trained, and what is compared.

`make ablations` (tools/ablations.py) trains and measures all of it, and writes docs/ablations.md.

An arm is a way of training that differs from `base` in one thing. All arms have the paper's
mixtures, and as many steps of as many rows in each stage. How many is our choice: what 2 cores do
in 8 hours.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from experiments import base, emoji
from univg_jax.errors import UserError, check_name

AUXILIARY = ("depth", "pose", "seg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How large all of it is: data and model of a preset of `emoji`, steps of the three stages."""

    preset: str
    steps: tuple[int, int, int]
    seeds: int
    examples: int  # of each task that is measured


FORMS = dict(
    short=Form(preset="smoke", steps=(2, 2, 2), seeds=1, examples=16),
    full=Form(preset="quickstart", steps=(360, 720, 200), seeds=3, examples=128),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """The stages that it trains, each with the tasks that are measured after it.

    An arm without a first stage starts from that of `base`. `width` is a multiple of its width.
    """

    stages: Mapping[int, tuple[str, ...]]
    width: float = 1.0
    source: str = "channels"


ARMS = dict(
    base=Arm(stages={1: ("t2i",), 2: ("t2i", "ie"), 3: ("ie", "id")}),
    no_auxiliary=Arm(stages={2: ("ie",)}),
    t2i_only=Arm(stages={2: ("t2i",)}),
    identity_first=Arm(stages={1: (), 2: (), 3: ("id",)}),
    small=Arm(stages={1: (), 2: (), 3: ("ie", "id")}, width=0.5),
    large=Arm(stages={1: (), 2: (), 3: ("ie", "id")}, width=1.5),
    tokens=Arm(stages={1: (), 2: ("ie",)}, source="tokens"),
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """By a metric, the model at the point `better` is better than that at `other`.

    With a `tolerance`: not worse than it by more than this part of its value. The time of a step is
    the metric `seconds`.
    """

    metric: str
    _: dataclasses.KW_ONLY
    better: str
    other: str
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """What the paper says, and the points, ARM/STAGE, that are compared to see whether it holds."""

    title: str
    paper: str
    points: Mapping[str, str]
    claims: Sequence[Claim]
    note: str


KEPT = 0.1  # the part of a value that may be lost where the paper says that it is kept: our choice

ABLATIONS = dict(
    auxiliary=Ablation(
        title="Auxiliary tasks help editing",
        paper="With depth, pose and segmentation in Stage II, CLIP-T of MagicBrush rises from 28.3 "
        "to 29.8.",
        points={"no_auxiliary/2": "without", "base/2": "with"},
        claims=[Claim("ie/l1_changed", better="base/2", other="no_auxiliary/2")],
        note="Both after Stage II. The three tasks have 1% each, the paper's 3% in all; without "
        "them the other tasks have these rows, in proportion.",
    ),
    stage_two=Ablation(
        title="Stage II keeps text-to-image",
        paper="Adding Stage II does not hurt text-to-image.",
        points={
            "base/1": "before Stage II",
            "base/2": "after Stage II",
            "t2i_only/2": "text-to-image alone, as many steps",
        },
        claims=[
            Claim("t2i/retrieval_objects_r1", better="base/2", other="base/1", tolerance=KEPT),
            Claim("t2i/retrieval_objects_r1", better="base/2", other="t2i_only/2", tolerance=KEPT),
        ],
        note="Stage II has 28% of text-to-image. The second comparison is at equal compute.",
    ),
    identity=Ablation(
        title="Identity in Stage III, not from the start",
        paper="With identity from the start instead of in Stage III, the similarity of faces falls "
        "from 0.328 to 0.245.",
        points={"identity_first/3": "from the start", "base/3": "in Stage III"},
        claims=[Claim("id/identity_following", better="base/3", other="identity_first/3")],
        note="Both arms see as many rows of identity in all: from the start they are spread evenly "
        "over all steps, and Stage III goes on as Stage II. How the paper mixed them is not "
        "published.",
    ),
    size=Ablation(
        title="Larger models edit and keep identity better",
        paper="UniVG has 416M, 1.8B and 3.7B parameters, about 1 : 4 : 9.",
        points={"small/3": "small", "base/3": "base", "large/3": "large"},
        claims=[
            Claim(metric, better="large/3", other="small/3")
            for metric in ("ie/l1_changed", "id/identity_following")
        ],
        note="Equal steps, so the larger model has more compute, as in the paper. The widths are "
        "1 : 2 : 3 at one depth, and the learning rate is the same.",
    ),
    concatenation=Ablation(
        title="The source as channels: faster than as tokens, and as good",
        paper="An edit takes 10.4 s, in OmniGen, which has the source as tokens, 36.8 s.",
        points={"tokens/2": "as tokens", "base/2": "as channels"},
        claims=[
            Claim("seconds", better="base/2", other="tokens/2"),
            Claim("ie/l1_changed", better="base/2", other="tokens/2", tolerance=KEPT),
        ],
        note="Equal steps, after Stage II. As tokens, source and mask are a second picture below "
        "the first (`MMDiT.source`), also where a row has no source, since a step has one shape. "
        "What else the machine does makes a step slower: benchmarks/concat.py compares the times "
        "side by side, at the sizes of the paper's pictures.",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One stage of an arm with one seed."""

    form: str
    seed: int
    arm: str
    stage: int

    @property
    def point(self) -> str:
        """Its name in ABLATIONS."""
        return f"{self.arm}/{self.stage}"

    @property
    def name(self) -> str:
        """The folder of the run below that of all runs."""
        return f"{self.form}/seed{self.seed}/{self.arm}/stage{self.stage}"

    @property
    def measured(self) -> tuple[str, ...]:
        """The tasks that are measured."""
        return ARMS[self.arm].stages[self.stage]

    @property
    def parent(self) -> "Run | None":
        """The run whose parameters it starts from."""
        if self.stage == 1:
            return None
        arm = self.arm if self.stage - 1 in ARMS[self.arm].stages else "base"
        return dataclasses.replace(self, arm=arm, stage=self.stage - 1)


def runs(form: str) -> Iterator[Run]:
    """All runs, parents first; every seed is whole before the next one begins."""
    for seed in range(FORMS[check_name(form, FORMS, what="form")].seeds):
        for arm, chosen in ARMS.items():
            for stage in chosen.stages:
                yield Run(form=form, seed=seed, arm=arm, stage=stage)


def mixture(arm: str, stage: int, steps: Sequence[int]) -> dict[str, ConfigDict]:
    """The tasks of a stage of an arm."""
    stages = [base.text_to_image(), base.multitask(), base.with_identity()]
    if arm == "identity_first":
        identity = stages[2]["id"]
        # As many rows as with one to one in Stage III.
        share = identity.weight = 0.5 * steps[2] / sum(steps)
        stages[2] = base.multitask()
        for tasks in stages:
            for task in tasks.values():
                task.weight *= 1 - share
            tasks["id"] = identity
    if arm == "t2i_only":
        stages[1] = base.text_to_image()
    if arm == "no_auxiliary":
        for name in AUXILIARY:
            del stages[1][name]
    return stages[stage - 1]


def get_config(
    *, arm: str = "base", stage: int = 1, form: str = "full", seed: int = 0, init_from: str = ""
) -> ConfigDict:
    """arm: a name in ARMS, stage: one of its stages. form: short or full. init_from: the workdir of
    the stage before.
    """
    stages = ARMS[check_name(arm, ARMS, what="arm")].stages
    if stage not in stages:
        raise UserError(f"arm={arm} has no stage={stage}, only {', '.join(map(str, stages))}")
    f = FORMS[check_name(form, FORMS, what="form")]
    c = emoji.get_config(stage=stage, preset=f.preset, init_from=init_from)
    c.name = f"ablations_{arm}_stage{stage}"
    c.seed = seed
    # As docs/ablations.md was measured: before `make quickstart` had larger batches and latents,
    # more times near the noise, and weights of holes. Only the mixture that the codec is fitted on
    # (`conditioning.fit_on`) is today's.
    c.data.batch_size, c.conditioning.codec.channels = 16, 8
    c.flow.shift = c.sampling.shift = 1.0
    c.flow.weight_changes = ()
    c.sampling.steps = 16
    c.sampling.guidance.ip.text = 2.5
    c.tasks = mixture(arm, stage, f.steps)
    # Named, so that a run of other steps is refused, not continued.
    c.train.steps = c.optim.decay_steps = f.steps[stage - 1]
    c.optim.warmup = min(50, c.train.steps // 4)
    c.train.save_every, c.train.keep = 500, 1
    c.train.eval_examples = c.train.sample_examples = 0
    c.model.overrides.hidden_dim = int(ARMS[arm].width * c.model.overrides.hidden_dim)
    c.model.overrides.source = ARMS[arm].source
    if "id" in c.tasks:
        c.conditioning.identity = dict(kind="lda", dim=64)
    if arm == "identity_first":
        c.init_from.new = ()
    return c
