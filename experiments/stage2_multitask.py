"""Stage II: one model for all tasks but identity, from Stage I's weights (UniVG)."""

from ml_collections import ConfigDict

from experiments import stage1_t2i
from experiments.base import task


def get_config(
    *,
    size: str = "xl",
    res: int = 256,
    encoders: str = "embedded",
    pod: str = "",
    init_from: str = "runs/stage1",
) -> ConfigDict:
    """As Stage I; init_from: Stage I's workdir."""
    c = stage1_t2i.get_config(size=size, res=res, encoders=encoders, pod=pod)
    c.name = "stage2_multitask"
    c.init_from.path = init_from
    c.tasks = multitask()
    return c


def multitask(scale: float = 1.0) -> dict[str, ConfigDict]:
    """The paper's shares. It publishes one for the three auxiliary tasks; their equal split is our
    choice.

    Depth, pose and segmentation are sampled without guidance, so they need no dropout.
    """
    always = dict(drop_text=0.0, drop_image=0.0, drop_both=0.0)
    return dict(
        t2i=task(0.28 * scale, "scenes"),
        ie=task(0.47 * scale, "edits"),
        ip=task(0.20 * scale, "scenes"),
        lg=task(0.02 * scale, "scenes"),
        depth=task(0.01 * scale, "scenes", **always),
        pose=task(0.01 * scale, "puppets", **always),
        seg=task(0.01 * scale, "scenes", **always),
    )
