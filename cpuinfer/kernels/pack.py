"""Rows of a file, 16 side by side: the layout of `integer.py` and `floats.py`.

Packing moves whole units (32-bit words, or 16-bit numbers) and changes none.
"""

from typing import Any

from llvmlite import ir
from numba import types

from cpuinfer.kernels.jit import Kernel, kernel
from cpuinfer.kernels.parallel import shared
from cpuinfer.kernels.simd import I16, I32, I64, Emitter, Value, emitted

#: Groups of rows a thread takes at once.
PIECE = 4


def _write_move(kind: Any) -> Any:
    size = kind.width // 8

    def move(e: Emitter, source: Value, target: Value, count: Value) -> None:
        """Copy `count` neighbours to places 16 units apart."""
        with e.loop(count) as i:
            unit = e.load(e.at(source, i, size), kind, 1)
            e.store(unit, e.at(target, i, 16 * size), size)

    return move


def _write_transpose(kind: Any) -> Any:
    size = kind.width // 8
    four = ir.VectorType(kind, 4)

    def transpose(e: Emitter, source: Value, row_bytes: Value, target: Value, fours: Value) -> None:
        """`move` for 16 rows at once and a count of 4 * `fours`: squares of 4 x 4 units."""
        rows = [e.b.add(source, e.b.mul(row_bytes, ir.Constant(I64, r))) for r in range(16)]
        with e.loop(fours) as i:
            for first in range(0, 16, 4):
                square = [e.load(e.at(rows[first + r], i, 4 * size), four, 1) for r in range(4)]
                for unit, column in enumerate(_columns(e, square)):
                    place = e.at(target, unit * 16 + first, size)
                    e.store(column, e.at(place, i, 64 * size), size)

    return transpose


def _columns(e: Emitter, rows: list[Value]) -> list[Value]:
    """The transpose of four vectors of four."""

    def shuffle(x: Value, y: Value, *lanes: int) -> Value:
        return e.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 4), list(lanes)))

    a, b, c, d = rows
    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    halves = [(shuffle(a, b, *lanes), shuffle(c, d, *lanes)) for lanes in (low, high)]
    return [shuffle(x, y, *lanes) for x, y in halves for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))]


def _packer(kind: Any, number: Any) -> Kernel:
    """The kernel that moves units of LLVM type `kind`, Numba's `number`."""
    move, transpose = emitted(_write_move(kind)), emitted(_write_transpose(kind))
    move_half = emitted(_write_move(I16))
    signature = types.void(
        types.Array(types.uint8, 2, "C", readonly=True),
        types.int64,
        types.Array(number, 4, "C"),
        types.int64,
        types.Array(types.uint16, 3, "C"),
        types.int64,
    )

    @shared(f"pack_{kind.width}_groups")
    def some_groups(begin, end, seat, rows, first, words, half, halves):  # type: ignore[no-untyped-def]
        _, blocks, count, _ = words.shape
        row_bytes = rows.shape[1]
        unit = words.itemsize
        for g in range(begin, end):
            here = min(16, rows.shape[0] - 16 * g)
            if here < 16:
                words[g] = 0
                halves[g] = 0
            fours = count // 4 if here == 16 else 0
            source = rows.ctypes.data + 16 * g * row_bytes
            target = words.ctypes.data + g * words[0].nbytes
            half_target = halves.ctypes.data + g * halves[0].nbytes
            for _ in range(blocks):
                transpose(source + first, row_bytes, target, fours)
                for r in range(here):
                    row = source + r * row_bytes
                    done = 4 * fours
                    place = target + (16 * done + r) * unit
                    move(row + first + done * unit, place, count - done)
                    if halves.shape[1]:
                        move_half(row + half, half_target + 2 * r, 1)
                source += row_bytes // blocks
                target += count * 16 * unit
                half_target += 32

    @kernel(f"pack_{kind.width}", signature)
    def pack(rows, first, words, half, halves, table):  # type: ignore[no-untyped-def]
        """rows (n, row bytes) to words (groups, blocks, words, 16) and halves (groups, blocks, 16).

        A block of a row has its words from byte `first` on and a half at byte `half`.  Rows that
        fill up the last group are zeros.  `halves` has no blocks where the format has no half.
        """
        some_groups(table, len(words), PIECE, (rows, first, words, half, halves))

    return pack


PACK_32 = _packer(I32, types.uint32)
PACK_16 = _packer(I16, types.uint16)
