"""Q8_0 (layout: quant/q8_0.py): 32 signed bytes and a scale.

VNNI multiplies unsigned by signed bytes, so there 128 is added to the weights and taken off again
through the correction; the other instruction sets have a way for signed bytes.
"""

from collections.abc import Iterator

from cpuinfer.kernels.integer import Block, Correction, Format, integer_matmul
from cpuinfer.kernels.jit import ISA
from cpuinfer.kernels.simd import SIGNED, Emitter, Value

_UNSIGNED = ISA in ("avx512vnni", "avxvnni")


def _unpack(e: Emitter, words: Value, halves: Value, round_: Value) -> Iterator[Block]:
    packed = [e.load_ints(e.at(words, i, 64)) for i in range(8)]
    if _UNSIGNED:
        packed = [e.b.xor(w, e.ints(0x80808080)) for w in packed]
    yield Block(packed, [e.load_halves(halves)])


FORMAT = Format(
    name="q8_0",
    words=8,
    first_word=2,
    half=0,
    blocks=1,
    rounds=1,
    unpack=_unpack,
    correction=Correction.OFFSET,
    offset=128 if _UNSIGNED else 0,
    largest=255 if _UNSIGNED else SIGNED,
)
MATMUL = integer_matmul(FORMAT)
