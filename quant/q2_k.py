"""Q2_K: 256 weights in 84 bytes, in 16 groups of 16.

    scales   16 bytes   one a group: scale (low half) and min (high half), 0..15
    qs       64 bytes   integers 0..3; each run of 32 bytes holds 128 values in four planes
    d        half       scale of the scales
    dmin     half       scale of the mins

weight = d * scale * q - dmin * min
"""

import numpy as np
from numpy.typing import NDArray

from quant import affine_k, fit
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


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 256) float32 -> (n,) LAYOUT, as quantize_row_q2_K_ref of ggml-quants.c"""
    groups = x.reshape(-1, 16)
    found = fit.affine_absolute(groups, np.abs(groups), 3, first=-0.5, step=0.1, tries=16)
    return affine_k.quantize(LAYOUT, groups, found, 3, 15, _pack)


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q2_K_impl of ggml-quants.c"""
    importance = fit.importance(x, weights, part=BLOCK_SIZE, factor=1).reshape(-1, 16)
    return affine_k.quantize_weighted(LAYOUT, x.reshape(-1, 16), importance, 3, 15, _pack)


def _pack(
    blocks: np.ndarray, scales: affine_k.Levels, mins: affine_k.Levels, q: affine_k.Levels
) -> None:
    blocks["scales"] = scales | mins << 4
    blocks["qs"] = fit.pack_planes(q.reshape(-1, 128), 2).reshape(-1, 64)
