"""Q4_0: 32 weights in 18 bytes.

    d    half       scale
    qs   16 bytes   32 integers 0..15; byte i holds value i (low half) and value i + 16 (high half)

weight[i] = d * (qs[i] - 8)
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import pack_planes, scale_column, unpack_planes
from quant.rounding import inverse, truncate

BLOCK_SIZE = 32
LAYOUT = np.dtype([("d", "<f2"), ("qs", "u1", (16,))])
assert LAYOUT.itemsize == 18


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 32) float32"""
    qs = unpack_planes(blocks["qs"], 4)  # (n, 32)
    return scale_column(blocks, "d") * (qs.astype(np.float32) - np.float32(8))


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 32) float32 -> (n,) LAYOUT, as quantize_row_q4_0_ref of ggml-quants.c

    The value furthest from zero becomes 0, that is -8 * d, so d has the opposite sign.
    """
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale = furthest / np.float32(-8)  # (n, 1)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"] = scale[:, 0]
    blocks["qs"] = pack_planes(truncate(x * inverse(scale) + np.float32(8.5), 15), 4)
    return blocks
