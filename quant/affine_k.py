"""What Q2_K, Q4_K and Q5_K share: groups of x = scale * q - min, whose scales and mins are integers
times the d and dmin of a block."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from quant import fit
from quant.packing import scale_column

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]
#: (blocks, scales, mins, q): writes all fields of the blocks but d and dmin.
Pack = Callable[[np.ndarray, Levels, Levels, Levels], None]


def quantize(
    layout: "np.dtype[np.void]",
    groups: Floats,
    found: tuple[Floats, Floats, Levels],
    highest: int,
    most: int,
    pack: Pack,
) -> np.ndarray:
    """groups (n, size) and their scale, low and q, 0..highest -> blocks; scales are 0..most."""
    scale, low, q = found
    per_block = 256 // groups.shape[1]
    blocks = np.empty(len(groups) // per_block, layout)
    blocks["d"], scales = fit.share(scale.reshape(-1, per_block), most)
    blocks["dmin"], mins = fit.share(low.reshape(-1, per_block), most)
    return _finish(blocks, scales, mins, groups, q, highest, pack)


def quantize_weighted(
    layout: "np.dtype[np.void]",
    groups: Floats,
    importance: Floats,
    highest: int,
    most: int,
    pack: Pack,
) -> np.ndarray:
    """The same with what ggml-quants.c does where each value has an importance (n, size)."""
    scale, low, q = fit.affine_weighted(groups, importance, highest)
    per_block = 256 // groups.shape[1]
    sums = fit.sums(importance).reshape(-1, per_block)
    blocks = np.empty(len(sums), layout)
    blocks["d"], scales = fit.positive(scale.reshape(-1, per_block), sums, most)
    blocks["dmin"], mins = fit.positive(low.reshape(-1, per_block), sums, most)
    return _finish(blocks, scales, mins, groups, q, highest, pack)


def _finish(
    blocks: np.ndarray,
    scales: Levels,
    mins: Levels,
    groups: Floats,
    q: Levels,
    highest: int,
    pack: Pack,
) -> np.ndarray:
    """Round again, to the scales as they are written; q holds where a scale is 0."""
    scale, low = scale_column(blocks, "d") * scales, scale_column(blocks, "dmin") * mins
    pack(blocks, scales, mins, fit.round_to(groups, scale, low, 0, highest, q))
    return blocks
