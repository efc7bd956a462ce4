"""A safetensors file -> its tensors, whose rows are read when they are asked for.

    size      u64, little-endian
    header    JSON of that size: name -> dtype, shape, data_offsets [begin, end)
    data      the tensors, without holes

Nothing is mapped: memory and address space hold the rows that are being read, and a file that
became shorter is an error here, where it would be a signal from a map.
"""

import errno
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant import dequantize
from quant.ggml_types import GGMLType
from quant.settings import CheckpointError, json_object

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
_DTYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file; its bytes begin at `offset` of the file."""

    path: Path
    name: str
    dtype: GGMLType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.block_bytes

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """Rows start to end, (end - start, cols); a vector is one row.

        CheckpointError for NaN and infinity, which no model survives; OSError where the file
        cannot be read or has become shorter.
        """
        data = np.empty((end - start, self.dtype.row_bytes(self.shape[-1])), np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * data.shape[1])
            if file.readinto(data.data) != data.nbytes:
                reason = "it has become shorter while it was read"
                raise OSError(errno.EIO, reason, str(self.path))
        values = dequantize(data, self.dtype)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            bad = f"{values[row, column]} in row {start + row}, column {column}"
            raise CheckpointError(self.path, self.name, bad)
        return values


def read_safetensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a file, once all of its header is known to be right; CheckpointError if not.

    The rules are those of the safetensors library, with a reason for each.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        raw = file.read(8)
        if len(raw) < 8:
            raise CheckpointError(path, "header", f"the file ends after {len(raw)} bytes")
        length = int.from_bytes(raw, "little")
        if length > MAX_HEADER_BYTES:
            reason = f"{length} bytes, at most {MAX_HEADER_BYTES} are allowed"
            raise CheckpointError(path, "header", reason)
        if length > size - 8:
            raise CheckpointError(path, "header", f"{length} bytes, the file has {size - 8}")
        header = json_object(path, file.read(length))
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, info, 8 + length) for name, info in header.items()]
    _check_gapless(path, tensors, 8 + length, size)
    yield from tensors


def _tensor(path: Path, name: str, info: Any, data_start: int) -> StoredTensor:
    """An entry of the header; CheckpointError unless everything in it fits together."""

    def wrong(reason: str) -> CheckpointError:
        return CheckpointError(path, name, reason)

    fields = info if isinstance(info, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if dtype not in _DTYPES:
        raise wrong(f"type {str(dtype)[:40]}, only {', '.join(_DTYPES)} are read")
    if shape is None or not shape or 0 in shape:
        raise wrong(f"shape {str(fields.get('shape'))[:80]}, wanted sizes above 0")
    if offsets is None or len(offsets) != 2:
        raise wrong(f"data_offsets {str(fields.get('data_offsets'))[:80]}, wanted begin and end")
    begin, end = offsets
    nbytes = math.prod(shape) * _DTYPES[dtype].block_bytes
    if end - begin != nbytes:
        raise wrong(f"{end - begin} bytes, but {dtype} of shape {shape} has {nbytes}")
    return StoredTensor(path, name, _DTYPES[dtype], shape, data_start + begin)


def _naturals(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 on; None for anything else."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return None
    return tuple(value)


def _check_gapless(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """Every byte behind the header belongs to one tensor, or this is no file to trust."""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != start:
            kind = "overlaps the tensor before it" if tensor.offset < start else "has a hole before"
            raise CheckpointError(path, tensor.name, f"{kind} ({tensor.offset}, not {start})")
        start += tensor.nbytes
    if start != size:
        kind = "too short" if start > size else "too long"
        raise CheckpointError(path, "size", f"{kind}: {size} bytes, the tensors end at {start}")
