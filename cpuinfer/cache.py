"""The keys and values of one sequence, in a ring.

Position p lives in slot p % capacity of every layer.  Keys are stored after RoPE, so nothing is
ever moved.  Under a sliding window of W keys (the query's own included) the capacity is
W + chunk - 1, where `chunk` is the most positions added at once: a chunk then never overwrites a
key that its own first token still needs.  Without a window it is the context length.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

#: What the rows of a cache type are arrays of.
DTYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
    "q8_0": np.dtype(np.uint8),
}


def padded(head_dim: int, kv_type: str = "f16") -> int:
    """Numbers a head takes in the cache, the last ones zero: kernels know whole chunks only."""
    chunk = 64 if kv_type == "q8_0" else 16
    return -(-head_dim // chunk) * chunk


def row_size(head_dim: int, kv_type: str) -> int:
    """Elements of the row of a key or value; as q8_0 bytes, and 2 for the scale of each 32."""
    numbers = padded(head_dim, kv_type)
    return numbers + numbers // 16 if kv_type == "q8_0" else numbers


class KVCache:
    """keys, values (layers, K, capacity, row) of the positions first to offset - 1.

    Rows are what kernels/ring.py writes: floats, the 16-bit patterns of half precision, or 8-bit
    numbers and their scales.
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, capacity: int, kv_type: str = "f16"
    ) -> None:
        shape = (n_layers, n_kv_heads, capacity, row_size(head_dim, kv_type))
        self.kv_type = kv_type
        self.keys: npt.NDArray[Any] = np.zeros(shape, DTYPES[kv_type])
        self.values: npt.NDArray[Any] = np.zeros(shape, DTYPES[kv_type])
        self.offset = 0
        self.first = 0
        #: Called with the first position that will be left when others are about to be lost.
        self.before_loss: Callable[[int], None] | None = None

    @property
    def capacity(self) -> int:
        """Positions kept."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, whatever the offset."""
        return self.keys.nbytes + self.values.nbytes

    def claim(self, n: int) -> None:
        """`n` positions from the offset on may be written from now on, to some layers at least:
        what their slots held is lost even if the offset never moves."""
        first = max(self.first, self.offset + n - self.capacity)
        if first > self.first and self.before_loss is not None:
            self.before_loss(first)
        self.first = first

    def advance(self, n: int) -> None:
        """`n` positions have been written to every layer."""
        self.claim(n)
        self.offset += n

    def holds(self, offset: int, window: int | None) -> bool:
        """Whether a token at `offset` would find every key before it that it sees."""
        oldest = 0 if window is None else max(0, offset - window + 1)
        return offset == 0 or (self.first <= oldest and offset <= self.offset)

    def rewind(self, offset: int) -> None:
        """Forget the positions from `offset` on; it must be one that the cache `holds`.

        What was overwritten stays lost.  With a capacity of window + chunk - 1 a pass of up to
        chunk tokens can always be taken back.
        """
        assert 0 <= offset <= self.offset, (offset, self.offset)
        self.offset = offset
        self.first = min(self.first, offset)

    def reset(self) -> None:
        """Forget the sequence; the memory stays."""
        self.rewind(0)

    def begin_at(self, position: int) -> None:
        """Forget the sequence; `position` is the one that `extend` brings first."""
        self.first = self.offset = position

    def extend(self, rows: npt.NDArray[Any]) -> None:
        """Append positions: rows (2, layers, K, n, row) of keys and values, as `read` gives."""
        start, end = self.offset, self.offset + rows.shape[3]
        self.advance(rows.shape[3])
        for positions, slots in self._runs(max(start, self.first), end):
            some = rows[:, :, :, positions.start - start : positions.stop - start]
            self.keys[:, :, slots], self.values[:, :, slots] = some

    def read(self, start: int, end: int) -> npt.NDArray[Any]:
        """The keys and values (2, layers, K, n, row) of positions start to end - 1, a copy."""
        assert self.first <= start <= end <= self.offset, (start, end, self.first, self.offset)
        n_layers, n_kv_heads, _, row = self.keys.shape
        rows = np.empty((2, n_layers, n_kv_heads, end - start, row), self.keys.dtype)
        for positions, slots in self._runs(start, end):
            some = slice(positions.start - start, positions.stop - start)
            rows[0, :, :, some], rows[1, :, :, some] = (
                self.keys[:, :, slots],
                self.values[:, :, slots],
            )
        return rows

    def _runs(self, start: int, end: int) -> Iterator[tuple[range, slice]]:
        """Positions whose slots follow each other, and these slots."""
        while start < end:
            slot = start % self.capacity
            n = min(end - start, self.capacity - slot)
            yield range(start, start + n), slice(slot, slot + n)
            start += n

    def take_memory(self) -> None:
        """Touch every page now, so that a ring has its final size from the start."""
        self.keys.fill(0)
        self.values.fill(0)


def cache_bytes(
    n_layers: int, n_kv_heads: int, head_dim: int, capacity: int, kv_type: str = "f16"
) -> int:
    """What a KVCache of this shape will take."""
    positions = n_layers * n_kv_heads * capacity
    return 2 * positions * row_size(head_dim, kv_type) * DTYPES[kv_type].itemsize
