"""Q2_K: 256 weights in 84 bytes, in 16 groups of 16.

    scales   16 bytes   one a group: scale (low half) and min (high half), 0..15
    qs       64 bytes   integers 0..3; each run of 32 bytes holds 128 values in four planes
    d        half       scale of the scales
    dmin     half       scale of the mins

weight = d * scale * q - dmin * min
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
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
    scale, low, q = fit.affine_absolute(groups, np.abs(groups), 3, first=-0.5, step=0.1, tries=16)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"], scales = fit.share(scale.reshape(-1, 16), 15)
    blocks["dmin"], mins = fit.share(low.reshape(-1, 16), 15)
    return _pack(blocks, scales, mins, groups, q)


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q2_K_impl of ggml-quants.c"""
    groups = x.reshape(-1, 16)
    importance = fit.importance(x, weights, part=BLOCK_SIZE, factor=1).reshape(-1, 16)
    scale, low, q = fit.affine_weighted(groups, importance, 3)
    sums = fit.sums(importance).reshape(-1, 16)
    blocks = np.empty(len(sums), LAYOUT)
    blocks["d"], scales = fit.positive(scale.reshape(-1, 16), sums, 15)
    blocks["dmin"], mins = fit.positive(low.reshape(-1, 16), sums, 15)
    return _pack(blocks, scales, mins, groups, q)


def _pack(
    blocks: np.ndarray,
    scales: NDArray[np.uint8],
    mins: NDArray[np.uint8],
    groups: NDArray[np.float32],
    q: NDArray[np.uint8],
) -> np.ndarray:
    """Fill blocks that have their d and dmin; q holds where a scale is 0."""
    blocks["scales"] = scales | mins << 4
    scale, low = scale_column(blocks, "d") * scales, scale_column(blocks, "dmin") * mins
    q = fit.round_to(groups, scale, low, 0, 3, q)
    blocks["qs"] = fit.pack_planes(q.reshape(-1, 128), 2).reshape(-1, 64)
    return blocks
