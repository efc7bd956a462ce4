"""Importance matrices: how much the columns of each weight matter, as llama.cpp measures it.

Two formats. GGUF: for each weight NAME the tensors NAME.in_sum2 (matrices, cols), sums of squared
activations, and NAME.counts, over how many tokens. The older one, little-endian, is
    n_entries i32, then for each: bytes i32 and the name, calls i32, values i32 and float32s
and behind these, where it goes on, chunks i32, bytes i32 and the name of the text.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpuinfer.gguf import GGUFFile, ModelFormatError, open_gguf
from cpuinfer.gguf_values import Value
from quant import dequantize

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, eq=False)
class Importance:
    """`weights`: tensor -> (values,) float32, those of its matrices in turn; from `chunks` chunks
    of the text `dataset` (0 and "" where the file does not say)."""

    path: Path
    weights: Mapping[str, NDArray[np.float32]]
    dataset: str
    chunks: int

    def rows(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """(matrices, cols) for a tensor; None where there is nothing of it."""
        found = self.weights.get(name)
        matrices = math.prod(shape[:-2])
        if found is None:
            return None
        if len(found) != matrices * shape[-1]:
            reason = f"{len(found)} values, the tensor has {matrices} x {shape[-1]} columns"
            raise ModelFormatError(self.path, name, None, reason)
        return found.reshape(matrices, -1)


def read_importance(path: str | os.PathLike[str]) -> Importance:
    """A file of either format; OSError where it cannot be read, ModelFormatError for its content.

    All weights are finite and not negative.
    """
    with open(path, "rb") as file:
        start = file.read(4)
        found = None if start == b"GGUF" else _Old(Path(path), start + file.read()).read()
    if found is None:
        found = _from_gguf(open_gguf(path))
    for name, weights in found.weights.items():
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ModelFormatError(found.path, name, None, "a weight is negative or no number")
    return found


def _from_gguf(file: GGUFFile) -> Importance:
    weights: dict[str, NDArray[np.float32]] = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in file.tensors:
            raise file.error(name, f"there is no {weight}{_COUNTS}")
        counted = file.tensors[weight + _COUNTS]
        sums, counts = (
            dequantize(tensor.data, tensor.qtype),
            dequantize(counted.data, counted.qtype),
        )
        if counts.size != len(sums):
            raise file.error(name, f"{len(sums)} matrices, but {counts.size} counts")
        counts = counts.reshape(-1, 1)
        with np.errstate(all="ignore"):  # what is no number is refused later
            mean = (sums / counts).astype(np.float32)
        mean[counts[:, 0] <= 0] = 1  # experts that no token was given to: all columns alike
        weights[weight] = mean.ravel()
    if not weights:
        raise file.error(f"*{_SUMS}", "no such tensors: not an importance matrix")
    datasets = file.array("imatrix.datasets", str, [])
    dataset = datasets[0].decode(errors="replace") if datasets else ""
    return Importance(file.path, weights, dataset, file.uint("imatrix.chunk_count", 0))


class _Old:
    """Reads the older format."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.pos = path, data, 0

    def read(self) -> Importance:
        """All of it."""
        weights: dict[str, NDArray[np.float32]] = {}
        for _ in range(self._count("entries")):
            name = self._text("entry")
            calls = self._count(name)
            values = np.frombuffer(self._take(4 * self._count(name), name), "<f4")
            weights[name] = (values / max(1, calls)).astype(np.float32)
        chunks, dataset = 0, ""
        if self.pos < len(self.data):
            chunks = self._count("chunks")
            dataset = self._text("dataset")
        if not weights:
            raise ModelFormatError(self.path, "entries", 0, "none: not an importance matrix")
        return Importance(self.path, weights, dataset, chunks)

    def _take(self, count: int, field: str) -> bytes:
        end = self.pos + count
        if end > len(self.data):
            reason = f"{count} bytes needed, {len(self.data) - self.pos} left"
            raise ModelFormatError(self.path, field, self.pos, reason)
        taken, self.pos = self.data[self.pos : end], end
        return taken

    def _count(self, field: str) -> int:
        place = self.pos
        (count,) = struct.unpack("<i", self._take(4, field))
        if count < 0:
            raise ModelFormatError(self.path, field, place, f"a count of {count}")
        return int(count)

    def _text(self, field: str) -> str:
        return self._take(self._count(field), field).decode(errors="replace")


def provenance(importance: Importance) -> dict[str, Value]:
    """The keys that a file quantized with it carries."""
    keys: dict[str, Value] = {
        "quantize.imatrix.file": importance.path.name,
        "quantize.imatrix.dataset": importance.dataset,
        "quantize.imatrix.entries_count": len(importance.weights),
        "quantize.imatrix.chunks_count": importance.chunks,
    }
    return {key: value for key, value in keys.items() if value}
