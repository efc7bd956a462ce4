"""Q4_1: 32 weights in 20 bytes.

    d    half       scale
    m    half       min
    qs   16 bytes   32 integers 0..15; byte i holds value i (low half) and value i + 16 (high half)

weight[i] = d * qs[i] + m
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column, unpack_planes

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
    return _pack(*fit.from_range(x, 15))


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q4_1_impl of ggml-quants.c"""
    importance = fit.importance(x, weights, part=x.shape[1], factor=1).reshape(-1, BLOCK_SIZE)
    scale, low, q = fit.affine_weighted(x.reshape(-1, BLOCK_SIZE), importance, 15)
    return _pack(scale, -low, q)


def _pack(scale: NDArray[np.float32], low: NDArray[np.float32], q: NDArray[np.uint8]) -> np.ndarray:
    blocks = np.empty(len(q), LAYOUT)
    blocks["d"], blocks["m"] = scale, low
    blocks["qs"] = fit.pack_planes(q, 4)
    return blocks
