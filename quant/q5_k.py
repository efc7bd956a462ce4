"""Q5_K: 256 weights in 176 bytes, in 8 groups of 32.

    d        half        scale of the scales
    dmin     half        scale of the mins
    scales   12 bytes    a 6-bit scale and a 6-bit min for each group, see k_scales.py
    qh       32 bytes    the fifth bit of each value: 256 values in eight planes
    qs       128 bytes   the lower four bits; each run of 32 bytes holds a group in the low halves
                         and the next group in the high halves

weight = d * scale * q - dmin * min, q = qs + 16 * qh
"""

import numpy as np
from numpy.typing import NDArray

from quant import affine_k, fit, k_scales
from quant.packing import scale_column, unpack_planes

BLOCK_SIZE = 256
LAYOUT = np.dtype(
    [
        ("d", "<f2"),
        ("dmin", "<f2"),
        ("scales", "u1", (12,)),
        ("qh", "u1", (32,)),
        ("qs", "u1", (128,)),
    ]
)
assert LAYOUT.itemsize == 176


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 256) float32"""
    scales, mins = k_scales.unpack(blocks["scales"])
    four = unpack_planes(blocks["qs"].reshape(-1, 4, 32), 4).reshape(-1, BLOCK_SIZE)
    q = (four | unpack_planes(blocks["qh"], 1) << 4).reshape(-1, 8, 32)
    scale = scale_column(blocks, "d") * scales.astype(np.float32)  # (n, 8)
    low = scale_column(blocks, "dmin") * mins.astype(np.float32)  # (n, 8)
    return (scale[..., None] * q - low[..., None]).reshape(-1, BLOCK_SIZE)


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 256) float32 -> (n,) LAYOUT, as quantize_row_q5_K_ref of ggml-quants.c"""
    groups = x.reshape(-1, 32)
    found = fit.affine(groups, k_scales.importance(groups), 31, first=-0.5, step=0.1, tries=16)
    return affine_k.quantize(LAYOUT, groups, found, 31, 63, _pack)


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q5_K_impl of ggml-quants.c"""
    importance = fit.importance(x, weights, part=BLOCK_SIZE, factor=2).reshape(-1, 32)
    return affine_k.quantize_weighted(LAYOUT, x.reshape(-1, 32), importance, 31, 63, _pack)


def _pack(
    blocks: np.ndarray, scales: affine_k.Levels, mins: affine_k.Levels, q: affine_k.Levels
) -> None:
    blocks["scales"] = k_scales.pack(scales, mins)
    q = q.reshape(-1, BLOCK_SIZE)
    blocks["qh"] = fit.pack_planes(q >> 4, 1)
    blocks["qs"] = fit.pack_planes((q & np.uint8(15)).reshape(-1, 64), 4).reshape(-1, 128)
