"""Q5_K (layout: quant/q5_k.py): Q4_K and a fifth bit for each weight.

Words: 0 to 3 as in Q4_K; 4 to 11 the fifth bits, bit j of a byte for block j; 12 to 43 the nibbles.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.q4_k import scales
from cpuinfer.kernels.simd import I32, Emitter, Value


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    b = e.b
    nibbles = e.at(e.at(words, 12 * 64), round_, 16 * 64)
    shift_bits = e.splat(b.trunc(e.at(round_.type(0), round_, 4), I32))
    bits = [b.lshr(e.load_ints(e.at(words, 4 + word, 64)), shift_bits) for word in range(8)]
    for i, (scale, minimum) in enumerate(scales(e, words, round_)):
        pair, shift = i // 2 * 8, i % 2 * 4
        block = []
        for word in range(8):
            packed = e.load_ints(e.at(nibbles, pair + word, 64))
            low = e.and_(e.shift_right(packed, shift), 0x0F0F0F0F)
            fifth = e.shift_left(e.and_(e.shift_right(bits[word], i), 0x01010101), 4)
            block.append(b.or_(low, fifth))
        yield Block(block, [scale], minimum)


FORMAT = Format(
    name="q5_k",
    words=44,
    first_word=0,
    half=None,
    blocks=8,
    rounds=2,
    unpack=_unpack,
    correction=Correction.SUM,
    offset=0,
    largest=31,
    panel=True,
)
MATMUL = integer_matmul(FORMAT)
