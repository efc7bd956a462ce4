"""BF16: the upper 16 bits of a float32, little-endian."""

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 1
LAYOUT = np.dtype("<u2")

_INFINITY = np.uint32(0x7F800000)
_QUIET = np.uint32(0x00400000)


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 1) float32, exact"""
    bits = blocks.astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)[:, None]


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 1) float32 -> (n,) LAYOUT, rounded to the nearest, ties to even; NaN stays NaN"""
    bits = x[:, 0].view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    nan = (bits & np.uint32(0x7FFFFFFF)) > _INFINITY
    return (np.where(nan, bits | _QUIET, rounded) >> np.uint32(16)).astype(LAYOUT)
