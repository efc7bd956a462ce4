"""What a layer is made of: check shapes, allocate the result, call the kernel for the type.

Models call these by name; kernels check nothing, so this is the last place that does.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cpuinfer.cache import KVCache, padded
from cpuinfer.gguf import QTensor
from cpuinfer.kernels import attention, elementwise, q4_0, q4_k, q5_k, q6_k, q8_0
from cpuinfer.kernels.activations import QUANTIZE
from cpuinfer.kernels.floats import BF16_MATMUL, F16_MATMUL, F32_MATMUL
from cpuinfer.kernels.integer import Correction, Format
from cpuinfer.kernels.jit import Kernel, config
from cpuinfer.kernels.pack import PACK_16, PACK_32
from quant import dequantize
from quant.ggml_types import GGMLType

Floats = npt.NDArray[np.float32]

#: Types whose rows are multiplied as integers, and those multiplied as floats; all others are
#: dequantized some rows at a time and multiplied as F32.
INTEGER: dict[GGMLType, tuple[Format, Kernel]] = {
    GGMLType.Q4_0: (q4_0.FORMAT, q4_0.MATMUL),
    GGMLType.Q8_0: (q8_0.FORMAT, q8_0.MATMUL),
    GGMLType.Q4_K: (q4_k.FORMAT, q4_k.MATMUL),
    GGMLType.Q5_K: (q5_k.FORMAT, q5_k.MATMUL),
    GGMLType.Q6_K: (q6_k.FORMAT, q6_k.MATMUL),
}
FLOAT: dict[GGMLType, tuple[Kernel, Kernel]] = {
    GGMLType.F32: (PACK_32, F32_MATMUL),
    GGMLType.F16: (PACK_16, F16_MATMUL),
    GGMLType.BF16: (PACK_16, BF16_MATMUL),
}
PIECE = 256  # rows dequantized at once for a type without a kernel

_NO_BYTES = np.empty(0, np.int8)
_NO_FLOATS = np.empty(0, np.float32)
_NO_INTS = np.empty(0, np.int32)


# --- the compute thread ---


@dataclass
class _Team:
    """Numba's worker threads: a process has one set of them, for one caller at a time."""

    threads: int = 1
    forked: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def mark_forked(self) -> None:
        self.forked = True


_team = _Team()
os.register_at_fork(after_in_child=_team.mark_forked)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Hold the kernels' threads for a pass; RuntimeError in a forked child, which has none."""
    if _team.forked:
        raise RuntimeError("the process was forked after cpuinfer was loaded: use spawn instead")
    with _team.lock:
        _team.threads = min(threads, config.NUMBA_NUM_THREADS)
        numba.set_num_threads(_team.threads)
        yield


def kernels_for(qtypes: set[GGMLType], kv_type: str) -> list[Kernel]:
    """The kernels a model with matrices of these types needs, to be made ready before its use."""
    needed = [
        attention.ATTEND[kv_type],
        attention.APPEND[kv_type],
        elementwise.RMS_NORM,
        elementwise.ROPE,
        elementwise.SILU_MUL,
    ]
    for qtype in sorted(qtypes):
        if qtype in INTEGER:
            form, matmul = INTEGER[qtype]
            needed += [PACK_32, QUANTIZE[form.correction], matmul]
        else:
            needed += FLOAT.get(qtype, FLOAT[GGMLType.F32])
    return list(dict.fromkeys(needed))


# --- matrices ---


@dataclass(frozen=True)
class Weight:
    """A matrix ready for `linear`: its rows packed 16 side by side (kernels/pack.py).

    words (groups, blocks, words, 16) uint32 or uint16; halves (groups, blocks or 0, 16) uint16.
    A type without a kernel keeps the rows of the file in `rows`, and its words are empty.
    """

    name: str
    qtype: GGMLType
    shape: tuple[int, int]  # rows, cols
    words: npt.NDArray[np.uint32 | np.uint16]
    halves: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.uint8]


