"""The keys and values of one sequence, in a ring.

Position p lives in slot p % capacity of every layer.  Keys are stored after RoPE, so nothing is
ever moved.  Under a sliding window of W keys (the query's own included) the capacity is
W + chunk - 1, where `chunk` is the most positions added at once: a chunk then never overwrites a
key that its own first token still needs.  Without a window it is the context length.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

DTYPES: dict[str, np.dtype[Any]] = {"f16": np.dtype(np.uint16), "f32": np.dtype(np.float32)}


def padded(head_dim: int) -> int:
    """Numbers a head takes in the cache: whole vectors of 16, the rest zero."""
    return -(-head_dim // 16) * 16


class KVCache:
    """keys, values (layers, K, capacity, padded head_dim) and the position of the next token.

    Half precision is kept as its 16-bit patterns (uint16).
    """

    def __init__(
        self, n_layers: int, n_kv_heads: int, head_dim: int, capacity: int, kv_type: str = "f16"
    ) -> None:
        shape = (n_layers, n_kv_heads, capacity, padded(head_dim))
        self.kv_type = kv_type
        self.keys: npt.NDArray[Any] = np.zeros(shape, DTYPES[kv_type])
        self.values: npt.NDArray[Any] = np.zeros(shape, DTYPES[kv_type])
        self.offset = 0

    @property
    def capacity(self) -> int:
        """Positions kept."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, whatever the offset."""
        return self.keys.nbytes + self.values.nbytes

    def advance(self, n: int) -> None:
        """`n` positions have been written to every layer."""
        self.offset += n

    def reset(self) -> None:
        """Forget the sequence; the memory stays."""
        self.offset = 0

    def take_memory(self) -> None:
        """Touch every page now, so that a ring has its final size from the start."""
        self.keys.fill(0)
        self.values.fill(0)


def cache_bytes(
    n_layers: int, n_kv_heads: int, head_dim: int, capacity: int, kv_type: str = "f16"
) -> int:
    """What a KVCache of this shape will take."""
    positions = n_layers * n_kv_heads * capacity
    return 2 * positions * padded(head_dim) * DTYPES[kv_type].itemsize
