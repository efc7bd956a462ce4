"""Q5_0: 32 weights in 22 bytes.

    d    half       scale
    qh   4 bytes    the fifth bits; that of value i is bit i % 8 of byte i // 8
    qs   16 bytes   the lower four bits; byte i holds those of value i (low half) and value
                    i + 16 (high half)

weight[i] = d * (q[i] - 16), q = qs + 16 * qh, 0..31
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import pack_planes, scale_column, unpack_planes
from quant.rounding import inverse, truncate

BLOCK_SIZE = 32
LAYOUT = np.dtype([("d", "<f2"), ("qh", "u1", (4,)), ("qs", "u1", (16,))])
assert LAYOUT.itemsize == 22


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 32) float32"""
    fifth = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    q = unpack_planes(blocks["qs"], 4) | fifth << 4  # (n, 32)
    return scale_column(blocks, "d") * (q.astype(np.float32) - np.float32(16))


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 32) float32 -> (n,) LAYOUT, as quantize_row_q5_0_ref of ggml-quants.c

    The value furthest from zero becomes 0, that is -16 * d, so d has the opposite sign.
    """
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scale = furthest / np.float32(-16)  # (n, 1)
    q = truncate(x * inverse(scale) + np.float32(16.5), 31)  # (n, 32)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"] = scale[:, 0]
    blocks["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")
    blocks["qs"] = pack_planes(q & np.uint8(15), 4)
    return blocks
