"""Q5_0: 32 weights in 22 bytes.

    d    half       scale
    qh   4 bytes    the fifth bits; that of value i is bit i % 8 of byte i // 8
    qs   16 bytes   the lower four bits; byte i holds those of value i (low half) and value
                    i + 16 (high half)

weight[i] = d * (q[i] - 16), q = qs + 16 * qh, 0..31
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column, unpack_planes

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
    return _pack(*fit.from_furthest(x, 16))


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q5_0_impl of ggml-quants.c"""
    importance = fit.importance(x, weights, part=x.shape[1], factor=1).reshape(-1, BLOCK_SIZE)
    return _pack(*fit.signed(x.reshape(-1, BLOCK_SIZE), importance, 16))


def _pack(scale: NDArray[np.float32], q: NDArray[np.uint8]) -> np.ndarray:
    blocks = np.empty(len(q), LAYOUT)
    blocks["d"] = scale
    blocks["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")
    blocks["qs"] = fit.pack_planes(q & np.uint8(15), 4)
    return blocks
