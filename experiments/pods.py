"""How to spend the memory of a pod: remat and gradient accumulation for each model size and
resolution.

At the paper's batch of 512 the batch never changes, only how a device gets through its rows.
`minimal` writes less to HBM than `none`, which is the bound wherever the interconnect is not; there
`none` computes less in the same time. BUILD.md has what `univg plan` says about each; `python
tools/plans.py` makes that table.
"""

from ml_collections import ConfigDict

from univg_jax.errors import UserError

RESOLUTIONS = (256, 512, 1024)
# Accelerator types as Google Cloud names them (a v5p's number counts two cores a chip), and their
# shapes.
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

# (remat, accumulate) at 256, 512 and 1024 px.
RECOMMENDED = {
    "v5e-16": dict(
        b=(("minimal", 1), ("minimal", 2), ("minimal", 8)),
        l=(("minimal", 1), ("minimal", 4), ("minimal", 16)),
        xl=(("minimal", 2), ("minimal", 8), ("minimal", 32)),
    ),
    "v5e-64": dict(
        b=(("minimal", 1), ("minimal", 1), ("minimal", 2)),
        l=(("minimal", 1), ("minimal", 1), ("minimal", 4)),
        xl=(("minimal", 1), ("minimal", 1), ("minimal", 4)),
    ),
    "v5e-256": dict(
        b=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        l=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        xl=(("none", 1), ("minimal", 1), ("minimal", 1)),
    ),
    "v5p-8": dict(
        b=(("minimal", 1), ("minimal", 1), ("minimal", 4)),
        l=(("minimal", 1), ("minimal", 2), ("minimal", 8)),
        xl=(("minimal", 1), ("minimal", 4), ("minimal", 16)),
    ),
    "v5p-64": dict(
        b=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        l=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        xl=(("minimal", 1), ("minimal", 1), ("minimal", 2)),
    ),
    "v5p-512": dict(
        b=(("none", 1), ("minimal", 1), ("minimal", 1)),
        l=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        xl=(("none", 1), ("minimal", 1), ("minimal", 1)),
    ),
    "v6e-64": dict(
        b=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        l=(("minimal", 1), ("minimal", 1), ("minimal", 2)),
        xl=(("minimal", 1), ("minimal", 1), ("minimal", 2)),
    ),
    "v6e-256": dict(
        b=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        l=(("minimal", 1), ("minimal", 1), ("minimal", 1)),
        xl=(("none", 1), ("minimal", 1), ("minimal", 1)),
    ),
}


def fit(config: ConfigDict, pod: str) -> None:
    """Sets what `pod` needs, in place. Raises ValueError for a pod, a size or a resolution that is
    not in the table.
    """
    if pod not in RECOMMENDED:
        raise UserError(f"pod={pod!r} is not one of {', '.join(RECOMMENDED)}")
    sizes, size, resolution = RECOMMENDED[pod], config.model.size, config.data.resolution
    if size not in sizes or resolution not in RESOLUTIONS:
        known = f"sizes {', '.join(sizes)} at {', '.join(map(str, RESOLUTIONS))} px"
        raise UserError(
            f"pod={pod}: size={size},res={resolution} has no recommendation, only {known}; plan your own"
        )
    config.model.overrides.remat, config.optim.accumulate = sizes[size][
        RESOLUTIONS.index(resolution)
    ]
