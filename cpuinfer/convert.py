"""Published weights -> a GGUF file in any type, in one pass: `cpuinfer convert`.

Tensor by tensor: memory holds one tensor of the output and some rows as floats, whatever the size
of the model. What a checkpoint means is known in quant.source, which type a tensor gets in
quant.mixes; whether the file is right is another room's to say, before it takes its place.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant import quantize
from quant.ggml_types import GGMLType
from quant.gguf_writer import Tensor, write_gguf
from quant.llama import SourceTensor
from quant.mixes import MIXES, Model, Wishes, is_matrix, target_types
from quant.partial_file import complete_or_absent
from quant.source import Source, read_source

_STEP = 1 << 18  # values a thread takes at a time
_HEADER_BYTES = 1 << 20  # beside the vocabulary, which is counted

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Conversion:
    """A tensor of the checkpoint and the type it is to have."""

    tensor: SourceTensor
    target: GGMLType

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return self.tensor.n_rows * self.target.row_bytes(self.tensor.shape[-1])

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Ranges of rows to work on at a time, each within a part of the tensor."""
        rows = self.tensor.part_rows
        step = max(1, _STEP // self.tensor.shape[-1])
        return [
            (first + start, first + min(start + step, rows))
            for first in range(0, self.tensor.n_rows, rows)
            for start in range(0, rows, step)
        ]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a checkpoint becomes: metadata as `write_gguf` takes it, and the tensors in order."""

    source: Source
    metadata: dict[str, Any]
    conversions: tuple[Conversion, ...]
    fallbacks: tuple[str, ...]  # tensors whose rows the blocks of their type do not divide

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(conversion.nbytes for conversion in self.conversions)


def plan(directory: Path, mix_name: str, wishes: Wishes) -> Plan:
    """What `mix_name`, one of MIXES, makes of a checkpoint. OSError and CheckpointError as
    `read_source`."""
    source = read_source(directory)
    mix, sizes = MIXES[mix_name], source.sizes
    shapes = {tensor.name: (tensor.shape, GGMLType.F32) for tensor in source.tensors}
    model = Model(sizes.n_layers, sizes.n_heads // sizes.n_kv_heads, sizes.n_experts)
    targets = target_types(shapes, mix, model, wishes)
    return Plan(
        source,
        source.metadata | {"general.file_type": mix.file_type},
        tuple(Conversion(tensor, targets[tensor.name]) for tensor in source.tensors),
        tuple(
            name
            for name, (shape, _) in shapes.items()
            if is_matrix(name, shape) and shape[-1] % mix.qtype.block_size
        ),
    )


def run(
    plan: Plan, path: Path, threads: int, on_progress: Report, check: Callable[[Path], None]
) -> None:
    """Write what was planned to `path`, complete or not at all.

    `check` is called with the finished file before it takes its place; what it raises leaves no
    file. `on_progress("convert", bytes read, of how many)`. CheckpointError names a tensor with a
    value that is no number or that its type cannot hold; OSError, MemoryError as they come.
    """
    with complete_or_absent(path, plan.nbytes + _vocabulary_bytes(plan) + _HEADER_BYTES) as place:
        _write(plan, place, threads, on_progress)
        plan.source.checkpoint.check_unchanged()
        check(place)


def _vocabulary_bytes(plan: Plan) -> int:
    """About what tokens and merges take: their lengths, texts, scores and types."""
    lists = [value for value in plan.metadata.values() if isinstance(value, list)]
    return sum(16 + len(item.encode()) for items in lists for item in items)


def _write(plan: Plan, path: Path, threads: int, on_progress: Report) -> None:
    total = sum(conversion.tensor.nbytes for conversion in plan.conversions)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        on_progress("convert", done, total)

    with ThreadPoolExecutor(threads) as pool:
        tensors = [
            Tensor(
                conversion.tensor.name,
                conversion.target,
                conversion.tensor.shape,
                partial(_packed, conversion, pool, report),
            )
            for conversion in plan.conversions
        ]
        report(0)
        write_gguf(path, plan.metadata, tensors)


def _packed(
    conversion: Conversion, pool: ThreadPoolExecutor, report: Callable[[int], None]
) -> NDArray[np.uint8]:
    """The packed rows of a tensor in its new type."""
    tensor, target = conversion.tensor, conversion.target
    out = np.empty((tensor.n_rows, target.row_bytes(tensor.shape[-1])), np.uint8)

    def make(rows: tuple[int, int]) -> int:
        values = tensor.rows(*rows)
        try:
            out[slice(*rows)] = quantize(values, target)
        except ValueError as error:
            raise tensor.wrong(rows[0], str(error)) from error
        return values.size * tensor.dtype.block_bytes

    for count in pool.map(make, conversion.parts):
        report(count)
    return out.reshape(*tensor.shape[:-1], -1)


def report(plan: Plan, mix_name: str) -> dict[str, Any]:
    """Types and bytes, in all and of each tensor, as `cpuinfer quantize` reports them."""
    values = sum(math.prod(conversion.tensor.shape) for conversion in plan.conversions)
    before = sum(conversion.tensor.nbytes for conversion in plan.conversions)
    return {
        "input": str(plan.source.checkpoint.directory),
        "type": mix_name,
        "bytes_before": before,
        "bytes": plan.nbytes,
        "bits_per_weight_before": 8 * before / max(1, values),
        "bits_per_weight": 8 * plan.nbytes / max(1, values),
        "tensors": [
            {
                "name": conversion.tensor.name,
                "shape": list(conversion.tensor.shape),
                "type_before": conversion.tensor.dtype.name,
                "type": conversion.target.name,
                "bytes_before": conversion.tensor.nbytes,
                "bytes": conversion.nbytes,
            }
            for conversion in plan.conversions
        ],
    }


def warnings(plan: Plan) -> Iterator[str]:
    """What a user may not expect."""
    if plan.fallbacks:
        yield (
            f"{len(plan.fallbacks)} tensors have rows that blocks do not divide and get another "
            f"type: {', '.join(plan.fallbacks[:3])}{', ...' * (len(plan.fallbacks) > 3)}"
        )
    if plan.metadata["tokenizer.ggml.model"] != "llama":
        yield "the file is complete, but cpuinfer does not run byte-pair vocabularies yet"
    if plan.source.sizes.n_experts:
        yield "the file is complete, but cpuinfer does not run mixtures of experts yet"
    if "tokenizer.chat_template" not in plan.metadata:
        yield "the checkpoint has no chat template: to chat, name one with --template"
