"""The named sizes of the model, and which of them parameters are of."""

from collections.abc import Mapping
from typing import Any

# With SD3's conditioning (text 4096, pooled 2048, 33 channels in, 16 out), b, l and xl have 412M,
# 1.77B and 3.75B parameters, within 2% of UniVG's published 416M, 1.8B and 3.7B. Its depths and
# widths are not published. Ours fill a TPU: widths are multiples of the sides of its matrix unit,
# and a head is as wide as its vectors.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_dim=256, depth=6, num_heads=4, pos_embed_max_size=32, pos_embed_base_size=32
    ),
    "b": dict(hidden_dim=1024, depth=11, num_heads=8),
    "l": dict(hidden_dim=1536, depth=21, num_heads=12),
    "xl": dict(hidden_dim=2048, depth=25, num_heads=16),
    # What b, l and xl were before, with heads of 64.
    "b-64": dict(hidden_dim=1024, depth=11, num_heads=16),
    "l-1472": dict(hidden_dim=1472, depth=23, num_heads=23),
    "xl-1920": dict(hidden_dim=1920, depth=28, num_heads=30),
    # The networks of public weights, which `init_from` can take.
    "sd3-medium": dict(hidden_dim=1536, depth=24, num_heads=24, qk_norm=None),
    "sd3.5-large": dict(hidden_dim=2432, depth=38, num_heads=38),
}


def size_of(parameters: Mapping[str, Any]) -> str | None:
    """The named size that parameters with these names and shapes are of, if any.

    Sizes are told apart by width, depth, and the width of a head where it has a norm.
    """

    def shape(end: str) -> tuple[int, ...]:
        return next((x.shape for name, x in parameters.items() if name.endswith(end)), ())

    for size, fields_ in SIZES.items():
        d, depth, heads = fields_["hidden_dim"], fields_["depth"], fields_["num_heads"]
        norm = (depth - 1, d // heads) if fields_.get("qk_norm", "rms_norm") else ()
        if shape("blocks/image/k/kernel") == (depth - 1, d, d) and norm == shape(
            "blocks/image/k_norm/scale"
        ):
            return size
    return None
