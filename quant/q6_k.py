"""Q6_K: 256 weights in 210 bytes, in 16 groups of 16.

    ql       128 bytes         lower four bits; each run of 64 bytes holds 128 values in two planes
    qh       64 bytes          upper two bits; each run of 32 bytes holds 128 values in four planes
    scales   16 signed bytes   one a group
    d        half              scale of the scales

weight = d * scale * (q - 32), q = ql + 16 * qh, 0..63
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column, unpack_planes

BLOCK_SIZE = 256
LAYOUT = np.dtype(
    [("ql", "u1", (128,)), ("qh", "u1", (64,)), ("scales", "i1", (16,)), ("d", "<f2")]
)
assert LAYOUT.itemsize == 210


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 256) float32"""
    four = unpack_planes(blocks["ql"].reshape(-1, 2, 64), 4)  # (n, 2, 128)
    q = four | unpack_planes(blocks["qh"].reshape(-1, 2, 32), 2) << 4
    scale = scale_column(blocks, "d") * blocks["scales"].astype(np.float32)  # (n, 16)
    signed = q.reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    return (scale[..., None] * signed).reshape(-1, BLOCK_SIZE)


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 256) float32 -> (n,) LAYOUT, as quantize_row_q6_K_ref of ggml-quants.c"""
    groups = x.reshape(-1, 16)
    return _pack(groups, *fit.signed(groups, groups * groups, 32))


def quantize_weighted(x: NDArray[np.float32], weights: NDArray[np.float32]) -> np.ndarray:
    """rows (n, cols), importance (cols,) -> blocks, as quantize_row_q6_K_impl of ggml-quants.c"""
    groups = x.reshape(-1, 16)
    importance = np.broadcast_to(weights, x.shape).reshape(-1, 16)
    return _pack(groups, *fit.signed(groups, importance, 32))


def _pack(
    groups: NDArray[np.float32], scale: NDArray[np.float32], q: NDArray[np.uint8]
) -> np.ndarray:
    """Groups (16 n, 16) with their own scales and integers -> blocks that share a scale."""
    scale = scale.reshape(-1, 16)
    furthest = fit.furthest(scale)
    zero = np.abs(furthest) < fit.EPSILON
    factor = np.float32(-128) / furthest  # (n,)
    scales = np.minimum(fit.nearest_int(factor[:, None] * scale), 127).astype(np.int8)
    blocks = np.empty(len(scale), LAYOUT)
    blocks["d"] = np.where(zero, 0, np.float32(1) / factor)
    blocks["scales"] = np.where(zero[:, None], 0, scales)
    scale = scale_column(blocks, "d") * blocks["scales"].astype(np.float32)  # (n, 16)
    q = fit.round_to(groups, scale, np.zeros_like(scale), -32, 31, q).reshape(-1, BLOCK_SIZE)
    q[zero] = 0
    blocks["ql"] = fit.pack_planes((q & np.uint8(15)).reshape(-1, 128), 4).reshape(-1, 128)
    blocks["qh"] = fit.pack_planes((q >> 4).reshape(-1, 128), 2).reshape(-1, 64)
    return blocks
