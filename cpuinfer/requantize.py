"""A GGUF file -> the same model in other types: `cpuinfer quantize`.

Tensor by tensor, so that memory holds one tensor of the output and some rows as floats, whatever
the size of the model. Which type a tensor gets is decided in quant.mixes, how it is made in quant.
"""

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpuinfer.gguf import GGUFFile, QTensor
from cpuinfer.gguf_header import parse_header
from cpuinfer.importance import Importance, provenance
from quant import WEIGHTED, dequantize, fit, quantize, quantize_weighted
from quant.ggml_types import GGMLType
from quant.gguf_writer import Raw, Tensor, write_gguf
from quant.mixes import MIXES, Model, Wishes, is_matrix, target_types
from quant.partial_file import complete_or_absent

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_STEP = 1 << 18  # values a thread takes at a time

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Conversion:
    """A tensor, the type it is to have, and its importances (matrices, cols), if there are any.

    `added`, where it is given, is called with some rows and says what to add to them.
    """

    tensor: QTensor
    target: GGMLType
    weights: NDArray[np.float32] | None
    added: Callable[[slice], NDArray[np.float32]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return len(self.tensor.data) * self.target.row_bytes(self.tensor.shape[-1])


@dataclass(frozen=True, eq=False)
class Plan:
    """What a file becomes: its metadata as `write_gguf` takes it, and its tensors in order."""

    file: GGUFFile
    metadata: dict[str, Any]
    conversions: tuple[Conversion, ...]
    fallbacks: tuple[str, ...]  # tensors whose rows the blocks of their type do not divide

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(conversion.nbytes for conversion in self.conversions)


def plan(
    file: GGUFFile,
    mix_name: str,
    wishes: Wishes,
    importance: Importance | None = None,
    allow_requantize: bool = False,
) -> Plan:
    """What `mix_name`, one of MIXES, makes of a file.

    ValueError where tensors are quantized already and that is not allowed; ModelFormatError where
    the file does not say what the mix depends on, or the importances are those of another model.
    """
    mix = MIXES[mix_name]
    shapes = {name: (tensor.shape, tensor.qtype) for name, tensor in file.tensors.items()}
    targets = target_types(shapes, mix, _model(file), wishes, importance is not None)
    conversions = tuple(
        Conversion(tensor, targets[name], _weights(tensor, targets[name], importance))
        for name, tensor in file.tensors.items()
    )
    quantized = [
        conversion.tensor
        for conversion in conversions
        if conversion.tensor.qtype.block_size > 1
        and conversion.target is not conversion.tensor.qtype
    ]
    if quantized and not allow_requantize:
        raise ValueError(
            f"{file.path}: {quantized[0].name} is {quantized[0].qtype.name} already; quantizing it "
            "again loses more than quantizing the original (--allow-requantize does it)"
        )
    metadata = raw_metadata(file) | {
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": mix.file_type,
    }
    if importance is not None:
        metadata |= provenance(importance)
    fallbacks = tuple(
        name
        for name, (shape, _) in shapes.items()
        if is_matrix(name, shape) and shape[-1] % mix.qtype.block_size
    )
    return Plan(file, metadata, conversions, fallbacks)


def _model(file: GGUFFile) -> Model:
    architecture = file.text("general.architecture")
    if architecture != "llama":
        reason = f"{architecture}; the mixes of types are known for llama only"
        raise file.error("general.architecture", reason)
    n_heads = file.uint("llama.attention.head_count")
    n_kv_heads = file.uint("llama.attention.head_count_kv", n_heads)
    if n_kv_heads == 0:
        raise file.error("llama.attention.head_count_kv", "0 heads")
    return Model(
        file.uint("llama.block_count"),
        n_heads // n_kv_heads,
        file.uint("llama.expert_count", 0),
    )


def _weights(
    tensor: QTensor, target: GGMLType, importance: Importance | None
) -> NDArray[np.float32] | None:
    """The importances that the making of `target` can use."""
    if importance is None or target is tensor.qtype or target not in WEIGHTED:
        return None
    return importance.rows(tensor.name, tensor.shape)


def raw_metadata(file: GGUFFile) -> dict[str, Any]:
    """The keys of a file with their values byte for byte, but for those of a split model."""
    with open(file.path, "rb") as opened:
        raw = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)  # arrays are views of it
    header = parse_header(raw, file.path)
    places = [*header.places.values(), *(info.place for info in header.tensors[:1])]
    starts = [place + 8 + len(key.encode()) for key, place in header.places.items()]
    ends = places[1:] if header.tensors else [*places[1:], header.data_start]
    values = [raw[start:end] for start, end in zip(starts, ends, strict=True)]
    metadata: dict[str, Any] = dict(zip(header.places, map(Raw, values), strict=True))
    for key in _SPLIT:
        metadata.pop(key, None)
    if "general.alignment" in metadata:
        metadata["general.alignment"] = header.alignment
    return metadata


