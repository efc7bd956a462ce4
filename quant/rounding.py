"""The arithmetic that the legacy quantizers of ggml-quants.c share, in float32."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 where that is no finite number: such a scale is stored as zero anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        result = np.float32(1) / scale
    return np.where(np.isfinite(result), result, np.float32(0))


def truncate(x: Floats, largest: int) -> NDArray[np.uint8]:
    """C's `MIN(largest, (int8_t) x)` for x above -1."""
    return np.minimum(x, np.float32(largest)).astype(np.uint8)


def round_half_away(x: Floats) -> Floats:
    """C's `roundf`: halves go away from zero (np.rint sends them to the even neighbour)."""
    whole: Floats = np.trunc(x)
    rest: Floats = np.trunc(np.float32(2) * (x - whole))
    return whole + rest
