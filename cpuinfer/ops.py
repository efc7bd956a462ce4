"""What a layer is made of: check shapes, allocate the result, call the kernel for the type.

Models call these by name; kernels check nothing, so this is the last place that does.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from cpuinfer.cache import KVCache, padded
from cpuinfer.gguf import QTensor
from cpuinfer.kernels import attention, elementwise, ring
from cpuinfer.kernels.activations import ARRANGE, QUANTIZE
from cpuinfer.kernels.integer import Correction, panel_bytes
from cpuinfer.kernels.jit import Kernel
from cpuinfer.kernels.matmul import MANY
from cpuinfer.kernels.pack import PACK_32
from cpuinfer.team import team
from cpuinfer.weights import FLOAT, INTEGER, Weight, pack
from quant import dequantize
from quant.ggml_types import GGMLType

Floats = npt.NDArray[np.float32]

PIECE = 256  # rows dequantized at once for a type without a kernel

_NO_FLOATS = np.empty(0, np.float32)
_NO_INTS = np.empty(0, np.int32)
_NO_PANELS = np.empty((0, 0), np.int8)


def kernels_for(qtypes: set[GGMLType], kv_type: str) -> list[Kernel]:
    """The kernels a model with matrices of these types needs, to be made ready before its use."""
    needed = [
        attention.ATTEND[kv_type],
        ring.APPEND[kv_type],
        elementwise.RMS_NORM,
        elementwise.ROPE,
        elementwise.SILU_MUL,
    ]
    for qtype in sorted(qtypes):
        if qtype in INTEGER:
            form, matmul = INTEGER[qtype]
            needed += [PACK_32, QUANTIZE[form.correction], matmul]
        else:
            needed += [*FLOAT.get(qtype, FLOAT[GGMLType.F32]), ARRANGE]
    return list(dict.fromkeys(needed))


def linear(x: Floats, *weights: Weight) -> list[Floats]:
    """x (T, cols) times every matrix (rows, cols) of the weights: [(T, rows), ...], all float32.

    Block formats with a kernel meet x rounded to 8 bits for each 32 values; others meet x itself.
    """
    quantized: dict[tuple[Correction, int], tuple[npt.NDArray[Any], Floats, npt.NDArray[Any]]] = {}
    arranged: Floats | None = None
    results: list[Floats] = []
    for w in weights:
        if x.shape[1] != w.cols:
            raise ValueError(f"{w.name} has {w.cols} columns, got {x.shape[1]} activations")
        if w.qtype in INTEGER:
            form, matmul = INTEGER[w.qtype]
            kind = (form.correction, form.offset)
            if kind not in quantized:
                quantized[kind] = _quantize(x, *kind)
            results += _multiply(matmul, *quantized[kind], w, len(x), panel_bytes(form))
        elif w.qtype in FLOAT:
            if arranged is None:
                arranged = np.empty(x.size, np.float32)
                ARRANGE(x, arranged, team.table)
            matmul = FLOAT[w.qtype][1]
            results += _multiply(matmul, arranged.view(np.int8), _NO_FLOATS, _NO_INTS, w, len(x))
        else:
            results.append(_linear_plain(x, w))
    return results


def _multiply(
    matmul: Kernel,
    x: npt.NDArray[np.int8],
    d: Floats,
    correction: npt.NDArray[np.int32],
    w: Weight,
    tokens: int,
    block_bytes: int = 0,
) -> list[Floats]:
    """One kernel call; the result of each matrix, without rows that only fill up its last group.

    `block_bytes` is what a file block of 16 rows takes in a panel.
    """
    out = np.empty(tokens * 16 * len(w.words), np.float32)
    panels = _NO_PANELS
    if block_bytes and tokens >= MANY:
        panels = np.empty((team.threads, w.words.shape[1] * block_bytes), np.int8)
    matmul(x, d, correction, w.words, w.halves, w.places, panels, out, tokens, team.table)
    results, start = [], 0
    for rows in w.parts:
        end = start + -(-rows // 16) * 16
        result = out[tokens * start : tokens * end].reshape(tokens, end - start)
        results.append(result if end - start == rows else result[:, :rows].copy())
        start = end
    return results


def _quantize(
    x: Floats, correction: Correction, offset: int
) -> tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.int32]]:
    blocks = x.size // 32
    q, d = np.empty(x.size, np.int8), np.empty(blocks, np.float32)
    corrections = np.empty(blocks * (2 if correction is Correction.HALF_OFFSETS else 1), np.int32)
    QUANTIZE[correction](x, q, d, corrections, -offset, team.table)
    return q, d, corrections


def _linear_plain(x: Floats, w: Weight) -> Floats:
    """Slow and right for every type: some rows dequantized, packed, multiplied, forgotten."""
    pieces = []
    for start in range(0, len(w.rows), PIECE):
        values = np.ascontiguousarray(dequantize(w.rows[start : start + PIECE], w.qtype))
        rows = values.view(np.uint8)
        pieces += linear(x, pack(QTensor(w.name, GGMLType.F32, values.shape, rows)))
    return np.concatenate(pieces, axis=1)


def embed(tokens: npt.NDArray[np.int32], table: QTensor) -> Floats:
    """Rows `tokens` (T,) of the embedding table as float32 (T, D)."""
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < table.shape[0]):
        raise ValueError(f"token ids are 0 to {table.shape[0] - 1}, got {tokens.tolist()}")
    return np.ascontiguousarray(dequantize(table.data[tokens], table.qtype))


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x (T, D) / root mean square * weight (D,)."""
    assert x.shape[1] == len(weight)
    out = np.empty_like(x)
    squares = np.empty(len(x), np.float32)
    elementwise.RMS_NORM(x, weight, np.float32(eps), squares, out, team.table)
    return out


