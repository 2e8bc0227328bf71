"""Remat, gradient accumulation and the loop over blocks for each pod, model size and resolution.

The batch is always the paper's 512; what differs is how a device gets through its rows. `minimal`
writes less to HBM than `none`, and computes little again. `none` is for some of the places where
the interconnect is the bound, so that it takes no more time. An unrolled model copies nothing into
stacks over blocks, but takes twice as long to compile: it is for where HBM is far above the other
bounds. BUILD.md shows what `univg plan` says about each recommendation, in a table that `python
tools/plans.py` makes.
"""

from ml_collections import ConfigDict

from univg_jax.errors import UserError, check_name

RESOLUTIONS = (256, 512, 1024)
# Shapes by accelerator type, as Google Cloud names it. The number of a v5p counts cores, and a chip
# has two.
TOPOLOGIES = {
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-8": "v5p:2x2x1",
    "v5p-64": "v5p:2x4x4",
    "v5p-512": "v5p:4x8x8",
    "v6e-64": "v6e:8x8",
    "v6e-256": "v6e:16x16",
}

# Micro-batches a step, at 256, 512 and 1024 px.
ACCUMULATE = {
    "v5e-16": dict(b=(1, 2, 8), l=(1, 4, 16), xl=(2, 8, 32)),
    "v5e-64": dict(b=(1, 1, 2), l=(1, 1, 4), xl=(1, 1, 4)),
    "v5e-256": dict(b=(1, 1, 1), l=(1, 1, 1), xl=(1, 1, 1)),
    "v5p-8": dict(b=(1, 1, 4), l=(1, 2, 8), xl=(1, 4, 16)),
    "v5p-64": dict(b=(1, 1, 1), l=(1, 1, 1), xl=(1, 1, 2)),
    "v5p-512": dict(b=(1, 1, 1), l=(1, 1, 1), xl=(1, 1, 1)),
    "v6e-64": dict(b=(1, 1, 1), l=(1, 1, 2), xl=(1, 1, 2)),
    "v6e-256": dict(b=(1, 1, 1), l=(1, 1, 1), xl=(1, 1, 1)),
}
# Of the places where the interconnect is the bound, those where remat would only cost time.
WITHOUT_REMAT = {
    ("v5e-256", "xl", 256),
    ("v5p-512", "b", 256),
    ("v5p-512", "xl", 256),
    ("v6e-256", "xl", 256),
}
# Where the loop over blocks costs a tenth of the step.
UNROLLED = {("v6e-64", "b", 512)}


def fit(config: ConfigDict, pod: str) -> None:
    """Sets what `pod` needs, in place.

    Raises UserError for a pod, a size or a resolution that is not in the table.
    """
    size, resolution = config.model.size, config.data.resolution
    sizes = ACCUMULATE[check_name(pod, ACCUMULATE, what="pod")]
    if size not in sizes or resolution not in RESOLUTIONS:
        listed = f"sizes {', '.join(sizes)} at {', '.join(map(str, RESOLUTIONS))} px"
        raise UserError(
            f"pod={pod}: size={size},res={resolution} has no recommendation, only {listed}; "
            "plan your own"
        )
    config.optim.accumulate = sizes[size][RESOLUTIONS.index(resolution)]
    where = (pod, size, resolution)
    config.model.overrides.remat = "none" if where in WITHOUT_REMAT else "minimal"
    if where in UNROLLED:
        config.model.overrides.scan = False
