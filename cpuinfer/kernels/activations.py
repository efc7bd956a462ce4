"""Rows of activations laid out for tiles of tokens: as 8-bit integers for `integer.py`, as they are
for `floats.py`.

A block is 32 values: scale d = largest magnitude / 127, q = value * (127 / largest) rounded half to
even, zeros where the largest is below 2^-100.  NaN and infinity make d not finite, so they are not
lost.  Tokens are put into tiles as `matmul.py` takes them, and a tile holds [block][token][32], or
[column][token] of floats: what a kernel reads lies together.  (Rows side by side do not: they are
often as far apart as the lines of a set of the cache.)
"""

from typing import Any

from llvmlite import ir
from numba import njit

from cpuinfer.kernels.elementwise import PIECE
from cpuinfer.kernels.integer import Correction
from cpuinfer.kernels.jit import Kernel, kernel
from cpuinfer.kernels.matmul import tile_size
from cpuinfer.kernels.parallel import shared
from cpuinfer.kernels.simd import F32, I8, I32, Emitter, Value, emitted


def quantize_block(e: Emitter, x: Value, q: Value) -> tuple[Value, list[Value]]:
    """32 floats at `x` as bytes at `q`: their scale, and the sums of both halves of the bytes."""
    b = e.b
    vectors = [e.load_floats(e.at(x, i * e.width, 4)) for i in range(32 // e.width)]
    # As integers, magnitudes keep their order and NaN is the largest of all.
    largest = e.ints(0)
    for v in vectors:
        magnitude = b.bitcast(e.magnitude(v), e.i32v)
        largest = b.select(b.icmp_signed(">", magnitude, largest), magnitude, largest)
    reduce = f"llvm.vector.reduce.smax.v{e.width}i32"
    largest = b.bitcast(e.call(reduce, I32, largest), F32)
    scale = b.fdiv(largest, ir.Constant(F32, 127.0))
    zero, tiny = ir.Constant(F32, 0.0), ir.Constant(F32, 2.0**-100)
    inverse = b.fdiv(ir.Constant(F32, 127.0), largest)
    inverse = b.select(b.fcmp_ordered("<", largest, tiny), zero, inverse)
    halves = [ir.Constant(I32, 0), ir.Constant(I32, 0)]
    for i, v in enumerate(vectors):
        integers = b.fptosi(e.round(b.fmul(v, e.splat(inverse))), e.i32v)
        e.store(b.trunc(integers, ir.VectorType(I8, e.width)), e.at(q, i * e.width), 1)
        total = e.call(f"llvm.vector.reduce.add.v{e.width}i32", I32, integers)
        half = i * e.width // 16
        halves[half] = b.add(halves[half], total)
    return scale, halves


def _write_block(kind: Correction) -> Any:
    def block(e: Emitter, x: Value, q: Value, d: Value, correction: Value, offset: Value) -> None:
        """Quantize 32 floats at `x`: bytes to `q`, their scale to `d`, and the correction."""
        scale, halves = quantize_block(e, x, q)
        e.store(scale, d)
        _store_correction(e, kind, halves, scale, offset, correction)

    return block


def _store_correction(
    e: Emitter, kind: Correction, halves: list[Value], scale: Value, offset: Value, address: Value
) -> None:
    """What the format adds for 32 activations: see `integer.py`."""
    b = e.b
    if kind is Correction.HALF_OFFSETS:
        for i, half in enumerate(halves):
            e.store(b.mul(half, b.trunc(offset, I32)), e.at(address, 4 * i))
        return
    total = b.add(*halves)
    if kind is Correction.OFFSET:
        e.store(b.mul(total, b.trunc(offset, I32)), address)
    else:
        e.store(b.fmul(b.sitofp(total, F32), scale), address)


@njit(error_model="numpy")
def _tile_of(token, tokens):  # type: ignore[no-untyped-def]
    """Where the tile begins that a token is in, and its size."""
    start, size = 0, tile_size(tokens)
    while token >= start + size:
        start += size
        size = tile_size(tokens - start)
    return start, size


def _quantizer(kind: Correction) -> Kernel:
    write_block = emitted(_write_block(kind))

    @shared(f"quantize_{kind.name}_rows")
    def rows(begin, end, seat, x, q, d, correction, offset):  # type: ignore[no-untyped-def]
        tokens, cols = x.shape
        blocks = cols // 32
        each = correction.size // d.size
        for t in range(begin, end):
            start, size = _tile_of(t, tokens)
            for block in range(blocks):
                n = start * blocks + block * size + t - start
                write_block(
                    x.ctypes.data + (t * cols + block * 32) * 4,
                    q.ctypes.data + n * 32,
                    d.ctypes.data + n * 4,
                    correction.ctypes.data + n * each * 4,
                    offset,
                )

    @kernel(f"quantize_{kind.name}", "void(f4[:,::1],i1[::1],f4[::1],i4[::1],i8,i8)")
    def quantize(x, q, d, correction, offset, table):  # type: ignore[no-untyped-def]
        """x (tokens, cols) float32 to q, d and correction as `integer.py` wants them.

        offset is what the correction multiplies the sum of the bytes with.
        """
        tokens, cols = x.shape
        rows(table, tokens, max(1, PIECE // cols), (x, q, d, correction, offset))

    return quantize


QUANTIZE = {kind: _quantizer(kind) for kind in Correction}


@shared("arrange_rows")
def _arrange_rows(begin, end, seat, x, out):  # type: ignore[no-untyped-def]
    tokens, cols = x.shape
    for t in range(begin, end):
        start, size = _tile_of(t, tokens)
        for c in range(cols):
            out[start * cols + c * size + t - start] = x[t, c]


@kernel("arrange", "void(f4[:,::1],f4[::1],i8)")
def ARRANGE(x, out, table):  # type: ignore[no-untyped-def]
    """x (tokens, cols) float32 to out (tokens * cols,), tile by tile [column][token]."""
    tokens, cols = x.shape
    _arrange_rows(table, tokens, max(1, PIECE // cols), (x, out))
