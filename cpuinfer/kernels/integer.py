"""Quantized rows times 8-bit activations: the tile all block formats share.

Layout.  Weights are packed (`pack.py`) so that 16 rows lie side by side: a group is one plane of
32-bit words, word[block][i][16 rows], and one of 16-bit halves, half[block][16 rows]; the bytes
are the file's own.  A vector holds the same word of many rows, so lanes are outputs: no horizontal
sums, one float accumulator an output, blocks in order.

Activations come in tiles of tokens (`activations.py`): q[block][token][32] int8, d[block][token]
float32 scales, and a format's correction, one or two 32-bit numbers for [block][token].  For each
block of 32 weights and each token

    accumulator = fma(float(sum of q * w), weight_scale * d, accumulator)

whatever the number of tokens, the instruction set or the thread.  So the sum of an output does not
depend on what it is computed together with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from llvmlite import ir

from cpuinfer.kernels.jit import Kernel
from cpuinfer.kernels.matmul import AHEAD, matmul, store_sums
from cpuinfer.kernels.simd import I64, LANES, Emitter, Value


class Correction(Enum):
    """What a format wants to know of 32 activations besides their bytes q and their scale d."""

    OFFSET = auto()  # int32: -offset * sum(q), where the dot product starts
    HALF_OFFSETS = auto()  # the same for each 16, where each 16 weights have a scale
    SUM = auto()  # float32: d * sum(q), which meets the minimum of a block


@dataclass(frozen=True)
class Block:
    """32 weights of each lane's row: bytes in eight words, and what makes them numbers.

    weight = scale * (byte - offset) + minimum.  Two scales mean one for each 16 weights.
    """

    words: list[Value]
    scales: list[Value]
    minimum: Value | None = None


@dataclass(frozen=True)
class Format:
    """How a block format is packed and how its words become bytes."""

    name: str
    words: int  # 32-bit words of a file block
    first_word: int  # byte of the file block where they begin
    half: int | None  # byte where a 16-bit scale lies, if it is not in a word
    blocks: int  # blocks of 32 weights in a file block
    rounds: int  # calls of `unpack` that make up a file block
    unpack: Callable[[Emitter, Value, Value, Value], Iterator[Block]]  # (e, words, halves, round)
    correction: Correction
    offset: int  # what is subtracted from a byte
    largest: int  # the largest byte, or simd.SIGNED


def integer_matmul(form: Format) -> Kernel:
    """The kernel of a block format."""
    return matmul(form.name, lambda tokens: _tile(form, tokens))


def _tile(form: Format, tokens: int) -> Callable[..., None]:
    """The writer of out[token, 16 rows] for one group of rows and `tokens` tokens."""
    each = 8 if form.correction is Correction.HALF_OFFSETS else 4  # correction bytes
    per_round = form.blocks // form.rounds
    line = 4 * LANES  # bytes of a word of 16 rows, and of a cache line
    ahead = -(-AHEAD // (form.words * line))  # file blocks
    fetched = form.words // form.rounds * line  # bytes in a round

    def tile(
        e: Emitter,
        words: Value,
        halves: Value,
        file_blocks: Value,
        q: Value,
        d: Value,
        correction: Value,
        out: Value,
        stride: Value,
    ) -> None:
        sums = [[e.variable(e.zeros()) for _ in range(e.parts)] for _ in range(tokens)]
        with e.loop(file_blocks) as outer:
            for part in range(e.parts):
                w = e.at(e.at(words, 4 * part * e.width), outer, form.words * line)
                h = e.at(e.at(halves, 2 * part * e.width), outer, LANES * 2)
                if part == 0 and form.half is not None:
                    e.prefetch(e.at(h, ahead, LANES * 2))
                with e.loop(ir.Constant(I64, form.rounds)) as inner:
                    first = e.at(e.at(ir.Constant(I64, 0), outer, form.blocks), inner, per_round)
                    for i, block in enumerate(form.unpack(e, w, h, inner)):
                        if part == 0:
                            next_words = e.at(e.at(w, ahead, form.words * line), inner, fetched)
                            for word in range(i, form.words // form.rounds, per_round):
                                e.prefetch(e.at(next_words, word, line))
                        n = e.at(first, i)  # number of the block in a row
                        for t in range(tokens):
                            here = _Activations(
                                e.at(e.at(q, 32 * t), n, 32 * tokens),
                                e.at(e.at(d, 4 * t), n, 4 * tokens),
                                e.at(e.at(correction, each * t), n, each * tokens),
                            )
                            total = _add_block(e, form, block, here, e.get(sums[t][part]))
                            e.set(sums[t][part], total)
        store_sums(e, sums, out, stride)

    return tile


@dataclass(frozen=True)
class _Activations:
    """Addresses of one token's 32 activations."""

    q: Value
    d: Value
    correction: Value


def _add_block(e: Emitter, form: Format, block: Block, x: _Activations, total: Any) -> Value:
    """`total` plus the product of a block with one token's activations."""
    scale = e.repeat_float(x.d)
    activations = e.repeat_words(x.q)
    step = 8 // len(block.scales)
    for half, weight_scale in enumerate(block.scales):
        these = slice(half * step, half * step + step)
        if form.correction is Correction.SUM:
            dot = e.ints(0)
        else:
            dot = e.repeat_int(e.at(x.correction, 4 * half))
        dot = e.dot(dot, block.words[these], activations[these], form.largest)
        total = e.fma(e.to_float(dot), e.b.fmul(weight_scale, scale), total)
    if block.minimum is not None:
        total = e.fma(block.minimum, e.repeat_float(x.correction), total)
    return total
