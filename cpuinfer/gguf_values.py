"""The values of a GGUF header, read one after another from bytes that may hold anything.

A string is a length u64 and its bytes; an array is an element type u32, a count u64 and elements.
A length is compared with the bytes that remain, then with a cap, before it is used; sizes are
Python integers, which do not wrap. All is little-endian.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpuinfer.gguf_errors import ModelFormatError

Buffer = bytes | mmap.mmap
Array = npt.NDArray[Any]
Value = int | float | bool | str | Array | list[bytes]

MAX_METADATA_BYTES = 512 << 20
MAX_STRING_BYTES = 64 << 20
MAX_ARRAY_ITEMS = 16 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# Value type -> how to read one, and the dtype of an array of them.
_SCALARS: dict[int, tuple[struct.Struct, np.dtype[Any]]] = {
    0: (struct.Struct("<B"), np.dtype("<u1")),
    1: (struct.Struct("<b"), np.dtype("<i1")),
    2: (struct.Struct("<H"), np.dtype("<u2")),
    3: (struct.Struct("<h"), np.dtype("<i2")),
    UINT32: (_U32, np.dtype("<u4")),
    5: (struct.Struct("<i"), np.dtype("<i4")),
    6: (struct.Struct("<f"), np.dtype("<f4")),
    _BOOL: (struct.Struct("<B"), np.dtype("<u1")),
    10: (_U64, np.dtype("<u8")),
    11: (struct.Struct("<q"), np.dtype("<i8")),
    12: (struct.Struct("<d"), np.dtype("<f8")),
}


class Cursor:
    """A position in the header. Every read compares its length with what remains, first."""

    def __init__(self, buffer: Buffer, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.pos = 0
        self.limit = min(len(buffer), MAX_METADATA_BYTES)

    def error(self, field: str, place: int, reason: str) -> ModelFormatError:
        return ModelFormatError(self.path, field, place, reason)

    def left(self) -> str:
        """What remains, in words."""
        whole = "file" if self.limit == len(self.buffer) else f"{self.limit} allowed for metadata"
        return f"{self.limit - self.pos} bytes left of the {whole}"

    def beyond(self, field: str, count: int) -> ModelFormatError:
        """The error for `count` bytes at `pos` that pass the limit."""
        return self.error(field, self.pos, f"{count} bytes needed, {self.left()}")

    def too_long(self, field: str, place: int, length: int, cap: int) -> ModelFormatError:
        return self.error(field, place, f"a string of {length} bytes, at most {cap} are allowed")

    def take(self, field: str, count: int) -> int:
        """Steps over `count` bytes and returns where they begin."""
        if count > self.limit - self.pos:
            raise self.beyond(field, count)
        start = self.pos
        self.pos += count
        return start

    def uint32(self, field: str) -> int:
        value: int = _U32.unpack_from(self.buffer, self.take(field, 4))[0]
        return value

    def uint64(self, field: str) -> int:
        value: int = _U64.unpack_from(self.buffer, self.take(field, 8))[0]
        return value

    def string(self, field: str, cap: int) -> bytes:
        place = self.pos
        length = self.uint64(field)
        start = self.take(field, length)
        if length > cap:
            raise self.too_long(field, place, length, cap)
        return self.buffer[start : self.pos]

    def strings(self, field: str, count: int) -> list[bytes]:
        """`count` strings; the caller knows that 8 * `count` bytes remain.

        Does what `string` does, with local variables only: a vocabulary is read here.
        """
        buffer, limit, pos, unpack_length = self.buffer, self.limit, self.pos, _U64.unpack_from
        found = []
        for _ in range(count):
            if limit - pos < 8:
                self.pos = pos
                raise self.beyond(field, 8)
            (length,) = unpack_length(buffer, pos)
            pos += 8
            if length > limit - pos:
                self.pos = pos
                raise self.beyond(field, length)
            if length > MAX_STRING_BYTES:
                raise self.too_long(field, pos - 8, length, MAX_STRING_BYTES)
            found.append(buffer[pos : pos + length])
            pos += length
        self.pos = pos
        return found


def read_value(cursor: Cursor, key: str, kind: int, not_utf8: list[str]) -> Value:
    """The value of `key`; of text that is not UTF-8 the key is added to `not_utf8`."""
    if kind == _STRING:
        raw = cursor.string(key, MAX_STRING_BYTES)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            not_utf8.append(key)
            return raw.decode(errors="replace")
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _SCALARS:
        raise cursor.error(key, cursor.pos - 4, f"unknown value type {kind}")
    form, _ = _SCALARS[kind]
    place = cursor.take(key, form.size)
    value: int | float = form.unpack_from(cursor.buffer, place)[0]
    if kind != _BOOL:
        return value
    if value > 1:
        raise cursor.error(key, place, f"a boolean is 0 or 1, not {value}")
    return value == 1


def _array(cursor: Cursor, key: str) -> Array | list[bytes]:
    place = cursor.pos
    kind = cursor.uint32(key)
    if kind == _ARRAY:
        raise cursor.error(key, place, "arrays of arrays are not supported")
    if kind != _STRING and kind not in _SCALARS:
        raise cursor.error(key, place, f"unknown type {kind} of array elements")
    count = cursor.uint64(key)
    itemsize = 8 if kind == _STRING else _SCALARS[kind][1].itemsize
    if count * itemsize > cursor.limit - cursor.pos:
        raise cursor.error(key, place, f"an array of {count} elements, {cursor.left()}")
    if count > MAX_ARRAY_ITEMS:
        reason = f"an array of {count} elements, at most {MAX_ARRAY_ITEMS} are allowed"
        raise cursor.error(key, place, reason)
    if kind == _STRING:
        return cursor.strings(key, count)
    start = cursor.take(key, count * itemsize)
    values = array_at(cursor.buffer, _SCALARS[kind][1], count, start, itemsize)
    if kind != _BOOL:
        return values
    if count and values.max() > 1:
        raise cursor.error(key, place, "a boolean in the array is neither 0 nor 1")
    return values.view(np.bool_)


def array_at(buffer: Buffer, dtype: np.dtype[Any], count: int, offset: int, align: int) -> Array:
    """`count` read-only values from byte `offset`, which the caller knows to be there.

    A view, unless `align` does not divide `offset`: then a copy, since kernels are compiled for
    aligned arrays.
    """
    if not count:
        return np.frombuffer(b"", dtype)
    values = np.frombuffer(buffer, dtype, count, offset)
    if offset % align:
        values = values.copy()
        values.flags.writeable = False
    return values
