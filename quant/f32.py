"""F32: one float32, little-endian."""

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 1
LAYOUT = np.dtype("<f4")


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 1) float32"""
    return blocks[:, None]


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 1) float32 -> (n,) LAYOUT"""
    return x[:, 0]