def run(plan: Plan, path: Path, threads: int, on_progress: Report) -> None:
    """Write what was planned to `path`, complete or not at all.

    `on_progress("quantize", bytes read, of how many)`. ModelFormatError names a tensor with a
    value that is no number or that its type cannot hold; OSError, MemoryError as they come.
    """
    total = sum(conversion.tensor.data.nbytes for conversion in plan.conversions)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        on_progress("quantize", done, total)

    with complete_or_absent(path, plan.nbytes) as place, _pool(threads) as pool:
        tensors = [
            Tensor(
                conversion.tensor.name,
                conversion.target,
                conversion.tensor.shape,
                partial(_convert, plan.file, conversion, pool, report),
            )
            for conversion in plan.conversions
        ]
        on_progress("quantize", 0, total)
        write_gguf(place, plan.metadata, tensors)


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that take up nothing new once something has failed."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _convert(
    file: GGUFFile, conversion: Conversion, pool: ThreadPoolExecutor, report: Callable[[int], None]
) -> NDArray[np.uint8]:
    """The packed rows of a tensor in its new type."""
    tensor, target = conversion.tensor, conversion.target
    cols = tensor.shape[-1]
    out = np.empty((len(tensor.data), target.row_bytes(cols)), np.uint8)
    matrices = 1 if conversion.weights is None else len(conversion.weights)
    rows = len(out) // matrices
    step = min(rows, max(1, _STEP // cols))

    def part(start: int) -> int:
        end = min(start + step, start // rows * rows + rows)  # within a matrix
        weights = None if conversion.weights is None else conversion.weights[start // rows]
        out[start:end] = _packed(file, conversion, slice(start, end), weights)
        return (end - start) * int(tensor.data.shape[1])

    starts = [first + row for first in range(0, len(out), rows) for row in range(0, rows, step)]
    for count in pool.map(part, starts):
        report(count)
    tensor.release()
    return out.reshape(*tensor.shape[:-1], -1)


def _packed(
    file: GGUFFile, conversion: Conversion, rows: slice, weights: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    """Some rows of a tensor in another type, or checked, if they stay as they are."""
    tensor, target = conversion.tensor, conversion.target
    data = tensor.data[rows]
    values = _floats(data, tensor.qtype)
    if conversion.added is not None:
        values += conversion.added(rows)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        bad = f"{values[row, column]} in row {rows.start + row}, column {column}"
        raise file.error(tensor.name, bad)
    if target is tensor.qtype and conversion.added is None:
        return data
    try:
        if weights is None:
            return quantize(values, target)
        return quantize_weighted(values, weights, target)
    except ValueError as error:
        raise file.error(tensor.name, str(error)) from error


def _floats(data: NDArray[np.uint8], qtype: GGMLType) -> NDArray[np.float32]:
    """(rows, row_bytes) -> (rows, cols); what most models come in, the fast way."""
    if qtype is GGMLType.F16:
        return fit.from_f16(data.reshape(-1).view(np.uint16)).reshape(len(data), -1)
    return dequantize(data, qtype)
