"""Metadata and tensors -> a GGUF file (version 3, little-endian), complete or absent.

    header      magic "GGUF", version, number of tensors, number of keys
    metadata    key, value type, value
    infos       name, dimensions (the contiguous one first), type, offset in the data
    data        every tensor at a multiple of `general.alignment` (32 if the metadata does not say)

Does not choose keys, names or types: see hf.py for a checkpoint's.
"""

import errno
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quant import quantize
from quant.ggml_types import GGMLType

DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less the closing zero
MAX_DIMS = 4  # GGML_MAX_DIMS

# gguf_type of gguf.h: the ids of metadata values
_STRING, _ARRAY = 8, 9
_SCALARS = {
    np.dtype(np.uint8): 0,
    np.dtype(np.int8): 1,
    np.dtype(np.uint16): 2,
    np.dtype(np.int16): 3,
    np.dtype(np.uint32): 4,
    np.dtype(np.int32): 5,
    np.dtype(np.float32): 6,
    np.dtype(np.bool_): 7,
    np.dtype(np.uint64): 10,
    np.dtype(np.int64): 11,
    np.dtype(np.float64): 12,
}


@dataclass(frozen=True)
class Raw:
    """A metadata value as a file holds it, with its type in front."""

    data: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor to write. `shape` is in NumPy order: (rows, cols).

    `data()` is called once, when the tensor's turn comes: floating-point values of that shape,
    which are quantized, or rows packed already, uint8 (..., row_bytes).
    """

    name: str
    qtype: GGMLType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @classmethod
    def of(cls, name: str, qtype: GGMLType, array: np.ndarray) -> "Tensor":
        """A tensor in memory; the shape follows from the array, packed (uint8) or not."""
        shape = array.shape
        if array.dtype == np.uint8 and shape:
            shape = (*shape[:-1], shape[-1] // qtype.block_bytes * qtype.block_size)
        return cls(name, qtype, shape, lambda: array)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """(..., row_bytes); ValueError when blocks do not divide the rows."""
        try:
            return (*self.shape[:-1], self.qtype.row_bytes(self.shape[-1]))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of the packed rows."""
        return math.prod(self.packed_shape)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Iterable[Tensor | tuple[str, GGMLType, np.ndarray]],
) -> None:
    """Write `path`, or leave it as it was; one tensor's data is in memory at a time.

    Metadata: str or bytes; bool; int (stored as uint32); float (float32); a NumPy scalar (its own
    type); a one-dimensional NumPy array; a list of str or bytes, or of equal Python scalars; Raw.
    A tuple (name, type, array) stands for `Tensor.of`. An existing file is replaced.

    ValueError for what GGUF cannot hold, OSError from the file system.
    """
    infos = [t if isinstance(t, Tensor) else Tensor.of(*t) for t in tensors]
    alignment = _alignment(metadata)
    offsets, size = _lay_out(infos, alignment)
    head = _head(metadata, infos, offsets)
    head += bytes(-len(head) % alignment)
    with _complete_or_absent(Path(path), len(head) + size) as file:
        file.write(head)
        for tensor in infos:
            file.write(_packed(tensor).data)
            file.write(bytes(-tensor.nbytes % alignment))


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is a power of two from 8 on, got {alignment}")
    return alignment


def _lay_out(tensors: list[Tensor], alignment: int) -> tuple[list[int], int]:
    """Each tensor's offset in the data, and the size of the data."""
    names: set[str] = set()
    offsets, end = [], 0
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"two tensors are called {tensor.name!r}")
        if len(tensor.name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"tensor name {tensor.name!r} has more than {MAX_NAME_BYTES} bytes")
        if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
            raise ValueError(f"{tensor.name} has shape {tensor.shape}; wanted 1 to 4 sizes above 0")
        names.add(tensor.name)
        offsets.append(end)
        end += tensor.nbytes + -tensor.nbytes % alignment
    return offsets, end


def _packed(tensor: Tensor) -> np.ndarray:
    """The tensor's rows as the file holds them, uint8, contiguous."""
    array = tensor.data()
    if np.issubdtype(array.dtype, np.floating):
        if array.shape != tensor.shape:
            raise ValueError(f"{tensor.name} is {tensor.shape}, its data {array.shape}")
        try:
            return quantize(array.astype(np.float32, copy=False), tensor.qtype)
        except ValueError as error:
            raise ValueError(f"{tensor.name}: {error}") from error
    if array.dtype != np.uint8 or array.shape != tensor.packed_shape:
        raise ValueError(
            f"{tensor.name}: packed rows are uint8 {tensor.packed_shape}, "
            f"got {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array)


def _head(metadata: Mapping[str, Any], tensors: list[Tensor], offsets: list[int]) -> bytes:
    """Everything before the data, without the padding."""
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        try:
            head += _string(key) + _value(value)
        except ValueError as error:
            raise ValueError(f"metadata {key}: {error}") from error
    for tensor, offset in zip(tensors, offsets, strict=True):
        dims = tensor.shape[::-1]
        head += _string(tensor.name)
        head += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.qtype, offset)
    return bytes(head)


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, str | bytes):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, str | bytes) for item in value):
            items = b"".join(map(_string, value))
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + items
        value = _array_of(value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise ValueError(f"arrays have one dimension, this one has {value.ndim}")
        head = struct.pack("<IIQ", _ARRAY, _scalar_type(value.dtype), len(value))
        return head + value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    scalar = value if isinstance(value, np.generic) else _array_of([value])[0]
    return struct.pack("<I", _scalar_type(scalar.dtype)) + scalar.tobytes()


def _scalar_type(dtype: np.dtype[Any]) -> int:
    if dtype.newbyteorder("=") not in _SCALARS:
        raise ValueError(f"GGUF has no values of type {dtype}")
    return _SCALARS[dtype.newbyteorder("=")]


def _array_of(values: list[Any] | tuple[Any, ...]) -> np.ndarray:
    """Python scalars of one type as the array that a file holds."""
    kinds = {type(value) for value in values}
    for kind, dtype in ((bool, np.bool_), (int, np.uint32), (float, np.float32)):
        if kinds == {kind}:
            try:
                return np.array(values, dtype)
            except OverflowError:
                raise ValueError(f"{values} are not all uint32; give a NumPy type") from None
    names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
    raise ValueError(f"no GGUF type for items of type {names}")


@contextmanager
def _complete_or_absent(path: Path, size: int) -> Iterator[BinaryIO]:
    """A file of `size` bytes that takes `path`'s place at the end, or vanishes if anything fails.

    The space is taken at once, so that a full disk is found at the start.
    """
    target = path.resolve()  # through a link, so that the link stays
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{path} exists and is no regular file")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "xb") as file:
        try:
            _reserve(file, size)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the space of a new file, where the system offers that; OSError when it is not there."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"{error.strerror} ({size / 1e6:.1f} MB are needed)"
            raise OSError(error.errno, reason, file.name) from error
