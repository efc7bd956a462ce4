"""RMSNorm, rotary position embedding, SwiGLU's gate: what acts on each number of a row.

Loops over independent numbers are plain: without fastmath, vectorizing them changes no bit.  The
one sum, of squares, is 16 lane sums added in a fixed tree.
"""

import numpy as np

from cpuinfer.kernels.jit import kernel
from cpuinfer.kernels.parallel import shared
from cpuinfer.kernels.simd import LANES, Emitter, Value, emitted

#: Numbers that take longer than it takes other threads to join: some microseconds.
PIECE = 1 << 12


@emitted
def _sum_squares(e: Emitter, x: Value, chunks: Value, out: Value) -> None:
    sums = [e.variable(e.zeros()) for _ in range(e.parts)]
    with e.loop(chunks) as chunk:
        for part in range(e.parts):
            v = e.load_floats(e.at(e.at(x, part * e.width, 4), chunk, 4 * LANES))
            e.set(sums[part], e.fma(v, v, e.get(sums[part])))
    e.store(e.sum_lanes([e.get(s) for s in sums]), out)


@shared("rms_norm_rows")
def _rms_norm(begin, end, seat, x, weight, eps, squares, out):  # type: ignore[no-untyped-def]
    dim = x.shape[1]
    for t in range(begin, end):
        _sum_squares(x[t].ctypes.data, dim // 16, squares[t:].ctypes.data)
        for i in range(dim // 16 * 16, dim):
            squares[t] += x[t, i] * x[t, i]
        scale = np.float32(1.0) / np.sqrt(squares[t] / np.float32(dim) + eps)
        for i in range(dim):
            out[t, i] = x[t, i] * scale * weight[i]


@kernel("rms_norm", "void(f4[:,::1],f4[::1],f4,f4[::1],f4[:,::1],i8)")
def RMS_NORM(x, weight, eps, squares, out, table):  # type: ignore[no-untyped-def]
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row (arXiv 1910.07467).

    x, out (T, D) float32; weight (D,); squares (T,) receives the sums of squares.
    """
    tokens, dim = x.shape
    _rms_norm(table, tokens, max(1, PIECE // dim), (x, weight, eps, squares, out))


@shared("rope_rows")
def _rope(begin, end, seat, x, cos, sin):  # type: ignore[no-untyped-def]
    pairs = cos.shape[1]
    for t in range(begin, end):
        for head in range(x.shape[1]):
            for i in range(pairs):
                even, odd = x[t, head, 2 * i], x[t, head, 2 * i + 1]
                x[t, head, 2 * i] = even * cos[t, i] - odd * sin[t, i]
                x[t, head, 2 * i + 1] = even * sin[t, i] + odd * cos[t, i]


@kernel("rope", "void(f4[:,:,::1],f4[:,::1],f4[:,::1],i8)")
def ROPE(x, cos, sin, table):  # type: ignore[no-untyped-def]
    """Rotate the adjacent pairs (2i, 2i + 1) of every head in place (arXiv 2104.09864).

    x (T, H, d) float32; cos, sin (T, rotated / 2): what lies beyond `rotated` stays.
    """
    tokens, heads, size = x.shape
    _rope(table, tokens, max(1, PIECE // (heads * size)), (x, cos, sin))


@emitted
def _silu_chunk(e: Emitter, gate: Value, up: Value) -> None:
    """16 numbers of gate become gate / (1 + exp(-gate)) * up."""
    for part in range(e.parts):
        place = e.at(gate, part * e.width, 4)
        g = e.load_floats(place)
        u = e.load_floats(e.at(up, part * e.width, 4))
        denominator = e.b.fadd(e.floats(1.0), e.exp(e.b.fneg(g)))
        e.store(e.b.fmul(e.b.fdiv(g, denominator), u), place)


@shared("silu_mul_chunks")
def _silu_mul(begin, end, seat, gate, up):  # type: ignore[no-untyped-def]
    for c in range(begin, end):
        _silu_chunk(gate.ctypes.data + 64 * c, up.ctypes.data + 64 * c)


@kernel("silu_mul", "void(f4[::1],f4[::1],i8)")
def SILU_MUL(gate, up, table):  # type: ignore[no-untyped-def]
    """gate = silu(gate) * up in place; both (n,) float32, n a multiple of 16 (arXiv 2002.05202)."""
    _silu_mul(table, gate.size // 16, PIECE // 16, (gate, up))
