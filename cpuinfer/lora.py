"""LoRA adapters: low-rank additions to a model's matrices, from a GGUF file.

With W (rows, cols) of the model an adapter has two tensors, as llama.cpp's converter writes them:
    NAME.lora_a   A (rank, cols)    of the embedding, transposed: (rows, rank)
    NAME.lora_b   B (rows, rank)    of the embedding, transposed: (cols, rank)
and W x becomes W x + scale * alpha / rank * B (A x), with alpha of the file (0: alpha / rank is 1)
and scale of the user. All of it is float32, whatever the type of W.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpuinfer import ops
from cpuinfer.gguf import GGUFFile, QTensor, open_gguf
from cpuinfer.weights import Weight, pack
from quant import dequantize
from quant.ggml_types import GGMLType

Floats = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_A, _B = ".lora_a", ".lora_b"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that fits its model; `names` are the matrices it adds to."""

    file: GGUFFile
    scale: float
    names: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors as floats."""
        return sum(4 * math.prod(tensor.shape) for tensor in self.file.tensors.values())

    def factors(self, name: str) -> tuple[Floats, Floats]:
        """A (rank, cols) and B (rows, rank), B scaled: B @ A is what the matrix gains.

        ModelFormatError for values that are no numbers, times the scale.
        """
        rank = self.file.tensors[name + _B].shape[-1]
        alpha = self.file.number("adapter.lora.alpha")
        strength = self.scale * alpha / rank if alpha else self.scale
        if name == EMBEDDING:
            return self._floats(name + _B).T, self._floats(name + _A, strength)
        return self._floats(name + _A), self._floats(name + _B, strength)

    def _floats(self, name: str, times: float = 1.0) -> Floats:
        tensor = self.file.tensors[name]
        values = dequantize(tensor.data, tensor.qtype)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= np.float32(times)
        if not np.isfinite(values).all():
            raise self.file.error(name, f"a value times {times:g} is infinite or no number")
        tensor.release()
        return values


def open_adapter(
    path: str | os.PathLike[str], scale: float, architecture: str, shapes: Shapes
) -> Adapter:
    """An adapter for a model of this architecture, whose tensors have these shapes.

    Raises OSError, ModelFormatError for a file that is no adapter or not one for such a model,
    ValueError for a scale that is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the scale of {os.fspath(path)} must be finite, got {scale}")
    file = open_gguf(path)
    for key, expected in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", architecture),
    ):
        found = file.text(key, None)
        if found != expected:
            reason = "missing" if found is None else f"{found!r}"
            raise file.error(key, f"{reason}, expected {expected!r} of an adapter for this model")
    file.number("adapter.lora.alpha")
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise file.error("adapter.alora.invocation_tokens", "activated LoRA is not supported")
    if not file.tensors:
        raise file.error("tensors", "there are none")
    names = dict.fromkeys(_adapted(file, name, shapes) for name in file.tensors)
    return Adapter(file, scale, tuple(names))


def _adapted(file: GGUFFile, name: str, shapes: Shapes) -> str:
    """The matrix that a tensor of an adapter belongs to; ModelFormatError where it fits none."""
    matrix, ending = name[: -len(_A)], name[-len(_A) :]
    if ending not in (_A, _B):
        raise file.error(name, f"only tensors NAME{_A} and NAME{_B} are supported")
    if len(shapes.get(matrix, ())) != 2:
        raise file.error(name, f"the model has no matrix {matrix}")
    if matrix == EMBEDDING and OUTPUT not in shapes:
        raise file.error(name, "the model's output is the same matrix, which no adapter can change")
    other = matrix + (_B if ending == _A else _A)
    if other not in file.tensors:
        raise file.error(name, f"there is no {other}")
    rows, cols = shapes[matrix]
    a, b = file.tensors[matrix + _A].shape, file.tensors[matrix + _B].shape
    rank = b[-1] if b else 0
    expected = ((rows, rank), (cols, rank)) if matrix == EMBEDDING else ((rank, cols), (rows, rank))
    # Of a matrix of one row ggml keeps one dimension.
    fitting = all(
        size in (shape, (1, *shape)) for shape, size in zip((a, b), expected, strict=True)
    )
    if rank == 0 or not fitting:
        reason = f"shapes {a} and {b} of {_A} and {_B}, expected {expected[0]} and {expected[1]}"
        raise file.error(name, reason)
    return matrix


def combined(adapters: Sequence[Adapter], name: str) -> tuple[Floats, Floats] | None:
    """The factors of all adapters as one A (ranks, cols), B (rows, ranks); None where none adds."""
    found = [adapter.factors(name) for adapter in adapters if name in adapter.names]
    if not found:
        return None
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found], axis=1)


# At run time


@dataclass(frozen=True)
class Addition:
    """B (A x) to add to product number `index` of those that meet the same activations."""

    index: int
    a: Weight
    b: Weight


def additions(adapters: Sequence[Adapter], names: Sequence[str]) -> tuple[Addition, ...]:
    """What adapters add to the products of matrices that meet the same activations."""
    found = []
    for index, name in enumerate(names):
        factors = combined(adapters, name)
        if factors is not None:
            a, b = (packed(name, factor) for factor in factors)
            found.append(Addition(index, a, b))
    return tuple(found)


def add(products: list[Floats], x: Floats, additions: Sequence[Addition]) -> None:
    """Add to products [(T, rows), ...] of x (T, cols) in place."""
    lows = ops.linear(x, *(addition.a for addition in additions))  # (T, rank)
    for addition, low in zip(additions, lows, strict=True):
        products[addition.index] += ops.linear(low, addition.b)[0]


@dataclass(frozen=True)
class EmbeddingAddition:
    """What adapters add to the embedding: row t of `table` (V, rank) times `matrix` (D, rank)."""

    table: QTensor
    matrix: Weight

    def add(self, x: Floats, tokens: npt.NDArray[np.int32]) -> None:
        """Add to the embedding x (T, D) of tokens (T,) in place."""
        x += ops.linear(ops.embed(tokens, self.table), self.matrix)[0]


def embedding_addition(adapters: Sequence[Adapter]) -> EmbeddingAddition | None:
    """None where no adapter adds to the embedding."""
    factors = combined(adapters, EMBEDDING)
    if factors is None:
        return None
    a, b = factors
    return EmbeddingAddition(_tensor(EMBEDDING, b), packed(EMBEDDING, a.T))


def packed(name: str, values: Floats) -> Weight:
    """A factor of the matrix `name`, ready for `ops.linear`."""
    return pack(_tensor(f"{name} (adapter)", values))


def _tensor(name: str, values: Floats) -> QTensor:
    values = np.ascontiguousarray(values)
    return QTensor(name, GGMLType.F32, values.shape, values.view(np.uint8))
