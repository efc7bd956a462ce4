"""The twelve bytes of Q4_K and Q5_K that hold eight 6-bit scales and eight 6-bit mins.

    bytes 0-3    low 6 bits: scale 0..3      high 2 bits: the top of scale 4..7
    bytes 4-7    low 6 bits: min 0..3        high 2 bits: the top of min 4..7
    bytes 8-11   low 4 bits of scale 4..7 (low half) and of min 4..7 (high half)

get_scale_min_k4 of ggml-quants.c.
"""

import numpy as np
from numpy.typing import NDArray

from quant import fit


def unpack(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(n, 12) uint8 -> scales (n, 8) uint8 and mins (n, 8) uint8, 0..63"""
    scale, low, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]  # (n, 4) each
    scales = np.concatenate([scale & 63, rest & 15 | (scale & 0xC0) >> 2], axis=1)
    mins = np.concatenate([low & 63, rest >> 4 | (low & 0xC0) >> 2], axis=1)
    return scales, mins


def pack(scales: NDArray[np.uint8], mins: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `unpack`: scales (n, 8) and mins (n, 8), 0..63 -> (n, 12) uint8"""
    high = np.concatenate([scales[:, 4:], mins[:, 4:]], axis=1) >> 4 << 6  # (n, 8)
    first = np.concatenate([scales[:, :4], mins[:, :4]], axis=1) | high
    last = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.concatenate([first, last], axis=1)


def importance(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a value's error weighs where nobody says: its size and that of its group (n, 32)."""
    mean: NDArray[np.float32] = np.sqrt(fit.sums(groups * groups) / np.float32(32))
    return mean[:, None] + np.abs(groups)
