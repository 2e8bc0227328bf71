"""Stage II: one model for all tasks but identity, from Stage I's weights (UniVG)."""

from ml_collections import ConfigDict

from experiments import base, stage1_t2i


def get_config(
    *,
    size: str = "xl",
    res: int = 256,
    encoders: str = "embedded",
    data: str = "embedded",
    folder: str = "",
    pod: str = "",
    buckets: bool = False,
    init_from: str = "runs/stage1",
) -> ConfigDict:
    """As Stage I; init_from: Stage I's workdir."""
    c = stage1_t2i.get_config(
        size=size, res=res, encoders=encoders, data=data, pod=pod, buckets=buckets
    )
    c.name = "stage2_multitask"
    c.init_from.path = init_from
    c.tasks = base.multitask(data=data)
    if folder:
        base.use_folder(c, folder)
    return c
