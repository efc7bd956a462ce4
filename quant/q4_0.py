"""Q4_0: 32 weights in 18 bytes.

    d    half       scale
    qs   16 bytes   32 integers 0..15; byte i holds value i (low half) and value i + 16 (high half)

weight[i] = d * (qs[i] - 8)
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column, unpack_planes

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
    return _pack(*fit.from_furthest(x, 8))


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q4_0_impl of ggml-quants.c"""
    importance = fit.importance(x, weights, part=x.shape[1], factor=1).reshape(-1, BLOCK_SIZE)
    return _pack(*fit.signed(x.reshape(-1, BLOCK_SIZE), importance, 8))


def _pack(scale: NDArray[np.float32], q: NDArray[np.uint8]) -> np.ndarray:
    blocks = np.empty(len(q), LAYOUT)
    blocks["d"] = scale
    blocks["qs"] = fit.pack_planes(q, 4)
    return blocks
