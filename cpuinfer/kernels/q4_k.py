"""Q4_K (layout: quant/q4_k.py): 8 blocks of 32 nibbles, 6-bit scales and minima, d and dmin.

Words: 0 holds d (low half) and dmin; 1 to 3 the scales; 4 to 35 the nibbles, where eight words
hold one block in their low nibbles and the next in their high ones.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.simd import Emitter, Value


def scales(e: Emitter, words: Value, round_: Value) -> Iterator[tuple[Value, Value]]:
    """(scale, minimum) of the four blocks of a round, as Q4_K and Q5_K pack them.

    Scales 0-3 are the low 6 bits of bytes 0-3, minima 0-3 those of bytes 4-7; scales and minima
    4-7 have their low 4 bits in bytes 8-11 and their high 2 above the first ones.
    """
    b = e.b
    head, first, second, third = (e.load_ints(e.at(words, i, 64)) for i in range(4))
    d, dmin = e.half_to_float(e.and_(head, 0xFFFF)), e.half_to_float(e.shift_right(head, 16))
    top_first = e.and_(e.shift_right(first, 2), 0x30303030)
    top_second = e.and_(e.shift_right(second, 2), 0x30303030)
    later = e.splat(b.icmp_signed("!=", round_, round_.type(0)))
    later_scales = b.or_(e.and_(third, 0x0F0F0F0F), top_first)
    later_minima = b.or_(e.and_(e.shift_right(third, 4), 0x0F0F0F0F), top_second)
    scale_bytes = b.select(later, later_scales, e.and_(first, 0x3F3F3F3F))
    minimum_bytes = b.select(later, later_minima, e.and_(second, 0x3F3F3F3F))
    for i in range(4):
        scale = e.to_float(e.and_(e.shift_right(scale_bytes, 8 * i), 0xFF))
        minimum = e.to_float(e.and_(e.shift_right(minimum_bytes, 8 * i), 0xFF))
        yield b.fmul(d, scale), b.fneg(b.fmul(dmin, minimum))


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    nibbles = e.at(e.at(words, 4 * 64), round_, 16 * 64)
    for i, (scale, minimum) in enumerate(scales(e, words, round_)):
        pair, shift = i // 2 * 8, i % 2 * 4
        packed = (e.load_ints(e.at(nibbles, pair + word, 64)) for word in range(8))
        yield Block([e.and_(e.shift_right(w, shift), 0x0F0F0F0F) for w in packed], [scale], minimum)


FORMAT = Format(
    name="q4_k",
    words=36,
    first_word=0,
    half=None,
    blocks=8,
    rounds=2,
    unpack=_unpack,
    correction=Correction.SUM,
    offset=0,
    largest=15,
)
MATMUL = integer_matmul(FORMAT)
