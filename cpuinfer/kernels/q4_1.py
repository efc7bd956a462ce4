"""Q4_1 (layout: quant/q4_1.py): Q4_0's nibbles with a minimum.

Words: 0 holds the scale (low half) and the minimum; 1 to 4 the nibbles.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.simd import Emitter, Value


def scale_and_minimum(e: Emitter, words: Value) -> tuple[Value, Value]:
    """The two halves of a block's first word."""
    head = e.load_ints(words)
    return e.half_to_float(e.and_(head, 0xFFFF)), e.half_to_float(e.shift_right(head, 16))


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    packed = [e.load_ints(e.at(words, 1 + i, 64)) for i in range(4)]
    low = [e.and_(w, 0x0F0F0F0F) for w in packed]
    high = [e.and_(e.shift_right(w, 4), 0x0F0F0F0F) for w in packed]
    scale, minimum = scale_and_minimum(e, words)
    yield Block(low + high, [scale], minimum)


FORMAT = Format(
    name="q4_1",
    words=5,
    first_word=0,
    half=None,
    blocks=1,
    rounds=1,
    unpack=_unpack,
    correction=Correction.SUM,
    offset=0,
    largest=15,
)
MATMUL = integer_matmul(FORMAT)
