"""Q3_K: 256 weights in 110 bytes, in 16 groups of 16.

    hmask    32 bytes   the third bit of each value: 256 values in eight planes; 0 means minus 4
    qs       64 bytes   the lower two bits; each run of 32 bytes holds 128 values in four planes
    scales   12 bytes   6-bit scales: 8 bytes with the lower four bits, 16 values in two planes,
                        then 4 bytes with the upper two bits, 16 values in four planes
    d        half       scale of the scales

weight = d * (scale - 32) * q, q -4..3
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import scale_column, unpack_planes

BLOCK_SIZE = 256
LAYOUT = np.dtype(
    [("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), ("d", "<f2")]
)
assert LAYOUT.itemsize == 110


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 256) float32"""
    four = unpack_planes(blocks["scales"][:, :8], 4)
    scales = four | unpack_planes(blocks["scales"][:, 8:], 2) << 4  # (n, 16)
    scale: NDArray[np.float32] = scales.astype(np.float32) - np.float32(32)
    scale *= scale_column(blocks, "d")
    two = unpack_planes(blocks["qs"].reshape(-1, 2, 32), 2).reshape(-1, BLOCK_SIZE)
    q = (two | unpack_planes(blocks["hmask"], 1) << 2).reshape(-1, 16, 16)
    signed = q.astype(np.float32) - np.float32(4)
    return (scale[..., None] * signed).reshape(-1, BLOCK_SIZE)
