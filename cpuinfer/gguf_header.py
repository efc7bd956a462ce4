"""The header of a GGUF file, versions 2 and 3, little-endian: every byte before the tensor data.

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv times       key string | value type u32 | value
    n_tensors times  name string | n_dims u32 | dims u64, contiguous first | type u32 | offset u64
    zeros up to a multiple of general.alignment; here the tensor data starts

Values are read by `gguf_values`. Tensors are described here, their bytes are not touched.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cpuinfer.gguf_errors import ModelFormatError, foreign_format, text_conversion
from cpuinfer.gguf_values import UINT32, Buffer, Cursor, Value, read_value
from quant.ggml_types import GGMLType

HEADER_BYTES = 24
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63
MAX_DIMS = 4
MAX_DIM = 2**31 - 1
MAX_VALUES = 2**63 - 1
MAX_ALIGNMENT = 65_536

# The fewest bytes a key with its value and the description of a tensor take.
_MIN_KEY_VALUE_BYTES = 13
_MIN_TENSOR_INFO_BYTES = 24

# ggml.h's names by id, for messages: those that are no GGMLType, some removed, are not readable.
TYPE_NAMES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS "
    "IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 "
    "Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0"
)
_READABLE = {qtype.value: qtype for qtype in GGMLType}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it: `offset` counts from the start of the data, `place` is
    the byte of the file where the description begins."""

    name: str
    qtype: GGMLType
    shape: tuple[int, ...]  # NumPy order
    offset: int
    nbytes: int
    place: int

    @property
    def end(self) -> int:
        """Where its bytes end, counted as `offset` is."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Header:
    """All that the header says. `places` has the byte of the file where each key begins."""

    version: int
    metadata: Mapping[str, Value]
    places: Mapping[str, int]
    alignment: int
    tensors: tuple[TensorInfo, ...]
    data_start: int
    warnings: tuple[str, ...]


def parse_header(buffer: Buffer, path: Path) -> Header:
    """Reads the header of the file whose bytes are `buffer`; ModelFormatError if it is malformed.

    Whether the tensor data is there is `check_data`'s question. `path` is for messages only.
    """
    try:
        return _header(Cursor(buffer, path))
    except ModelFormatError as error:
        damage = text_conversion(buffer[: 64 << 10])
        if damage is None:
            raise
        reason = f"{error.reason}; {damage}"
        raise ModelFormatError(path, error.field, error.offset, reason) from None


def check_data(header: Header, path: Path, size: int) -> int:
    """Checks that a file of `size` bytes holds the data of every tensor and returns the number of
    bytes that follow it. The padding of the last tensor may be missing."""
    available = max(0, size - header.data_start)
    end = header.tensors[-1].end if header.tensors else 0
    if end > available:
        cut = header.tensors[bisect_right(header.tensors, available, key=lambda info: info.end)]
        full = header.data_start + end
        reason = f"the file is incomplete: {full} bytes needed, {size} there, {full - size} missing"
        raise ModelFormatError(path, f"tensor {cut.name}", header.data_start + cut.offset, reason)
    return max(0, available - _padded(end, header.alignment))


def _header(cursor: Cursor) -> Header:
    version, n_tensors, n_kv = _counts(cursor)
    metadata: dict[str, Value] = {}
    places: dict[str, int] = {}
    not_utf8: list[str] = []
    alignment = 32
    for index in range(n_kv):
        place = cursor.pos
        key = _key(cursor, f"key {index + 1} of {n_kv}")
        if key in metadata:
            raise cursor.error(key, place, "the key is there twice")
        places[key] = place
        kind = cursor.uint32(key)
        metadata[key] = read_value(cursor, key, kind, not_utf8)
        if key == "general.alignment":
            alignment = _alignment(cursor, place, kind, metadata[key])
    tensors: dict[str, TensorInfo] = {}
    offset = 0
    for index in range(n_tensors):
        info = _tensor_info(cursor, f"tensor {index + 1} of {n_tensors}", offset)
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name}", info.place, "the name is there twice")
        tensors[info.name] = info
        offset = _padded(info.end, alignment)
    data_start = _padded(cursor.pos, alignment)
    warnings = []
    if not_utf8:
        warnings.append(f"{len(not_utf8)} values are not valid UTF-8, the first is {not_utf8[0]}")
    if capitals := [key for key in metadata if key != key.lower()]:
        warnings.append(f"{len(capitals)} keys are not lower case, the first is {capitals[0]}")
    if any(cursor.buffer[cursor.pos : data_start]):
        warnings.append("the padding before the tensor data is not zero")
    return Header(
        version,
        MappingProxyType(metadata),
        MappingProxyType(places),
        alignment,
        tuple(tensors.values()),
        data_start,
        tuple(warnings),
    )


def _counts(cursor: Cursor) -> tuple[int, int, int]:
    """The fixed first part: version, number of tensors, number of keys."""
    start = cursor.buffer[:512]
    if foreign := foreign_format(start):
        raise cursor.error("magic", 0, f"not a GGUF file but {foreign}")
    if len(start) < HEADER_BYTES:
        reason = f"too short: {len(start)} bytes, the header of a GGUF file has {HEADER_BYTES}"
        raise cursor.error("header", 0, reason)
    if not start.startswith(b"GGUF"):
        raise cursor.error("magic", 0, f"not a GGUF file, it begins with {start[:4]!r}")
    cursor.pos = 4
    version = cursor.uint32("version")
    if version and version & 0xFFFF == 0:
        raise cursor.error("version", 4, "a byte-swapped (big-endian) GGUF file, not supported")
    if version not in (2, 3):
        raise cursor.error("version", 4, f"GGUF version {version} is not supported, 2 and 3 are")
    n_tensors, n_kv = cursor.uint64("n_tensors"), cursor.uint64("n_kv")
    for field, place, count, size, cap in (
        ("n_tensors", 8, n_tensors, _MIN_TENSOR_INFO_BYTES, MAX_TENSORS),
        ("n_kv", 16, n_kv, _MIN_KEY_VALUE_BYTES, MAX_KEYS),
    ):
        if count > (cursor.limit - cursor.pos) // size:
            raise cursor.error(field, place, f"{count} are announced, {cursor.left()}")
        if count > cap:
            raise cursor.error(field, place, f"{count}, at most {cap} are allowed")
    return version, n_tensors, n_kv


def _key(cursor: Cursor, field: str) -> str:
    place = cursor.pos
    raw = cursor.string(field, MAX_KEY_BYTES)
    key = raw.decode("ascii", "backslashreplace")
    if not raw:
        raise cursor.error(field, place, "the key is empty")
    if not raw.isascii() or not key.isprintable():
        raise cursor.error(field, place, f"the key {key} is not printable ASCII")
    return key


def _alignment(cursor: Cursor, place: int, kind: int, value: Value) -> int:
    if kind != UINT32:
        raise cursor.error("general.alignment", place, "not an unsigned 32-bit integer")
    assert isinstance(value, int)
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        reason = f"{value} is not a power of two from 1 to {MAX_ALIGNMENT}"
        raise cursor.error("general.alignment", place, reason)
    return value


def _tensor_info(cursor: Cursor, field: str, expected_offset: int) -> TensorInfo:
    place = cursor.pos
    name = _tensor_name(cursor, field)
    field = f"tensor {name}"
    n_dims = cursor.uint32(field)
    if n_dims > MAX_DIMS:
        raise cursor.error(field, cursor.pos - 4, f"{n_dims} dimensions, at most {MAX_DIMS}")
    dims = [cursor.uint64(field) for _ in range(n_dims)]
    # A zero counts as one: NumPy multiplies the other dimensions of an empty array all the same.
    if any(dim > MAX_DIM for dim in dims) or math.prod(dim or 1 for dim in dims) > MAX_VALUES:
        shape = " x ".join(map(str, dims))
        raise cursor.error(field, cursor.pos - 8 * n_dims, f"the shape {shape} is too large")
    type_id = cursor.uint32(field)
    if type_id not in _READABLE:
        names = TYPE_NAMES.split()
        known = f"{names[type_id]} ({type_id})" if type_id < len(names) else str(type_id)
        raise cursor.error(field, cursor.pos - 4, f"unsupported tensor type {known}")
    qtype = _READABLE[type_id]
    cols = dims[0] if dims else 1
    if cols % qtype.block_size:
        reason = f"rows of {cols} values, {qtype.name} has blocks of {qtype.block_size}"
        raise cursor.error(field, cursor.pos - 4, reason)
    offset = cursor.uint64(field)
    if offset != expected_offset:
        reason = f"data offset {offset} where {expected_offset} follows from the tensors before"
        raise cursor.error(field, cursor.pos - 8, reason)
    nbytes = math.prod(dims[1:]) * qtype.row_bytes(cols)
    return TensorInfo(name, qtype, tuple(reversed(dims)), offset, nbytes, place)


def _tensor_name(cursor: Cursor, field: str) -> str:
    place = cursor.pos
    raw = cursor.string(field, MAX_NAME_BYTES)
    name = raw.decode(errors="backslashreplace")
    if not raw:
        raise cursor.error(field, place, "the name is empty")
    if name.encode() != raw or not name.isprintable():
        raise cursor.error(field, place, f"the name {name} is not printable text")
    return name


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
