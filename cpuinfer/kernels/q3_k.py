"""Q3_K (layout: quant/q3_k.py): 3 bits a weight, a 6-bit scale for each 16, and d.

Words: 0 to 7 the third bits, bit j of a byte for block j; 8 to 23 the lower two bits, eight words
for the four blocks of a round; 24 to 26 the scales, of which a round takes the low or the high
nibbles of words 24 and 25 and the lower or the upper half of each byte of word 26.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.simd import I32, Emitter, Value


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    b = e.b
    four_rounds = e.splat(b.trunc(e.at(round_.type(0), round_, 4), I32))
    thirds = [b.lshr(e.load_ints(e.at(words, word, 64)), four_rounds) for word in range(8)]
    pairs = e.at(e.at(words, 8 * 64), round_, 8 * 64)
    nibbles = [b.lshr(e.load_ints(e.at(words, 24 + i, 64)), four_rounds) for i in range(2)]
    upper = b.lshr(e.load_ints(e.at(words, 26, 64)), four_rounds)
    d = e.load_halves(halves)
    for i in range(4):
        block = []
        for word in range(8):
            two = e.and_(e.shift_right(e.load_ints(e.at(pairs, word, 64)), 2 * i), 0x03030303)
            third = e.shift_left(e.and_(e.shift_right(thirds[word], i), 0x01010101), 2)
            block.append(b.or_(two, third))
        scales = []
        for byte in (2 * i % 4, 2 * i % 4 + 1):
            low = e.and_(e.shift_right(nibbles[i // 2], 8 * byte), 0xF)
            high = e.and_(e.shift_right(upper, 8 * byte + 2 * (i // 2)), 0x3)
            scale = b.sub(b.or_(low, e.shift_left(high, 4)), e.ints(32))
            scales.append(b.fmul(d, e.to_float(scale)))
        yield Block(block, scales)


FORMAT = Format(
    name="q3_k",
    words=27,
    first_word=0,
    half=108,
    blocks=8,
    rounds=2,
    unpack=_unpack,
    correction=Correction.HALF_OFFSETS,
    offset=4,
    largest=7,
    panel=True,
)
MATMUL = integer_matmul(FORMAT)
