"""Q8_0: 32 weights in 34 bytes.

    d    half            scale
    qs   32 signed bytes

weight[i] = d * qs[i]
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column

BLOCK_SIZE = 32
LAYOUT = np.dtype([("d", "<f2"), ("qs", "i1", (32,))])
assert LAYOUT.itemsize == 34


def dequantize_blocks(blocks: np.ndarray) -> NDArray[np.float32]:
    """(n,) LAYOUT -> (n, 32) float32"""
    return blocks["qs"].astype(np.float32) * scale_column(blocks, "d")


def quantize_blocks(x: NDArray[np.float32]) -> np.ndarray:
    """(n, 32) float32 -> (n,) LAYOUT, as quantize_row_q8_0_ref of ggml-quants.c"""
    blocks = np.empty(len(x), LAYOUT)
    blocks["d"], blocks["qs"] = fit.to_127(x)
    return blocks
