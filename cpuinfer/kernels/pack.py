"""Rows of a file, 16 side by side: the layout of `integer.py` and `floats.py`.

Packing moves whole units (32-bit words, or 16-bit numbers) and changes none.
"""

from typing import Any

from numba import prange, types

from cpuinfer.kernels.jit import Kernel, kernel
from cpuinfer.kernels.simd import I16, I32, Emitter, Value, emitted


def _write_move(kind: Any) -> Any:
    def move(e: Emitter, source: Value, target: Value, count: Value, stride: Value) -> None:
        """Copy `count` neighbours to addresses `stride` bytes apart."""
        size = kind.width // 8
        with e.loop(count) as i:
            unit = e.load(e.at(source, i, size), kind, 1)
            e.store(unit, e.b.add(target, e.b.mul(i, stride)), size)

    return move


def _packer(kind: Any, number: Any) -> Kernel:
    """The kernel that moves units of LLVM type `kind`, Numba's `number`."""
    move_words, move_half = emitted(_write_move(kind)), emitted(_write_move(I16))
    signature = types.void(
        types.Array(types.uint8, 2, "C", readonly=True),
        types.int64,
        types.Array(number, 4, "C"),
        types.int64,
        types.Array(types.uint16, 3, "C"),
        types.int64,
    )

    @kernel(f"pack_{kind.width}", signature, parallel=True)
    def pack(rows, first, words, half, halves, threads):  # type: ignore[no-untyped-def]
        """rows (n, row bytes) to words (groups, blocks, words, 16) and halves (groups, blocks, 16).

        A block of a row has its words from byte `first` on and a half at byte `half`.  Rows that
        fill up the last group are zeros.  `halves` has no blocks where the format has no half.
        """
        groups, blocks, count, _ = words.shape
        block_bytes = rows.shape[1] // blocks
        for thread in prange(threads):
            for g in range(thread * groups // threads, (thread + 1) * groups // threads):
                if 16 * g + 16 > rows.shape[0]:
                    words[g] = 0
                    halves[g] = 0
                for r in range(min(16, rows.shape[0] - 16 * g)):
                    source = rows.ctypes.data + (16 * g + r) * rows.shape[1]
                    target = words.ctypes.data + g * words[0].nbytes + r * words.itemsize
                    for b in range(blocks):
                        move_words(source + first, target, count, 16 * words.itemsize)
                        if halves.shape[1]:
                            place = halves.ctypes.data + ((g * blocks + b) * 16 + r) * 2
                            move_half(source + half, place, 1, 2)
                        source += block_bytes
                        target += count * 16 * words.itemsize

    return pack


PACK_32 = _packer(I32, types.uint32)
PACK_16 = _packer(I16, types.uint16)
