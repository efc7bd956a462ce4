"""Small integers in bytes, in the order GGML stores them, and the halves that scale them.

A run of `width` bytes holds 8 / bits times as many values in planes: the lowest `bits` bits of all
its bytes are the first `width` values, the next bits the next `width` values, and so on.
"""

import numpy as np
from numpy.typing import NDArray


def unpack_planes(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(..., width) uint8 -> (..., 8 // bits * width) uint8 below 2**bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    planes = packed[..., None, :] >> shifts[:, None]  # (..., 8 // bits, width)
    planes &= np.uint8(2**bits - 1)
    return planes.reshape(*packed.shape[:-1], -1)


def scale_column(blocks: np.ndarray, field: str) -> NDArray[np.float32]:
    """A half of each block, (n,) LAYOUT -> (n, 1) float32."""
    column: NDArray[np.float32] = blocks[field].astype(np.float32)[:, None]
    return column
