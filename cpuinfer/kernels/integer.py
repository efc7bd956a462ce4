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
from cpuinfer.kernels.matmul import AHEAD, Panel, matmul, store_sums
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
    panel: bool = False  # whether it takes so long to unpack that many tokens should share it


#: Blocks one after the other, in code that is being written: (part, number in the row, block).
Blocks = Iterator[tuple[int, Value, Block]]


def integer_matmul(form: Format) -> Kernel:
    """The kernel of a block format."""
    if not form.panel:
        return matmul(form.name, lambda tokens: _tile(form, tokens))
    panel = Panel(_write_panel(form), lambda tokens: _panel_tile(form, tokens))
    return matmul(form.name, lambda tokens: _tile(form, tokens), panel=panel)


def _tile(form: Format, tokens: int) -> Callable[..., None]:
    """The writer of out[token, 16 rows] for one group of rows and `tokens` tokens."""

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
        _add_blocks(e, form, _packed(e, form, words, halves, file_blocks), sums, q, d, correction)
        store_sums(e, sums, out, stride)

    return tile


def _packed(e: Emitter, form: Format, words: Value, halves: Value, file_blocks: Value) -> Blocks:
    """The blocks of a group as they are packed; those further on are fetched meanwhile."""
    line = 4 * LANES  # bytes of a word of 16 rows, and of a cache line
    ahead = -(-AHEAD // (form.words * line))  # file blocks
    per_round, in_round = form.blocks // form.rounds, -(-form.words // form.rounds)
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
                        next_words = e.at(e.at(w, ahead, form.words * line), inner, in_round * line)
                        # In their order, so that the machine's own prefetcher follows.
                        for word in range(
                            in_round * i // per_round, in_round * (i + 1) // per_round
                        ):
                            e.prefetch(e.at(next_words, word, line))
                    yield part, e.at(first, i), block


# A panel is a group of rows unpacked for many tiles of tokens: of each block eight words, then its
# scales and its minimum, all 16 lanes of 32 bits.


def panel_bytes(form: Format) -> int:
    """Bytes of a file block of 16 rows in a panel, if the format has one."""
    return form.blocks * _panel_lines(form) * 4 * LANES if form.panel else 0


def _panel_lines(form: Format) -> int:
    return 9 if form.correction is Correction.OFFSET else 10


def _write_panel(form: Format) -> Callable[..., None]:
    def write(e: Emitter, words: Value, halves: Value, file_blocks: Value, panel: Value) -> None:
        for part, n, block in _packed(e, form, words, halves, file_blocks):
            place = e.at(e.at(panel, part * e.width, 4), n, _panel_lines(form) * 4 * LANES)
            minimum = [] if block.minimum is None else [block.minimum]
            for i, vector in enumerate((*block.words, *block.scales, *minimum)):
                e.store(vector, e.at(place, i, 4 * LANES))

    return write


def _panel_tile(form: Format, tokens: int) -> Callable[..., None]:
    """`_tile` for a group that is unpacked."""

    def tile(
        e: Emitter,
        panel: Value,
        file_blocks: Value,
        q: Value,
        d: Value,
        correction: Value,
        out: Value,
        stride: Value,
    ) -> None:
        sums = [[e.variable(e.zeros()) for _ in range(e.parts)] for _ in range(tokens)]
        _add_blocks(e, form, _unpacked(e, form, panel, file_blocks), sums, q, d, correction)
        store_sums(e, sums, out, stride)

    return tile


def _unpacked(e: Emitter, form: Format, panel: Value, file_blocks: Value) -> Blocks:
    lines = _panel_lines(form)
    n_scales = 2 if form.correction is Correction.HALF_OFFSETS else 1
    with e.loop(e.at(ir.Constant(I64, 0), file_blocks, form.blocks)) as n:
        for part in range(e.parts):
            place = e.at(e.at(panel, part * e.width, 4), n, lines * 4 * LANES)
            if part == 0:  # from the second cache, where panels lie
                for i in range(lines):
                    e.prefetch(e.at(place, 2 * lines + i, 4 * LANES))
            words = [e.load_ints(e.at(place, i, 4 * LANES)) for i in range(8)]
            rest = [e.load_floats(e.at(place, i, 4 * LANES)) for i in range(8, lines)]
            minimum = rest[n_scales] if form.correction is Correction.SUM else None
            yield part, n, Block(words, rest[:n_scales], minimum)


def _add_blocks(
    e: Emitter,
    form: Format,
    blocks: Blocks,
    sums: list[list[Value]],
    q: Value,
    d: Value,
    correction: Value,
) -> None:
    """Add the products of blocks with every token's activations to its sums [token][part]."""
    tokens = len(sums)
    each = 8 if form.correction is Correction.HALF_OFFSETS else 4  # correction bytes
    for part, n, block in blocks:
        for t in range(tokens):
            here = _Activations(
                e.at(e.at(q, 32 * t), n, 32 * tokens),
                e.at(e.at(d, 4 * t), n, 4 * tokens),
                e.at(e.at(correction, each * t), n, each * tokens),
            )
            total = _add_block(e, form, block, here, e.get(sums[t][part]))
            e.set(sums[t][part], total)


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
