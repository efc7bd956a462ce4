"""Q6_K: 256 weights in 210 bytes, in 16 groups of 16.

    ql       128 bytes         lower four bits; each run of 64 bytes holds 128 values in two planes
    qh       64 bytes          upper two bits; each run of 32 bytes holds 128 values in four planes
    scales   16 signed bytes   one a group
    d        half              scale of the scales

weight = d * scale * (q - 32), q = ql + 16 * qh, 0..63
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import scale_column, unpack_planes

BLOCK_SIZE = 256
LAYOUT = np.dtype(
    [("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<f2")]
)
assert LAYOUT.itemsize == 210


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 256) float32"""
    four = unpack_planes(blocks["ql"].reshape(-1, 2, 64), 4)  # (n, 2, 128)
    q = four | unpack_planes(blocks["qh"].reshape(-1, 2, 32), 2) << 4
    scale = scale_column(blocks, "d") * blocks["scales"].astype(np.float32)  # (n, 16)
    signed = q.reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    return (scale[..., None] * signed).reshape(-1, BLOCK_SIZE)
