"""Q5_1 (layout: quant/q5_1.py): Q5_0's weights with a minimum.

Words: 0 holds the scale (low half) and the minimum; 1 the fifth bits; 2 to 5 the nibbles.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.q4_1 import scale_and_minimum
from cpuinfer.kernels.q5_0 import five_bits
from cpuinfer.kernels.simd import Emitter, Value


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    block = five_bits(e, e.load_ints(e.at(words, 64)), e.at(words, 2 * 64))
    scale, minimum = scale_and_minimum(e, words)
    yield Block(block, [scale], minimum)


FORMAT = Format(
    name="q5_1",
    words=6,
    first_word=0,
    half=None,
    blocks=1,
    rounds=1,
    unpack=_unpack,
    correction=Correction.SUM,
    offset=0,
    largest=31,
    panel=True,
)
MATMUL = integer_matmul(FORMAT)
