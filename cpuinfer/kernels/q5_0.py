"""Q5_0 (layout: quant/q5_0.py): Q4_0 and a fifth bit for each weight, all 32 in the first word."""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.simd import Emitter, Value


def five_bits(e: Emitter, fifth: Value, words: Value) -> list[Value]:
    """Eight words of bytes 0 to 31 from the word of fifth bits and the four words of nibbles."""
    packed = [e.load_ints(e.at(words, i, 64)) for i in range(4)]
    nibbles = [e.and_(e.shift_right(w, shift), 0x0F0F0F0F) for shift in (0, 4) for w in packed]
    block = []
    for word, low in enumerate(nibbles):
        four = e.and_(e.shift_right(fifth, 4 * word), 0xF)
        # The product holds the four bits 0, 7, 14 and 21 places further left: one at each byte.
        spread = e.and_(e.b.mul(four, e.ints(0x00204081)), 0x01010101)
        block.append(e.b.or_(low, e.shift_left(spread, 4)))
    return block


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    yield Block(five_bits(e, e.load_ints(words), e.at(words, 64)), [e.load_halves(halves)])


FORMAT = Format(
    name="q5_0",
    words=5,
    first_word=2,
    half=0,
    blocks=1,
    rounds=1,
    unpack=_unpack,
    correction=Correction.OFFSET,
    offset=16,
    largest=31,
    panel=True,
)
MATMUL = integer_matmul(FORMAT)