def pack(tensor: QTensor) -> Weight:
    """A two-dimensional tensor as a Weight; the bytes are copied once, none is changed."""
    rows, cols = tensor.shape
    groups = -(-rows // 16)
    data = tensor.data
    if tensor.qtype in INTEGER:
        form, _ = INTEGER[tensor.qtype]
        blocks = cols // tensor.qtype.block_size
        words = _aligned((groups, blocks, form.words, 16), np.dtype(np.uint32))
        halves = np.empty((groups, blocks if form.half is not None else 0, 16), np.uint16)
        PACK_32(data, form.first_word, words, form.half or 0, halves, _team.threads)
        return Weight(tensor.name, tensor.qtype, (rows, cols), words, halves, data[:0])
    if tensor.qtype in FLOAT:
        words, halves = _pack_floats(data, tensor.qtype, cols)
        return Weight(tensor.name, tensor.qtype, (rows, cols), words, halves, data[:0])
    nothing = np.empty((0, 0, 0, 16), np.uint32)
    no_halves = np.empty((0, 0, 16), np.uint16)
    return Weight(tensor.name, tensor.qtype, (rows, cols), nothing, no_halves, data)


def _pack_floats(
    data: npt.NDArray[np.uint8], qtype: GGMLType, cols: int
) -> tuple[npt.NDArray[np.uint32 | np.uint16], npt.NDArray[np.uint16]]:
    number = np.dtype(np.uint32 if qtype.block_bytes == 4 else np.uint16)
    words = _aligned((-(-len(data) // 16), 1, cols, 16), number)
    halves = np.empty((len(words), 0, 16), np.uint16)
    FLOAT[qtype][0](data, 0, words, 0, halves, _team.threads)
    return words.reshape(len(words), cols, 1, 16), halves  # one column a block


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """An uninitialised array that begins at a cache line."""
    count = int(np.prod(shape))
    raw = np.empty(count * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)


def linear(x: Floats, *weights: Weight) -> list[Floats]:
    """x (T, cols) times each weight (rows, cols): [(T, rows), ...], all float32.

    Block formats with a kernel meet x rounded to 8 bits for each 32 values; others meet x itself.
    """
    quantized: dict[tuple[Correction, int], tuple[npt.NDArray[Any], Floats, npt.NDArray[Any]]] = {}
    results = []
    for w in weights:
        if x.shape[1] != w.shape[1]:
            raise ValueError(f"{w.name} has {w.shape[1]} columns, got {x.shape[1]} activations")
        if w.qtype in INTEGER:
            form, matmul = INTEGER[w.qtype]
            kind = (form.correction, form.offset)
            if kind not in quantized:
                quantized[kind] = _quantize(x, *kind)
            out = np.empty((len(x), 16 * len(w.words)), np.float32)
            matmul(*quantized[kind], w.words, w.halves, out, _team.threads)
        elif w.qtype in FLOAT:
            out = _float_matmul(x, FLOAT[w.qtype][1], w.words, w.halves)
        else:
            out = _linear_plain(x, w)
        # Rows that only fill up the last group are cut off.
        results.append(out if out.shape[1] == w.shape[0] else out[:, : w.shape[0]].copy())
    return results


def _quantize(
    x: Floats, correction: Correction, offset: int
) -> tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.int32]]:
    blocks = x.size // 32
    q, d = np.empty(x.size, np.int8), np.empty(blocks, np.float32)
    corrections = np.empty(blocks * (2 if correction is Correction.HALF_OFFSETS else 1), np.int32)
    QUANTIZE[correction](x, q, d, corrections, -offset, _team.threads)
    return q, d, corrections


def _float_matmul(
    x: Floats, matmul: Kernel, words: npt.NDArray[Any], halves: npt.NDArray[Any]
) -> Floats:
    out = np.empty((len(x), 16 * len(words)), np.float32)
    matmul(
        x.reshape(-1).view(np.int8),
        _NO_FLOATS,
        _NO_INTS,
        words,
        halves,
        out,
        _team.threads,
    )
    return out


def _linear_plain(x: Floats, w: Weight) -> Floats:
    """Slow and right for every type: some rows dequantized, packed, multiplied, forgotten."""
    rows, cols = w.shape
    out = np.empty((len(x), rows), np.float32)
    for start in range(0, rows, PIECE):
        piece = np.ascontiguousarray(dequantize(w.rows[start : start + PIECE], w.qtype))
        words, halves = _pack_floats(piece.view(np.uint8), GGMLType.F32, cols)
        end = start + len(piece)
        out[:, start:end] = _float_matmul(x, F32_MATMUL, words, halves)[:, : len(piece)]
    return out


def embed(tokens: npt.NDArray[np.int32], table: QTensor) -> Floats:
    """Rows `tokens` (T,) of the embedding table as float32 (T, D)."""
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < table.shape[0]):
        raise ValueError(f"token ids are 0 to {table.shape[0] - 1}, got {tokens.tolist()}")
    return np.ascontiguousarray(dequantize(table.data[tokens], table.qtype))


# --- between the matrices ---


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x (T, D) / root mean square * weight (D,)."""
    assert x.shape[1] == len(weight)
    out = np.empty_like(x)
    squares = np.empty(len(x), np.float32)
    elementwise.RMS_NORM(x, weight, np.float32(eps), squares, out, _team.threads)
    return out


def rope(x: Floats, cos: Floats, sin: Floats) -> None:
    """Turn x (T, H, d) in place by the angles of cos, sin (T, rope_dim / 2)."""
    assert len(x) == len(cos) and 2 * cos.shape[1] <= x.shape[2]
    elementwise.ROPE(x, cos, sin, _team.threads)


def silu_mul(gate: Floats, up: Floats) -> Floats:
    """silu(gate) * up, both (T, F); gate's memory is used for the result where possible."""
    assert gate.shape == up.shape
    if gate.size % 16:
        filled = [np.zeros(-(-gate.size // 16) * 16, np.float32) for _ in range(2)]
        for flat, values in zip(filled, (gate, up), strict=True):
            flat[: gate.size] = values.reshape(-1)
        elementwise.SILU_MUL(*filled, _team.threads)
        return filled[0][: gate.size].reshape(gate.shape)
    elementwise.SILU_MUL(gate.reshape(-1), up.reshape(-1), _team.threads)
    return gate


def attend(
    q: Floats, k: Floats, v: Floats, cache: KVCache, layer: int, window: int | None
) -> Floats:
    """Write k, v (T, K, d) to the cache's layer at its offset and let q (T, H, d) see it.

    A query at position p sees positions max(0, p - window + 1) to p; scores are scaled by
    1 / sqrt(d).  Returns (T, H, d).  The offset stays: it moves once for all layers.
    """
    tokens, head_dim = len(q), q.shape[2]
    keys, values = cache.keys[layer], cache.values[layer]
    end = cache.offset + tokens
    sees = end if window is None else min(window, end)
    if sees + tokens - 1 > cache.capacity and end > cache.capacity:
        raise ValueError(f"{tokens} tokens at {cache.offset} overrun a cache of {cache.capacity}")
    q, k, v = (_pad_heads(x) for x in (q, k, v))
    attention.APPEND[cache.kv_type](keys, k, cache.offset)
    attention.APPEND[cache.kv_type](values, v, cache.offset)
    group, threads = q.shape[1] // k.shape[1], _team.threads
    scores = np.empty((threads, group, padded(sees)), np.float32)
    out = np.empty_like(q)
    scale = np.float32(1.0 / np.sqrt(head_dim))
    limit = end if window is None else window
    attend_kernel = attention.ATTEND[cache.kv_type]
    attend_kernel(q, keys, values, cache.offset, limit, scale, scores, out, threads)
    return out if q.shape[2] == head_dim else np.ascontiguousarray(out[:, :, :head_dim])


def _pad_heads(x: Floats) -> Floats:
    missing = padded(x.shape[2]) - x.shape[2]
    return np.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x
