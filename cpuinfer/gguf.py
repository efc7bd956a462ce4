"""A GGUF file -> its metadata and its tensors, memory-mapped: the fence before the kernels.

Kernels check nothing, so what leaves here has been checked to the last byte. The tensors stay in
the file and are read-only views of the map. The header is `gguf_header`'s work; here are the
files: opening, mapping, and joining those of a split model.
"""

import errno
import math
import mmap
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar, overload

import numpy as np
import numpy.typing as npt

from cpuinfer.gguf_errors import ModelFormatError, escape
from cpuinfer.gguf_header import HEADER_BYTES, TensorInfo, check_data, parse_header
from cpuinfer.gguf_values import Array, Buffer, Value, array_at
from quant.ggml_types import GGMLType

__all__ = ["GGUFFile", "ModelFormatError", "QTensor", "Value", "escape", "open_gguf", "parse"]

_Default = TypeVar("_Default")
_DType = np.dtype[Any] | type[np.generic]


class _Required:
    """Stands for "no default": the key has to be there."""


_REQUIRED: Final = _Required()

# O_NONBLOCK: opening a FIFO must not wait for a writer. Windows has neither it nor FIFOs here.
_OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):
    _OPEN_FLAGS |= getattr(os, _flag, 0)

_PART_NAME = re.compile(
    r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL
)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor of the file: `data` is its blocks, uint8 (rows, row_bytes), read-only, contiguous.

    `shape` is in NumPy order, the last dimension contiguous; rows is the product of the others.
    """

    name: str
    qtype: GGMLType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def release(self) -> None:
        """Take the tensor's pages out of this process's memory; where used again, they are read
        again. For whom has made a copy, so that memory does not hold the weights twice."""
        owner: Any = self.data
        while isinstance(owner, np.ndarray):
            owner = owner.base
        mapped = owner.obj if isinstance(owner, memoryview) else None
        if not isinstance(mapped, mmap.mmap) or not hasattr(mapped, "madvise"):
            return  # copied out of the file already, or a system without madvise
        first = self.data.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + self.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            mapped.madvise(mmap.MADV_DONTNEED, start, end - start)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A model file, or the files of a split model as one. `nbytes` is their size together.

    Text values are str, arrays read-only with the file's dtype, arrays of strings list[bytes].
    The getters raise ModelFormatError, naming the key, when the value has another type, or when
    the key is missing and no default was given.
    """

    path: Path
    version: int
    metadata: Mapping[str, Value] = field(repr=False)
    tensors: Mapping[str, QTensor] = field(repr=False)
    nbytes: int
    warnings: tuple[str, ...]
    # Where each key and each tensor's description begins: file and byte.
    _places: Mapping[str, tuple[Path, int]] = field(repr=False)

    @property
    def paths(self) -> frozenset[Path]:
        """The file, or those of a split model."""
        return frozenset(path for path, _ in self._places.values())

    def error(self, name: str, reason: str) -> ModelFormatError:
        """The error to raise for what a key or a tensor of this file says."""
        path, place = self._places.get(name, (self.path, None))
        shown = f"tensor {name}" if name in self.tensors else name
        return ModelFormatError(path, shown, place, reason)

    def uint(self, key: str, default: _Default | _Required = _REQUIRED) -> int | _Default:
        """An integer that is 0 or more, of any of GGUF's integer types."""
        if key not in self.metadata:
            return self._default(key, default)
        value = self.metadata[key]
        if type(value) is not int or value < 0:
            raise self._mismatch(key, "an integer that is not negative")
        return value

    def number(self, key: str, default: _Default | _Required = _REQUIRED) -> float | _Default:
        """A finite float, or an integer as a float."""
        if key not in self.metadata:
            return self._default(key, default)
        value = self.metadata[key]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self._mismatch(key, "a finite number")
        return float(value)

    def text(self, key: str, default: _Default | _Required = _REQUIRED) -> str | _Default:
        """A string."""
        if key not in self.metadata:
            return self._default(key, default)
        value = self.metadata[key]
        if not isinstance(value, str):
            raise self._mismatch(key, "text")
        return value

    def flag(self, key: str, default: _Default | _Required = _REQUIRED) -> bool | _Default:
        """A boolean."""
        if key not in self.metadata:
            return self._default(key, default)
        value = self.metadata[key]
        if not isinstance(value, bool):
            raise self._mismatch(key, "a boolean")
        return value

    @overload
    def array(
        self, key: str, dtype: type[str], default: _Default | _Required = ...
    ) -> list[bytes] | _Default: ...

    @overload
    def array(
        self, key: str, dtype: _DType, default: _Default | _Required = ...
    ) -> Array | _Default: ...

    def array(
        self, key: str, dtype: type[str] | _DType, default: _Default | _Required = _REQUIRED
    ) -> Array | list[bytes] | _Default:
        """An array with elements of exactly this dtype; with `str`, strings as list[bytes]."""
        if key not in self.metadata:
            return self._default(key, default)
        value = self.metadata[key]
        if dtype is str:
            if isinstance(value, list):
                return value
            raise self._mismatch(key, "an array of strings")
        if not isinstance(value, np.ndarray) or value.dtype != dtype:
            raise self._mismatch(key, f"an array of {np.dtype(dtype)}")
        return value

    def _default(self, key: str, default: _Default | _Required) -> _Default:
        if isinstance(default, _Required):
            raise self.error(key, "the key is missing")
        return default

    def _mismatch(self, key: str, expected: str) -> ModelFormatError:
        value = self.metadata[key]
        if isinstance(value, list):
            found = f"an array of {len(value)} strings"
        elif isinstance(value, np.ndarray):
            found = f"an array of {value.size} {value.dtype}"
        else:
            found = f"{type(value).__name__} {value!r}"
        return self.error(key, f"expected {expected}, found {found}")


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Opens a model file; of a split model any part, the others lie in the same directory.

    Raises OSError (FileNotFoundError, IsADirectoryError, ...) for what is no readable file,
    ModelFormatError for its content, MemoryError where the address space does not suffice.
    """
    opened = _open_one(Path(path))
    count = opened.uint("split.count", 1)
    # llama.cpp writes a count of 0 into a model it has merged.
    return opened if count <= 1 else _join(opened, count)


def parse(buffer: Buffer, path: Path) -> GGUFFile:
    """Checks the bytes of one file and makes its tensors views of them. `path` names the file."""
    header = parse_header(buffer, path)
    trailing = check_data(header, path, len(buffer))
    warnings = list(header.warnings)
    if trailing:
        warnings.append(f"{trailing} bytes after the last tensor are ignored")
    places = {info.name: info.place for info in header.tensors} | dict(header.places)
    return GGUFFile(
        path=path,
        version=header.version,
        metadata=header.metadata,
        tensors=MappingProxyType(
            {info.name: _bind(buffer, header.data_start, info) for info in header.tensors}
        ),
        nbytes=len(buffer),
        warnings=tuple(f"{escape(path.name)}: {warning}" for warning in warnings),
        _places=MappingProxyType({name: (path, place) for name, place in places.items()}),
    )


def _bind(buffer: Buffer, data_start: int, info: TensorInfo) -> QTensor:
    # The scales of every block format are 2-byte values at even places of blocks of even size.
    item = 4 if info.qtype is GGMLType.F32 else 2
    flat = array_at(buffer, np.dtype(np.uint8), info.nbytes, data_start + info.offset, item)
    row_bytes = info.qtype.row_bytes(info.shape[-1] if info.shape else 1)
    data = flat.reshape(math.prod(info.shape[:-1]), row_bytes)
    return QTensor(info.name, info.qtype, info.shape, data)


def _open_one(path: Path) -> GGUFFile:
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size < HEADER_BYTES:  # an empty file cannot be mapped
            return parse(os.read(descriptor, HEADER_BYTES), path)
        return parse(_map(descriptor, path, status.st_size), path)
    finally:
        os.close(descriptor)


def _map(descriptor: int, path: Path, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise MemoryError(
            f"{escape(str(path))}: no room to map {size} bytes, the address space of this process "
            "is limited (ulimit -v)"
        ) from None


def _join(opened: GGUFFile, count: int) -> GGUFFile:
    """The split model of `count` parts that `opened` is one of; its metadata is the first part's.

    The names of the other parts come from the name of this one, never from what a file says.
    """
    number = opened.uint("split.no")
    name = _PART_NAME.fullmatch(opened.path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        ending = f"-{number + 1:05}-of-{count:05}.gguf"
        raise opened.error(
            "split.no", f"the name of this part of a split model must end in {ending}"
        )
    parts = [
        opened if index == number else _open_part(opened, name["stem"], index, count)
        for index in range(count)
    ]
    total = parts[0].uint("split.tensors.count")
    tensors: dict[str, QTensor] = {}
    for index, part in enumerate(parts):
        for key, expected in (
            ("split.no", index),
            ("split.count", count),
            ("split.tensors.count", total),
        ):
            if part.uint(key) != expected:
                raise part.error(key, f"{part.uint(key)}, expected {expected} in this part")
        for tensor in part.tensors.values():
            if tensor.name in tensors:
                raise part.error(tensor.name, "an earlier part of the split model has it too")
            tensors[tensor.name] = tensor
    if len(tensors) != total:
        reason = f"{total}, but the parts hold {len(tensors)} tensors"
        raise parts[0].error("split.tensors.count", reason)
    return replace(
        parts[0],
        tensors=MappingProxyType(tensors),
        nbytes=sum(part.nbytes for part in parts),
        warnings=tuple(warning for part in parts for warning in part.warnings),
        _places=MappingProxyType(
            {name: place for part in reversed(parts) for name, place in part._places.items()}
        ),
    )


def _open_part(opened: GGUFFile, stem: str, index: int, count: int) -> GGUFFile:
    name = f"{stem}-{index + 1:05}-of-{count:05}.gguf"
    try:
        return _open_one(opened.path.with_name(name))
    except FileNotFoundError:
        reason = f"{name}, another part of this split model, is not in the same directory"
        raise opened.error("split.count", reason) from None
