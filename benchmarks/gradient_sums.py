"""How far a sum of gradients over devices is off in bfloat16: one ring, and our two hops.

A device adds its own bfloat16 gradient to the partial sum that it receives and rounds it, as a ring
does. `sharding.matmul` sums over `n / 4` devices, then over 4. Prints the error's norm in % of the
sum's, for gradients that are independent normal numbers.

    python benchmarks/gradient_sums.py
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

SIZE = 20_000


def ring_sum(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """The sum of `parts`, rounded to `dtype` after every addition."""
    total = parts[0].astype(dtype)
    for part in parts[1:]:
        total = (total.astype(np.float32) + part.astype(np.float32)).astype(dtype)
    return total


def main() -> None:
    """Prints one line for each number of devices."""
    print("devices  one ring  two hops  float32")
    for devices in (8, 64, 256):
        rng = np.random.default_rng(0)
        parts = rng.standard_normal((devices, SIZE)).astype(ml_dtypes.bfloat16)
        exact = parts.astype(np.float64).sum(0)
        hops = [ring_sum(parts[i::4], ml_dtypes.bfloat16) for i in range(4)]
        sums = [
            ring_sum(parts, ml_dtypes.bfloat16),
            ring_sum(hops, ml_dtypes.bfloat16),
            ring_sum(parts, np.float32),
        ]
        errors = [
            100 * np.linalg.norm(total.astype(np.float64) - exact) / np.linalg.norm(exact)
            for total in sums
        ]
        print(f"{devices:7}" + "".join(f"{error:9.2f}%" for error in errors))


if __name__ == "__main__":
    main()
