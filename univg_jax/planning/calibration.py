"""How much of its bound a step reaches: bounds of public runs beside their measured times.

Nothing of ours has been measured on a TPU. `tools/calibrate_plan.py` compiles programs of the same
shapes as public training runs, and bounds them by the account that `univg plan` uses:

    expected time = bound of a plan / reached,  reached = bound / measured of a public run
"""

import dataclasses
import statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A program whose speed is public. Times are of one run of it, in seconds."""

    name: str
    topology: str
    bound: float  # by `tools/calibrate_plan.py`
    measured: float
    source: str
    # A time from end to end has parts in it that the bound has not: it is shown, but not counted.
    whole: bool = False

    @property
    def reached(self) -> float:
        """The share of the measured time that the bound accounts for."""
        return self.bound / self.measured


_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/trillium"
_FLUX = "github.com/AI-Hypercomputer/maxdiffusion, README"

RUNS = (
    Run(
        name="Llama 3.1 8B, 4 x 8192 tokens a chip",
        topology="v6e:16x16",
        bound=2.813,
        measured=4.225,
        source=f"{_RECIPES}/Llama3.1-8B-MaxText of jax 0.4.37; 4.546 s by that of jax 0.6.1",
    ),
    Run(
        name="Llama 3.1 8B, 3 x 8192 tokens a chip",
        topology="v6e:2x4",
        bound=2.110,
        measured=3.443,
        source=f"{_RECIPES}/Llama3.1-8B-MaxText/v6e-8",
    ),
    Run(
        name="Mistral 7B, 6 x 8192 tokens a chip",
        topology="v6e:2x4",
        bound=4.008,
        measured=6.320,
        source=f"{_RECIPES}/Mistral-7B-MaxText",
    ),
    Run(
        name="Llama 3.1 70B, 5 x 8192 tokens a chip",
        topology="v6e:16x16",
        bound=28.02,
        measured=42.656,
        source=f"{_RECIPES}/Llama3.1-70B-MaxText/v6e-256",
    ),
    Run(
        name="Flux.1-dev, training, 2 images of 1024 px a chip",
        topology="v5p:2x2x1",
        bound=1.010,
        measured=1.769,
        source=f"{_FLUX}: batch 8 on v5p-8",
    ),
    Run(
        name="Flux.1-dev, 28 steps, 1 image of 1024 px a chip",
        topology="v6e:2x2",
        bound=2.723,
        measured=5.5,
        source=f"{_FLUX}: batch 4 on v6e-4; with encoders and decoder",
        whole=True,
    ),
)

REACHED = sorted(run.reached for run in RUNS if not run.whole)
SOURCE = f"{len(REACHED)} public training runs (docs/performance.md)"


@dataclasses.dataclass(frozen=True)
class Expected:
    """Seconds that a step is likely to take: as the median of public runs, and their extremes."""

    seconds: float
    least: float
    most: float


def expected(bound: float) -> Expected:
    """The time to expect of a program with this bound, in seconds."""
    return Expected(bound / statistics.median(REACHED), bound / max(REACHED), bound / min(REACHED))
