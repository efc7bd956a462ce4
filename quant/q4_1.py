"""Q4_1: 32 weights in 20 bytes.

    d    half       scale
    m    half       min
    qs   16 bytes   32 integers 0..15; byte i holds value i (low half) and value i + 16 (high half)

weight[i] = d * qs[i] + m
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import pack_planes, scale_column, unpack_planes
from quant.rounding import inverse, truncate

BLOCK_SIZE = 32
LAYOUT = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", (16,))])
assert LAYOUT.itemsize == 20


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 32) float32"""
    qs = unpack_planes(blocks["qs"], 4)  # (n, 32)
    scale = scale_column(blocks, "d")
    return scale * qs.astype(np.float32) + scale_column(blocks, "m")


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 32) float32 -> (n,) LAYOUT, as quantize_row_q4_1_ref of ggml-quants.c"""
    lowest = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - lowest) / np.float32(15)  # (n, 1)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"], blocks["m"] = scale[:, 0], lowest[:, 0]
    blocks["qs"] = pack_planes(truncate((x - lowest) * inverse(scale) + np.float32(0.5), 15), 4)
    return blocks
