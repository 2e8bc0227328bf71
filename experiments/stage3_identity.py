"""Stage III: identity beside all of Stage II, one to one, for a tenth of the steps (UniVG)."""

from ml_collections import ConfigDict

from experiments import base, stage2_multitask


def get_config(
    *,
    size: str = "xl",
    res: int = 256,
    encoders: str = "embedded",
    data: str = "embedded",
    pod: str = "",
    buckets: bool = False,
    init_from: str = "runs/stage2",
) -> ConfigDict:
    """As Stage II; init_from: Stage II's workdir."""
    c = stage2_multitask.get_config(
        size=size,
        res=res,
        encoders=encoders,
        data=data,
        pod=pod,
        buckets=buckets,
        init_from=init_from,
    )
    c.name = "stage3_identity"
    c.train.steps = c.train.steps // 10
    c.tasks = base.with_identity(data)
    c.conditioning.identity = dict(kind="clip") if encoders == "sd3" else dict(kind="lda", dim=64)
    c.init_from.new = ("identity_projector/.*",)
    return c