def rope(x: Floats, cos: Floats, sin: Floats) -> None:
    """Turn x (T, H, d) in place by the angles of cos, sin (T, rope_dim / 2)."""
    assert len(x) == len(cos) and 2 * cos.shape[1] <= x.shape[2]
    elementwise.ROPE(x, cos, sin, team.table)


def silu_mul(gate: Floats, up: Floats) -> Floats:
    """silu(gate) * up, both (T, F); gate's memory is used for the result where possible."""
    assert gate.shape == up.shape
    if gate.size % 16:
        filled = [np.zeros(-(-gate.size // 16) * 16, np.float32) for _ in range(2)]
        for flat, values in zip(filled, (gate, up), strict=True):
            flat[: gate.size] = values.reshape(-1)
        elementwise.SILU_MUL(*filled, team.table)
        return filled[0][: gate.size].reshape(gate.shape)
    elementwise.SILU_MUL(gate.reshape(-1), up.reshape(-1), team.table)
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
    q, k, v = (_pad_heads(x, padded(head_dim, cache.kv_type)) for x in (q, k, v))
    ring.APPEND[cache.kv_type](keys, k, cache.offset)
    ring.APPEND[cache.kv_type](values, v, cache.offset)
    group = q.shape[1] // k.shape[1]
    prepared = ring.NUMBERS[cache.kv_type].prepared
    scratch = np.empty((team.threads, 4, prepared * q.shape[2]), np.int8)
    scores = np.empty((team.threads, group, -(-sees // 16) * 16), np.float32)
    out = np.empty_like(q)
    scale = np.float32(1.0 / np.sqrt(head_dim))
    limit = end if window is None else window
    attend_kernel = attention.ATTEND[cache.kv_type]
    attend_kernel(q, keys, values, cache.offset, limit, scale, scratch, scores, out, team.table)
    return out if q.shape[2] == head_dim else np.ascontiguousarray(out[:, :, :head_dim])


def _pad_heads(x: Floats, size: int) -> Floats:
    missing = size - x.shape[2]
    return np.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x
