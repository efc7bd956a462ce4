"""The GGML block formats: layout, dequantize, quantize.

One module a format, with BLOCK_SIZE (values), LAYOUT (a block as a structured dtype),
`dequantize_blocks`, `quantize_blocks` and, where GGML has it, `quantize_weighted`. The arithmetic
is float32 in GGML's own order, so results are GGML's bit for bit. Dequantizing is NumPy alone; what
quantizing searches for is found by compiled code (fit.py), which is loaded when it is needed.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from quant import bf16, f16, f32, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from quant.ggml_types import GGMLType

FORMATS: dict[GGMLType, ModuleType] = {
    GGMLType.F32: f32,
    GGMLType.F16: f16,
    GGMLType.BF16: bf16,
    GGMLType.Q4_0: q4_0,
    GGMLType.Q4_1: q4_1,
    GGMLType.Q5_0: q5_0,
    GGMLType.Q5_1: q5_1,
    GGMLType.Q8_0: q8_0,
    GGMLType.Q2_K: q2_k,
    GGMLType.Q3_K: q3_k,
    GGMLType.Q4_K: q4_k,
    GGMLType.Q5_K: q5_k,
    GGMLType.Q6_K: q6_k,
}

# The types that can make use of an importance for each column.
WEIGHTED = tuple(qtype for qtype in FORMATS if hasattr(FORMATS[qtype], "quantize_weighted"))

# Values worked on at a time: temporaries stay in the cache, and small beside a tensor.
_STEP = 1 << 16


def dequantize(data: np.ndarray, qtype: GGMLType) -> NDArray[np.float32]:
    """(..., row_bytes) uint8 -> (..., cols) float32; ValueError for half a block."""
    if data.dtype != np.uint8 or data.ndim == 0:
        raise ValueError(f"packed rows are uint8 arrays, got {data.dtype} of shape {data.shape}")
    if data.shape[-1] % qtype.block_bytes:
        raise ValueError(
            f"{qtype.name} rows are multiples of {qtype.block_bytes} bytes, got {data.shape[-1]}"
        )
    fmt = FORMATS[qtype]
    blocks = np.ascontiguousarray(data).reshape(-1).view(fmt.LAYOUT)
    out = np.empty((len(blocks), fmt.BLOCK_SIZE), np.float32)
    step = _STEP // fmt.BLOCK_SIZE
    # A damaged block may hold infinities; what comes of them is NaN, as in C, and no warning.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = fmt.dequantize_blocks(blocks[start : start + step])
    return out.reshape(*data.shape[:-1], data.shape[-1] // qtype.block_bytes * fmt.BLOCK_SIZE)


def quantize(x: NDArray[np.float32], qtype: GGMLType) -> NDArray[np.uint8]:
    """(..., cols) float32 -> (..., row_bytes) uint8

    ValueError for rows that blocks do not divide, and in block formats for values that are not
    finite or whose scale is too large for the format (for F16: the value itself).
    """
    fmt = FORMATS[qtype]
    packed_shape = _packed_shape(x, qtype)
    values = np.ascontiguousarray(x).reshape(-1, fmt.BLOCK_SIZE)
    return _in_steps(values, fmt.quantize_blocks, qtype).reshape(packed_shape)


def quantize_weighted(
    x: NDArray[np.float32], weights: NDArray[np.float32], qtype: GGMLType
) -> NDArray[np.uint8]:
    """(..., cols) float32, importance (cols,) float32 -> (..., row_bytes) uint8

    The errors of a column count as much as its importance says. `qtype` is one of WEIGHTED;
    ValueError as for `quantize`.
    """
    packed_shape = _packed_shape(x, qtype)
    if weights.dtype != np.float32 or weights.shape != x.shape[-1:]:
        raise ValueError(f"wanted {x.shape[-1]} float32 weights, got {weights.shape}")
    weighted = partial(FORMATS[qtype].quantize_weighted, weights=weights)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return _in_steps(rows, weighted, qtype).reshape(packed_shape)


def _packed_shape(x: NDArray[np.float32], qtype: GGMLType) -> tuple[int, ...]:
    if x.dtype != np.float32 or x.ndim == 0:
        raise ValueError(f"values are float32 arrays, got {x.dtype} of shape {x.shape}")
    return (*x.shape[:-1], qtype.row_bytes(x.shape[-1]))


def _in_steps(
    rows: NDArray[np.float32], quantizer: Callable[[np.ndarray], np.ndarray], qtype: GGMLType
) -> NDArray[np.uint8]:
    """Rows (n, cols) through a quantizer, some at a time -> (n * cols / BLOCK_SIZE, block_bytes)"""
    fmt = FORMATS[qtype]
    per_row = rows.shape[1] // fmt.BLOCK_SIZE
    out = np.empty((len(rows) * per_row, qtype.block_bytes), np.uint8)
    step = max(1, _STEP // rows.shape[1])
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            blocks = quantizer(some)
            _check_range(blocks, some.reshape(-1, fmt.BLOCK_SIZE), qtype)
            place = slice(start * per_row, start * per_row + len(blocks))
            out[place] = blocks.view(np.uint8).reshape(len(blocks), -1)
    return out


def _check_range(blocks: np.ndarray, values: np.ndarray, qtype: GGMLType) -> None:
    """ValueError where a finite weight became infinite or a block's scale is no number."""
    if blocks.dtype.names is None:
        if qtype is not GGMLType.F16:
            return
        bad = (blocks.view(np.uint16) & 0x7FFF) == 0x7C00  # infinite
        if bad.any():
            bad &= np.isfinite(values[:, 0])
    else:
        scales = [blocks[name] for name in ("d", "m", "dmin") if name in blocks.dtype.names]
        bad = ~np.logical_and.reduce([np.isfinite(scale) for scale in scales])
        if not np.isfinite(values).all():
            bad |= ~np.isfinite(values).all(axis=1)
    if bad.any():
        worst = np.abs(values[bad.argmax()]).max()
        raise ValueError(f"{qtype.name} cannot hold a block whose largest value is {worst:g}")
