"""Q3_K: 256 weights in 110 bytes, in 16 groups of 16.

    hmask    32 bytes   the third bit of each value: 256 values in eight planes; 0 means minus 4
    qs       64 bytes   the lower two bits; each run of 32 bytes holds 128 values in four planes
    scales   12 bytes   6-bit scales: 8 bytes with the lower four bits, 16 values in two planes,
                        then 4 bytes with the upper two bits, 16 values in four planes
    d        half       scale of the scales

weight = d * (scale - 32) * q, q -4..3
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column, unpack_planes

BLOCK_SIZE = 256
LAYOUT = np.dtype(
    [("hmask", "u1", (32,)), ("qs", "u1", (64,)), ("scales", "u1", (12,)), ("d", "<f2")]
)
assert LAYOUT.itemsize == 110


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 256) float32"""
    four = unpack_planes(blocks["scales"][:, :8], 4)
    scales = four | unpack_planes(blocks["scales"][:, 8:], 2) << 4  # (n, 16)
    scale: NDArray[np.float32] = scales.astype(np.float32) - np.float32(32)
    scale *= scale_column(blocks, "d")
    two = unpack_planes(blocks["qs"].reshape(-1, 2, 32), 2).reshape(-1, BLOCK_SIZE)
    q = (two | unpack_planes(blocks["hmask"], 1) << 2).reshape(-1, 16, 16)
    signed = q.astype(np.float32) - np.float32(4)
    return (scale[..., None] * signed).reshape(-1, BLOCK_SIZE)


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 256) float32 -> (n,) LAYOUT, as quantize_row_q3_K_ref of ggml-quants.c"""
    groups = x.reshape(-1, 16)
    scale, q = fit.refined(groups, groups * groups, 4)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"], scales = _share(scale.reshape(-1, 16))
    return _pack(blocks, scales, groups, q)


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q3_K_impl of ggml-quants.c"""
    groups = x.reshape(-1, 16)
    importance = fit.importance(x, weights, part=BLOCK_SIZE, factor=2).reshape(-1, 16)
    scale, q = fit.signed(groups, importance, 4)
    sums = fit.sums(importance).reshape(-1, 16)
    blocks = np.empty(len(sums), LAYOUT)
    blocks["d"], scales = fit.signed(scale.reshape(-1, 16), sums, 32)
    return _pack(blocks, scales, groups, q)


def _share(scale: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales (n, 16) as d (n,) times integers less 32: the one furthest from zero at -32."""
    furthest = fit.furthest(scale)
    factor = np.float32(-32) / furthest  # (n,)
    levels = fit.nearest_int(factor[:, None] * scale).astype(np.int8)  # wraps around, as in C
    levels = (np.clip(levels, -32, 31) + np.int8(32)).view(np.uint8)
    some = furthest != 0
    return np.where(some, np.float32(1) / factor, np.float32(0)), levels * some[:, None]


def _pack(
    blocks: np.ndarray,
    scales: NDArray[np.uint8],
    groups: NDArray[np.float32],
    q: NDArray[np.uint8],
) -> np.ndarray:
    """Fill blocks that have their d; q holds where a scale is 0."""
    blocks["scales"][:, :8] = fit.pack_planes(scales & np.uint8(15), 4)
    blocks["scales"][:, 8:] = fit.pack_planes(scales >> 4, 2)
    scale = scale_column(blocks, "d") * (scales.astype(np.float32) - np.float32(32))  # (n, 16)
    q = fit.round_to(groups, scale, np.zeros_like(scale), -4, 3, q).reshape(-1, BLOCK_SIZE)
    blocks["hmask"] = fit.pack_planes(q >> 2, 1)
    blocks["qs"] = fit.pack_planes((q & np.uint8(3)).reshape(-1, 128), 2).reshape(-1, 64)
    return blocks
