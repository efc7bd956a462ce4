"""Q8_0: 32 weights in 34 bytes.

    d    half            scale
    qs   32 signed bytes

weight[i] = d * qs[i]
"""

import numpy as np
from numpy.typing import NDArray

from quant.packing import scale_column
from quant.rounding import inverse, round_half_away

BLOCK_SIZE = 32
LAYOUT = np.dtype([("d", "<f2"), ("qs", "i1", (32,))])
assert LAYOUT.itemsize == 34


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 32) float32"""
    return blocks["qs"].astype(np.float32) * scale_column(blocks, "d")


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 32) float32 -> (n,) LAYOUT, as quantize_row_q8_0_ref of ggml-quants.c"""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)  # (n, 1)
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"] = scale[:, 0]
    blocks["qs"] = round_half_away(x * inverse(scale))
    return blocks
