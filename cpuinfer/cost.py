"""What a forward pass has to read and to multiply, by the file and the shape alone.

It is what a measured time is held against: no machine reads faster than its memory or multiplies
faster than its cores.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cpuinfer.cache import cache_bytes
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile, QTensor


@dataclass(frozen=True)
class Cost:
    """Bytes read from memory, each once, and multiplications with their additions."""

    nbytes: int = 0
    macs: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.nbytes + other.nbytes, self.macs + other.macs)


@dataclass(frozen=True)
class Rows:
    """What a sequence adds in a pass: `tokens` at `offset`, with logits of the last `n_logits`."""

    offset: int
    tokens: int
    n_logits: int


def bytes_per_token(file: GGUFFile) -> int:
    """The weights each token is computed from: all but an embedding table of its own."""
    layers, output = _weights(file)
    return layers.nbytes + output.nbytes


def pass_cost(file: GGUFFile, config: ModelConfig, kv_type: str, sequences: Iterable[Rows]) -> Cost:
    """A pass over rows of several sequences: weights are read once for all of them, the keys and
    values a sequence sees once for all its rows."""
    c = config
    layers, output = _weights(file)
    logits, total = 0, Cost(layers.nbytes)
    for rows in sequences:
        logits += rows.n_logits
        end = rows.offset + rows.tokens
        window = end if c.sliding_window is None else c.sliding_window
        positions = min(end, window + rows.tokens - 1)
        seen = sum(min(position, window) for position in range(rows.offset + 1, end + 1))
        attention = Cost(
            cache_bytes(c.n_layers, c.n_kv_heads, c.head_dim, positions, kv_type),
            2 * c.n_layers * c.n_heads * c.head_dim * seen,
        )
        total += attention + Cost(macs=rows.tokens * layers.macs)
    return total + Cost(output.nbytes if logits else 0, logits * output.macs)


def _weights(file: GGUFFile) -> tuple[Cost, Cost]:
    """All layers, and the output matrix, for one row."""
    tied = "output.weight" not in file.tensors
    output = file.tensors["token_embd.weight" if tied else "output.weight"]
    ends = ("token_embd.weight", "output.weight")
    layers = (tensor for name, tensor in file.tensors.items() if name not in ends)
    return sum(map(_row_cost, layers), Cost()), _row_cost(output)


def _row_cost(tensor: QTensor) -> Cost:
    return Cost(tensor.data.nbytes, math.prod(tensor.shape) if len(tensor.shape) == 2 else 0)
