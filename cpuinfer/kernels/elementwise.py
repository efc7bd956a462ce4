"""RMSNorm, rotary position embedding, SwiGLU's gate: what acts on each number of a row.

Loops over independent numbers are plain: without fastmath, vectorizing them changes no bit.  The
one sum, of squares, is 16 lane sums added in a fixed tree.  With one thread no parallel region is
entered: for a single token that costs more than it saves, above all on a busy machine.
"""

import numpy as np
from numba import njit, prange

from cpuinfer.kernels.jit import kernel
from cpuinfer.kernels.simd import LANES, Emitter, Value, emitted


@emitted
def _sum_squares(e: Emitter, x: Value, chunks: Value, out: Value) -> None:
    sums = [e.variable(e.zeros()) for _ in range(e.parts)]
    with e.loop(chunks) as chunk:
        for part in range(e.parts):
            v = e.load_floats(e.at(e.at(x, part * e.width, 4), chunk, 4 * LANES))
            e.set(sums[part], e.fma(v, v, e.get(sums[part])))
    e.store(e.sum_lanes([e.get(s) for s in sums]), out)


@njit(error_model="numpy")
def _rms_norm_part(thread, x, weight, eps, squares, out, threads):  # type: ignore[no-untyped-def]
    tokens, dim = x.shape
    for t in range(thread * tokens // threads, (thread + 1) * tokens // threads):
        _sum_squares(x[t].ctypes.data, dim // 16, squares[t:].ctypes.data)
        for i in range(dim // 16 * 16, dim):
            squares[t] += x[t, i] * x[t, i]
        scale = np.float32(1.0) / np.sqrt(squares[t] / np.float32(dim) + eps)
        for i in range(dim):
            out[t, i] = x[t, i] * scale * weight[i]


@kernel("rms_norm", "void(f4[:,::1],f4[::1],f4,f4[::1],f4[:,::1],i8)", parallel=True)
def RMS_NORM(x, weight, eps, squares, out, threads):  # type: ignore[no-untyped-def]
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row (arXiv 1910.07467).

    x, out (T, D) float32; weight (D,); squares (T,) receives the sums of squares.
    """
    if threads == 1:
        _rms_norm_part(0, x, weight, eps, squares, out, 1)
    else:
        for thread in prange(threads):
            _rms_norm_part(thread, x, weight, eps, squares, out, threads)


@njit(error_model="numpy")
def _rope_part(thread, x, cos, sin, threads):  # type: ignore[no-untyped-def]
    tokens, heads, _ = x.shape
    pairs = cos.shape[1]
    for t in range(thread * tokens // threads, (thread + 1) * tokens // threads):
        for head in range(heads):
            for i in range(pairs):
                even, odd = x[t, head, 2 * i], x[t, head, 2 * i + 1]
                x[t, head, 2 * i] = even * cos[t, i] - odd * sin[t, i]
                x[t, head, 2 * i + 1] = even * sin[t, i] + odd * cos[t, i]


@kernel("rope", "void(f4[:,:,::1],f4[:,::1],f4[:,::1],i8)", parallel=True)
def ROPE(x, cos, sin, threads):  # type: ignore[no-untyped-def]
    """Rotate the adjacent pairs (2i, 2i + 1) of every head in place (arXiv 2104.09864).

    x (T, H, d) float32; cos, sin (T, rotated / 2): what lies beyond `rotated` stays.
    """
    if threads == 1:
        _rope_part(0, x, cos, sin, 1)
    else:
        for thread in prange(threads):
            _rope_part(thread, x, cos, sin, threads)


@emitted
def _silu_chunk(e: Emitter, gate: Value, up: Value) -> None:
    """16 numbers of gate become gate / (1 + exp(-gate)) * up."""
    for part in range(e.parts):
        place = e.at(gate, part * e.width, 4)
        g = e.load_floats(place)
        u = e.load_floats(e.at(up, part * e.width, 4))
        denominator = e.b.fadd(e.floats(1.0), e.exp(e.b.fneg(g)))
        e.store(e.b.fmul(e.b.fdiv(g, denominator), u), place)


@njit(error_model="numpy")
def _silu_mul_part(thread, gate, up, threads):  # type: ignore[no-untyped-def]
    chunks = gate.size // 16
    for c in range(thread * chunks // threads, (thread + 1) * chunks // threads):
        _silu_chunk(gate.ctypes.data + 64 * c, up.ctypes.data + 64 * c)


@kernel("silu_mul", "void(f4[::1],f4[::1],i8)", parallel=True)
def SILU_MUL(gate, up, threads):  # type: ignore[no-untyped-def]
    """gate = silu(gate) * up in place; both (n,) float32, n a multiple of 16 (arXiv 2002.05202)."""
    if threads == 1:
        _silu_mul_part(0, gate, up, 1)
    else:
        for thread in prange(threads):
            _silu_mul_part(thread, gate, up, threads)
