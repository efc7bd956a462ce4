"""BF16: the upper 16 bits of a float32, little-endian."""

import numpy as np
from numpy.typing import NDArray

from quant import fit

BLOCK_SIZE = 1
LAYOUT = np.dtype("<u2")


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 1) float32, exact"""
    bits = blocks.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)[:, None]


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 1) float32 -> (n,) LAYOUT, rounded to the nearest, ties to even; NaN stays NaN"""
    return fit.to_bf16(x[:, 0]).view(LAYOUT)
