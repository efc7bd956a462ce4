"""GGML's tensor types that this project reads: the file's ids and the size of their blocks.

The numbers are GGUF's `ggml_type`; a block is the smallest unit a row is made of.
"""

from enum import IntEnum


class GGMLType(IntEnum):
    """A tensor type by the id a GGUF file stores for it."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_size(self) -> int:
        """Values in a block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return _BLOCKS[self][1]

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values; ValueError when blocks do not divide it."""
        if cols % self.block_size:
            raise ValueError(f"{self.name} rows are multiples of {self.block_size}, got {cols}")
        return cols // self.block_size * self.block_bytes


_BLOCKS = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
}
