"""Q2_K: 256 weights in 84 bytes, in 16 groups of 16.

    scales   16 bytes   one a group: scale (low half) and min (high half), 0..15
    qs       64 bytes   integers 0..3; each run of 32 bytes holds 128 values in four planes
    d        half       scale of the scales
    dmin     half       scale of the mins

weight = d * scale * q - dmin * min
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import scale_column, unpack_planes

BLOCK_SIZE = 256
LAYOUT = np.dtype([("scales", "u1", (16,)), ("qs", "u1", (64,)), ("d", "<f2"), ("dmin", "<f2")])
assert LAYOUT.itemsize == 84


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 256) float32"""
    q = unpack_planes(blocks["qs"].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    scale = scale_column(blocks, "d") * (blocks["scales"] & 15).astype(np.float32)  # (n, 16)
    low = scale_column(blocks, "dmin") * (blocks["scales"] >> 4).astype(np.float32)  # (n, 16)
    return (scale[..., None] * q - low[..., None]).reshape(-1, BLOCK_SIZE)
