"""The driver of all matrix products: groups of 16 packed rows times tiles of tokens.

`integer.py` and `floats.py` write the tiles.  A weight is read from memory for the first tile and
from the cache for the others; every output is one accumulator inside one tile, so neither the tile
nor the thread it lands in changes its value.
"""

from collections.abc import Callable
from typing import Any

from numba import prange

from cpuinfer.kernels.jit import ISA, Kernel, kernel
from cpuinfer.kernels.simd import Emitter, Value, emitted

#: The most tokens that meet a weight while it is in registers, by the number of registers; the
#: tiles are this, 4, 2 and 1.
MOST = 12 if ISA == "avx512vnni" else 4


def store_sums(e: Emitter, sums: list[list[Value]], out: Value, stride: Value) -> None:
    """Write a tile's accumulators, variables [token][part], to rows of `out` `stride` apart."""
    for t, parts in enumerate(sums):
        for part, total in enumerate(parts):
            e.store(e.get(total), e.at(e.at(out, 4 * part * e.width), stride, 4 * t))


def matmul(name: str, write_tile: Callable[[int], Any], words: str = "u4") -> Kernel:
    """The kernel whose tile for n tokens is written by `write_tile(n)`.

    `words` is the dtype of the packed words, as Numba writes it.
    """
    tile_1, tile_2, tile_4 = (emitted(write_tile(n)) for n in (1, 2, 4))
    tile_most = emitted(write_tile(MOST)) if MOST > 4 else tile_4
    packed = f"{words}[:,:,:,::1],u2[:,:,::1],i8[:,::1]"
    signature = f"void(i1[::1],f4[::1],i4[::1],{packed},f4[::1],i8,i8)"

    @kernel(f"matmul_{name}", signature, parallel=True)
    def product(x, d, correction, words, halves, places, out, tokens, threads):  # type: ignore[no-untyped-def]
        """out[t, r] = sum over c of x[t, c] * weight[r, c], for the rows of one or more matrices.

        x (tokens * bytes of a row,) int8, d float32 and correction int32 as `activations.py` makes
        them (for float weights x is the rows themselves and the others are empty); words (groups,
        blocks, words, 16) and halves (groups, blocks, 16) as packed; out (tokens * groups * 16,),
        one matrix (tokens, its rows) after the other.  places (groups, 2) says of each group where
        its matrix begins, in rows, and how many rows that has; both in whole groups.
        """
        groups, blocks = words.shape[0], words.shape[1]
        for thread in prange(threads):
            for g in range(thread * groups // threads, (thread + 1) * groups // threads):
                w = words.ctypes.data + g * words[0].nbytes
                h = halves.ctypes.data + g * halves[0].nbytes
                start, stride = places[g]
                first = tokens * start + 16 * g - start
                t = 0
                while t < tokens:
                    left = tokens - t
                    a = x.ctypes.data + t * (x.nbytes // tokens)
                    s = d.ctypes.data + t * (d.nbytes // tokens)
                    c = correction.ctypes.data + t * (correction.nbytes // tokens)
                    o = out.ctypes.data + (first + t * stride) * 4
                    if left >= MOST:
                        tile_most(w, h, blocks, a, s, c, o, stride)
                        t += MOST
                    elif left >= 4:
                        tile_4(w, h, blocks, a, s, c, o, stride)
                        t += 4
                    elif left >= 2:
                        tile_2(w, h, blocks, a, s, c, o, stride)
                        t += 2
                    else:
                        tile_1(w, h, blocks, a, s, c, o, stride)
                        t += 1

    return product
