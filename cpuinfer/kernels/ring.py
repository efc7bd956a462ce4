"""How keys and values lie in the ring of a cache (cache.py): single or half precision, or 8 bits.

A row is the key or value of one head at one position, S numbers.  As q8_0 it is S signed bytes and
a half-precision scale for each 32 of them, S / 16 bytes more; S is then a multiple of 64, otherwise
of 16.  Attention works on chunks of a row, 16 lanes of 32 bits each, of which a vector is a part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from cpuinfer.kernels.activations import quantize_block
from cpuinfer.kernels.jit import ISA, Kernel, kernel
from cpuinfer.kernels.simd import I8, I32, LANES, SIGNED, Emitter, Value, emitted

#: VNNI multiplies unsigned by signed bytes: keys are raised by 128, and queries know what it costs.
_UNSIGNED = ISA in ("avx512vnni", "avxvnni")


@dataclass(frozen=True)
class Numbers:
    """How the rows of a cache type are read and written; rows and places in them are addresses.

    A query meets keys as `query` reads it; `prepared` is how many bytes that takes for each number
    of it, 0 where it is taken as it is, float32.
    """

    name: str
    stored: str  # Numba's type of what rows are made of
    chunk: int  # numbers of 16 lanes of a score
    prepared: int
    query: Callable[[Emitter, Value, Value, Value, int], Any]  # (e, query, S, chunk, part)
    key: Callable[[Emitter, Value, Value, Value, int], Any]  # (e, row, S, chunk, part)
    score: Callable[[Emitter, Any, Any, Value], Value]  # (e, query, key, lane sums) -> lane sums
    value: Callable[[Emitter, Value, Value, Value, int], Value]  # (e, row, S, column of 16, part)
    write: Callable[[Emitter, Value, Value, Value], None]  # (e, floats, S, row)


def _lane(e: Emitter, address: Value, chunk: Value, part: int, size: int) -> Value:
    """Where a part of a chunk of 16 lanes of `size` bytes begins."""
    return e.at(e.at(address, part * e.width, size), chunk, LANES * size)


# Single and half precision


def _query(e: Emitter, query: Value, size: Value, chunk: Value, part: int) -> Value:
    return e.load_floats(_lane(e, query, chunk, part, 4))


def _score(e: Emitter, query: Value, key: Value, sums: Value) -> Value:
    return e.fma(query, key, sums)


def _floats(
    name: str,
    stored: str,
    size: int,
    load: Callable[[Emitter, Value], Value],
    store: Callable[[Emitter, Value, Value], None],
) -> Numbers:
    def read(e: Emitter, row: Value, numbers: Value, chunk: Value, part: int) -> Value:
        return load(e, _lane(e, row, chunk, part, size))

    def write(e: Emitter, floats: Value, numbers: Value, row: Value) -> None:
        with e.loop(e.b.udiv(numbers, numbers.type(LANES))) as chunk:
            for part in range(e.parts):
                x = e.load_floats(_lane(e, floats, chunk, part, 4))
                store(e, x, _lane(e, row, chunk, part, size))

    return Numbers(name, stored, LANES, 0, _query, read, _score, read, write)


# 8 bits: the lanes of a chunk are 64 bytes, each lane a sum of four products


@dataclass(frozen=True)
class _Bytes:
    """A vector of 32-bit words of four signed bytes, with the scale of each word."""

    words: Value
    scales: Value
    correction: Value | None = None  # for a query: where its dot products start


def prepare_query(e: Emitter, floats: Value, size: Value, query: Value) -> None:
    """S floats to bytes (S), float32 scales and int32 corrections of each four (S / 4 of both)."""
    b = e.b
    scales, corrections = b.add(query, size), e.at(query, size, 2)
    with e.loop(b.udiv(size, size.type(32))) as block:
        here = e.at(query, block, 32)
        scale, _ = quantize_block(e, e.at(floats, block, 128), here)
        for first in range(0, 8, min(8, e.width)):
            lane = e.at(ir.Constant(size.type, first), block, 8)
            words = e.load(e.at(here, first, 4), ir.VectorType(I32, min(8, e.width)), 4)
            offset = _byte_sums(e, words)
            e.store(offset, e.at(corrections, lane, 4))
            spread = ir.VectorType(scale.type, min(8, e.width))
            one = b.insert_element(ir.Constant(spread, None), scale, I32(0))
            same = ir.Constant(ir.VectorType(I32, min(8, e.width)), [0] * min(8, e.width))
            e.store(b.shuffle_vector(one, one, same), e.at(scales, lane, 4))


def _byte_sums(e: Emitter, words: Value) -> Value:
    """What raising the other operand by 128 adds to the product of each word, negated; or zero."""
    if not _UNSIGNED:
        return ir.Constant(words.type, None)
    total = ir.Constant(words.type, None)
    lanes = words.type.count
    for byte in range(4):
        left = e.b.shl(words, ir.Constant(words.type, [24 - 8 * byte] * lanes))
        total = e.b.add(total, e.b.ashr(left, ir.Constant(words.type, [24] * lanes)))
    return e.b.mul(total, ir.Constant(words.type, [-128] * lanes))


def _byte_query(e: Emitter, query: Value, size: Value, chunk: Value, part: int) -> _Bytes:
    return _Bytes(
        e.load_ints(_lane(e, query, chunk, part, 4)),
        e.load_floats(_lane(e, e.b.add(query, size), chunk, part, 4)),
        e.load_ints(_lane(e, e.at(query, size, 2), chunk, part, 4)),
    )


def _byte_key(e: Emitter, row: Value, size: Value, chunk: Value, part: int) -> _Bytes:
    words = e.load_ints(_lane(e, row, chunk, part, 4))
    if _UNSIGNED:
        words = e.b.xor(words, e.ints(0x80808080 - (1 << 32)))
    scales = e.at(e.b.add(row, size), chunk, 4)  # two halves
    if e.width < 16:
        return _Bytes(words, e.repeat_half(e.at(scales, part * e.width // 8, 2)))
    both = e.repeat_int(scales)
    shifts = ir.Constant(e.i32v, [0] * 8 + [16] * 8)
    return _Bytes(words, e.half_to_float(e.and_(e.b.lshr(both, shifts), 0xFFFF)))


def _byte_score(e: Emitter, query: _Bytes, key: _Bytes, sums: Value) -> Value:
    largest = 255 if _UNSIGNED else SIGNED
    dot = e.dot(query.correction, [key.words], [query.words], largest)
    return e.fma(e.to_float(dot), e.b.fmul(query.scales, key.scales), sums)


def _byte_value(e: Emitter, row: Value, size: Value, column: Value, part: int) -> Value:
    place = _lane(e, row, column, part, 1)
    numbers = e.b.sext(e.load(place, ir.VectorType(I8, e.width), 1), e.i32v)
    block = e.b.lshr(column, column.type(1))
    scale = e.repeat_half(e.at(e.b.add(row, size), block, 2))
    return e.b.fmul(e.to_float(numbers), scale)


def _write_bytes(e: Emitter, floats: Value, size: Value, row: Value) -> None:
    with e.loop(e.b.udiv(size, size.type(32))) as block:
        scale, _ = quantize_block(e, e.at(floats, block, 128), e.at(row, block, 32))
        e.store_half(scale, e.at(e.b.add(row, size), block, 2))


#: By the name of the cache's type.
NUMBERS = {
    numbers.name: numbers
    for numbers in (
        _floats("f32", "f4", 4, lambda e, at: e.load_floats(at), lambda e, x, at: e.store(x, at)),
        _floats(
            "f16", "u2", 2, lambda e, at: e.load_halves(at), lambda e, x, at: e.store_halves(x, at)
        ),
        Numbers(
            "q8_0",
            "u1",
            64,
            3,
            _byte_query,
            _byte_key,
            _byte_score,
            _byte_value,
            _write_bytes,
        ),
    )
}


def _appender(numbers: Numbers) -> Kernel:
    write = emitted(numbers.write)

    @kernel(f"append_{numbers.name}", f"void({numbers.stored}[:,:,::1],f4[:,:,::1],i8)")
    def append(ring, new, start):  # type: ignore[no-untyped-def]
        """Write new (T, K, S) float32 to ring (K, capacity, row) from position start on."""
        n_kv_heads, capacity, _ = ring.shape
        for t in range(new.shape[0]):
            slot = (start + t) % capacity
            for head in range(n_kv_heads):
                row = ring[head, slot].ctypes.data
                write(new[t, head].ctypes.data, new.shape[2], row)

    return append


APPEND = {name: _appender(numbers) for name, numbers in NUMBERS.items()}
