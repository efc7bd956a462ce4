"""Matrices in memory: the file's rows, packed for the kernels of their type."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpuinfer.gguf import QTensor
from cpuinfer.kernels import q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from cpuinfer.kernels.floats import BF16_MATMUL, F16_MATMUL, F32_MATMUL
from cpuinfer.kernels.integer import Format
from cpuinfer.kernels.jit import Kernel
from cpuinfer.kernels.pack import PACK_16, PACK_32
from cpuinfer.team import team
from quant.ggml_types import GGMLType

#: Types whose rows are multiplied as integers, and those multiplied as floats; all others are
#: dequantized some rows at a time and multiplied as F32.
INTEGER: dict[GGMLType, tuple[Format, Kernel]] = {
    GGMLType.Q4_0: (q4_0.FORMAT, q4_0.MATMUL),
    GGMLType.Q4_1: (q4_1.FORMAT, q4_1.MATMUL),
    GGMLType.Q5_0: (q5_0.FORMAT, q5_0.MATMUL),
    GGMLType.Q5_1: (q5_1.FORMAT, q5_1.MATMUL),
    GGMLType.Q8_0: (q8_0.FORMAT, q8_0.MATMUL),
    GGMLType.Q3_K: (q3_k.FORMAT, q3_k.MATMUL),
    GGMLType.Q4_K: (q4_k.FORMAT, q4_k.MATMUL),
    GGMLType.Q5_K: (q5_k.FORMAT, q5_k.MATMUL),
    GGMLType.Q6_K: (q6_k.FORMAT, q6_k.MATMUL),
}
FLOAT: dict[GGMLType, tuple[Kernel, Kernel]] = {
    GGMLType.F32: (PACK_32, F32_MATMUL),
    GGMLType.F16: (PACK_16, F16_MATMUL),
    GGMLType.BF16: (PACK_16, BF16_MATMUL),
}


@dataclass(frozen=True)
class Weight:
    """One or more matrices of the same width, ready for `linear`.

    Their rows are packed 16 side by side (kernels/pack.py), each matrix beginning a new group:
    words (groups, blocks, words, 16) uint32 or uint16; halves (groups, blocks or 0, 16) uint16;
    places (groups, 2) int64: the row its matrix begins at and its rows, both in whole groups.
    A type without a kernel keeps the file's `rows` of its one matrix, and its words are empty.
    """

    name: str
    qtype: GGMLType
    cols: int
    parts: tuple[int, ...]  # rows of each matrix
    words: npt.NDArray[np.uint32 | np.uint16]
    halves: npt.NDArray[np.uint16]
    places: npt.NDArray[np.int64]
    rows: npt.NDArray[np.uint8]


def pack(*tensors: QTensor) -> Weight:
    """Two-dimensional tensors as one Weight: one pass over the threads multiplies them all.

    They have the same columns and the same type, which has a kernel if they are several.  The bytes
    are copied once, none is changed.
    """
    first = tensors[0]
    qtype, cols = first.qtype, first.shape[1]
    parts = tuple(tensor.shape[0] for tensor in tensors)
    name = ", ".join(tensor.name for tensor in tensors)
    assert {(t.qtype, t.shape[1]) for t in tensors} == {(qtype, cols)}
    if not has_kernel(qtype):
        (only,) = tensors
        nothing, no_halves = _room(GGMLType.F32, 0, cols)
        return Weight(name, qtype, cols, parts, nothing, no_halves, _places(()), only.data)
    groups = sum(-(-rows // 16) for rows in parts)
    words, halves = _room(qtype, groups, cols)
    group = 0
    for tensor, rows in zip(tensors, parts, strict=True):
        end = group - (-rows // 16)
        _pack_rows(tensor.data, qtype, words[group:end], halves[group:end])
        group = end
    return Weight(name, qtype, cols, parts, words, halves, _places(parts), first.data[:0])


def has_kernel(qtype: GGMLType) -> bool:
    """Whether rows of this type are multiplied as they are; others are dequantized each time."""
    return qtype in INTEGER or qtype in FLOAT


def _places(parts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    places: list[tuple[int, int]] = []
    for rows in parts:
        groups = -(-rows // 16)
        places += [(16 * len(places), 16 * groups)] * groups
    return np.array(places, np.int64).reshape(-1, 2)


def _room(
    qtype: GGMLType, groups: int, cols: int
) -> tuple[npt.NDArray[np.uint32 | np.uint16], npt.NDArray[np.uint16]]:
    """Uninitialised words and halves for groups of rows of `cols` values."""
    if qtype in INTEGER:
        form, _ = INTEGER[qtype]
        blocks = cols // qtype.block_size
        words = _aligned((groups, blocks, form.words, 16), np.dtype(np.uint32))
        return words, np.empty((groups, blocks if form.half is not None else 0, 16), np.uint16)
    number = np.dtype(np.uint32 if qtype.block_bytes == 4 else np.uint16)
    return _aligned((groups, cols, 1, 16), number), np.empty((groups, 0, 16), np.uint16)


def _pack_rows(
    data: npt.NDArray[np.uint8],
    qtype: GGMLType,
    words: npt.NDArray[np.uint32 | np.uint16],
    halves: npt.NDArray[np.uint16],
) -> None:
    """Rows of the file into their groups."""
    if qtype in INTEGER:
        form, _ = INTEGER[qtype]
        PACK_32(data, form.first_word, words, form.half or 0, halves, team.table)
    else:
        whole_row = words.reshape(len(words), 1, -1, 16)  # to the packer a row is one block
        FLOAT[qtype][0](data, 0, whole_row, 0, halves, team.table)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An uninitialised array that begins at a cache line."""
    count = int(np.prod(shape))
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
