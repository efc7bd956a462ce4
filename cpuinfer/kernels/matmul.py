"""The driver of all matrix products: groups of 16 packed rows times tiles of tokens.

`integer.py` and `floats.py` write the tiles.  A weight is read from memory for the first tile and
from the cache for the others; every output is one accumulator inside one tile, so neither the tile
nor the thread it lands in changes its value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import njit

from cpuinfer.kernels.jit import ISA, Kernel, kernel
from cpuinfer.kernels.parallel import shared
from cpuinfer.kernels.simd import Emitter, Value, emitted

#: How many tokens may meet a weight while it is in registers; the most is a matter of how many
#: registers there are.  Tokens are put into the largest tiles that they fill.
TILES = (12, 8, 4, 2, 1) if ISA == "avx512vnni" else (4, 2, 1)
#: Bytes of weights between what is fetched and what is multiplied.  With one token a core asks for
#: new weights often enough by itself; the more tokens, the more of memory's time it would wait out.
AHEAD = 8192
#: Tokens from which on a group of rows is unpacked once instead of in each tile.
MANY = 3 * TILES[0]
#: Bytes of weights, times tokens, that a thread takes at once: some microseconds of work.
PIECE = 1 << 17


def store_sums(e: Emitter, sums: list[list[Value]], out: Value, stride: Value) -> None:
    """Write a tile's accumulators, variables [token][part], to rows of `out` `stride` apart."""
    for t, parts in enumerate(sums):
        for part, total in enumerate(parts):
            e.store(e.get(total), e.at(e.at(out, 4 * part * e.width), stride, 4 * t))


@njit(error_model="numpy")
def tile_size(tokens):  # type: ignore[no-untyped-def]
    """How many of the next `tokens` tokens are the next tile."""
    for size in TILES:
        if size <= tokens:
            return size
    return 1


@dataclass(frozen=True)
class Panel:
    """A group of rows unpacked, where so many tokens meet it that this pays."""

    write: Callable[..., None]  # (e, words, halves, blocks, panel)
    write_tile: Callable[[int], Any]  # of a tile's writer (e, panel, blocks, x, d, ..., stride)


def _nothing(
    e: Emitter,
    panel: Value,
    blocks: Value,
    x: Value,
    d: Value,
    correction: Value,
    out: Value,
    stride: Value,
) -> None:
    """The tile of a format whose rows are met as they are packed."""


NO_PANEL = Panel(lambda e, words, halves, blocks, panel: None, lambda tokens: _nothing)


def matmul(
    name: str, write_tile: Callable[[int], Any], words: str = "u4", panel: Panel = NO_PANEL
) -> Kernel:
    """The kernel whose tile for n tokens is written by `write_tile(n)`.

    `words` is the dtype of the packed words, as Numba writes it.
    """

    @emitted
    def tile(
        e: Emitter,
        size: Value,
        words: Value,
        halves: Value,
        blocks: Value,
        x: Value,
        d: Value,
        correction: Value,
        out: Value,
        stride: Value,
    ) -> None:
        for n in TILES:
            with e.case(size, n):
                write_tile(n)(e, words, halves, blocks, x, d, correction, out, stride)

    unpack = emitted(panel.write)
    panel_tile = emitted(panel.write_tile(TILES[0]))
    packed = f"{words}[:,:,:,::1],u2[:,:,::1],i8[:,::1]"
    signature = f"void(i1[::1],f4[::1],i4[::1],{packed},i1[:,::1],f4[::1],i8,i8)"

    @shared(f"matmul_{name}_groups")
    def some_groups(begin, end, seat, x, d, correction, words, halves, places, panels, out, tokens):  # type: ignore[no-untyped-def]
        blocks = words.shape[1]
        for g in range(begin, end):
            w = words.ctypes.data + g * words[0].nbytes
            h = halves.ctypes.data + g * halves[0].nbytes
            start, stride = places[g]
            first = tokens * start + 16 * g - start
            p = panels.ctypes.data + seat * panels.shape[1]
            unpacked = 0  # tokens that meet the panel: whole tiles of the largest size
            if panels.shape[1]:
                unpacked = tokens // TILES[0] * TILES[0]
                unpack(w, h, blocks, p)
            t = 0
            while t < tokens:
                size = tile_size(tokens - t)
                a = x.ctypes.data + t * (x.nbytes // tokens)
                s = d.ctypes.data + t * (d.nbytes // tokens)
                c = correction.ctypes.data + t * (correction.nbytes // tokens)
                o = out.ctypes.data + (first + t * stride) * 4
                if t < unpacked:
                    panel_tile(p, blocks, a, s, c, o, stride)
                else:
                    tile(size, w, h, blocks, a, s, c, o, stride)
                t += size

    @kernel(f"matmul_{name}", signature)
    def product(x, d, correction, words, halves, places, panels, out, tokens, table):  # type: ignore[no-untyped-def]
        """out[t, r] = sum over c of x[t, c] * weight[r, c], for the rows of one or more matrices.

        x (tokens * bytes of a row,) int8, d float32 and correction int32 as `activations.py` makes
        them (for float weights x is all of it, and d and correction are empty); words (groups,
        blocks, words, 16) and halves (groups, blocks, 16) as packed; out (tokens * groups * 16,),
        one matrix (tokens, its rows) after the other.  places (groups, 2) says of each group where
        its matrix begins, in rows, and how many rows that has; both in whole groups.  panels
        (threads, bytes of a group in a panel) is scratch, without bytes where nothing is unpacked.
        """
        piece = max(1, PIECE // (words[0].nbytes * tokens))
        arguments = (x, d, correction, words, halves, places, panels, out, tokens)
        some_groups(table, len(words), piece, arguments)

    return product
