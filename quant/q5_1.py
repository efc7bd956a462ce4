"""Q5_1: 32 weights in 24 bytes.

    d    half       scale
    m    half       min
    qh   4 bytes    the fifth bits; that of value i is bit i % 8 of byte i // 8
    qs   16 bytes   the lower four bits; byte i holds those of value i (low half) and value
                    i + 16 (high half)

weight[i] = d * q[i] + m, q = qs + 16 * qh, 0..31
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import pack_planes, scale_column, unpack_planes
from quant.rounding import inverse, truncate

BLOCK_SIZE = 32
LAYOUT = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))])
assert LAYOUT.itemsize == 24


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 32) float32"""
    fifth = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    q = unpack_planes(blocks["qs"], 4) | fifth << 4  # (n, 32)
    scale = scale_column(blocks, "d")
    return scale * q.astype(np.float32) + scale_column(blocks, "m")


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 32) float32 -> (n,) LAYOUT, as quantize_row_q5_1_ref of ggml-quants.c"""
    lowest = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - lowest) / np.float32(31)  # (n, 1)
    q = truncate((x - lowest) * inverse(scale) + np.float32(0.5), 31)  # (n, 32)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"], blocks["m"] = scale[:, 0], lowest[:, 0]
    blocks["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")
    blocks["qs"] = pack_planes(q & np.uint8(15), 4)
    return blocks
