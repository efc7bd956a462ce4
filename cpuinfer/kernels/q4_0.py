"""Q4_0 (layout: quant/q4_0.py): byte i of a block holds weights i and i + 16."""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.simd import Emitter, Value


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    packed = [e.load_ints(e.at(words, i, 64)) for i in range(4)]
    low = [e.and_(w, 0x0F0F0F0F) for w in packed]
    high = [e.and_(e.shift_right(w, 4), 0x0F0F0F0F) for w in packed]
    yield Block(low + high, [e.load_halves(halves)])


FORMAT = Format(
    name="q4_0",
    words=4,
    first_word=2,
    half=0,
    blocks=1,
    rounds=1,
    unpack=_unpack,
    correction=Correction.OFFSET,
    offset=8,
    largest=15,
)
MATMUL = integer_matmul(FORMAT)
