"""F16: one IEEE 754 half, little-endian; up to 65504."""

import numpy as np
from numpy.typing import NDArray

from quant import fit

BLOCK_SIZE = 1
LAYOUT = np.dtype("<f2")


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 1) float32"""
    return blocks.astype(np.float32)[:, None]


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 1) float32 -> (n,) LAYOUT, rounded to the nearest, ties to even"""
    return fit.to_f16(x[:, 0]).view(LAYOUT)
