"""Q6_K (layout: quant/q6_k.py): 6 bits a weight, a signed 8-bit scale for each 16, and d.

Words: 0 to 31 the low 4 bits, 32 to 47 the high 2, 48 to 51 the scales.  A round is half of the
256 weights: its four blocks take the low nibbles of words 0-7 and 8-15, then the high ones, and
two bits each of the same eight words of high bits.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.simd import Emitter, Value


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    b = e.b
    low = e.at(words, round_, 16 * 64)
    high = [e.load_ints(e.at(e.at(words, round_, 8 * 64), 32 + i, 64)) for i in range(8)]
    scale_words = [e.load_ints(e.at(e.at(words, round_, 2 * 64), 48 + i, 64)) for i in range(2)]
    d = e.load_halves(halves)
    for i in range(4):
        block = []
        for word in range(8):
            nibbles = e.load_ints(e.at(low, i % 2 * 8 + word, 64))
            four = e.and_(e.shift_right(nibbles, i // 2 * 4), 0x0F0F0F0F)
            two = e.shift_left(e.and_(e.shift_right(high[word], 2 * i), 0x03030303), 4)
            block.append(b.or_(four, two))
        scales = []
        for byte in (2 * i % 4, 2 * i % 4 + 1):
            signed = b.ashr(e.shift_left(scale_words[i // 2], 24 - 8 * byte), e.ints(24))
            scales.append(b.fmul(d, e.to_float(signed)))
        yield Block(block, scales)


FORMAT = Format(
    name="q6_k",
    words=52,
    first_word=0,
    half=208,
    blocks=8,
    rounds=2,
    unpack=_unpack,
    correction=Correction.HALF_OFFSETS,
    offset=32,
    largest=63,
    panel=True,
)
MATMUL = integer_matmul(FORMAT)
