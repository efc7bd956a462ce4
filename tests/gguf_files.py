"""GGUF files made byte by byte, so that a test can put one fault into any field.

Written from the format's description alone (ggml's gguf.md); nothing of cpuinfer is used.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<B",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}

Scalar = int | float | str | bytes


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string; `length` is what the file says of it, if not the truth."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def value(kind: int, content: Scalar) -> bytes:
    """The bytes of a scalar or string value."""
    if isinstance(content, str | bytes):
        return string(content)
    return struct.pack(SCALARS[kind], content)


def array(kind: int, contents: Sequence[Scalar], count: int | None = None) -> bytes:
    """The bytes of an array value; `count` is what the file says, if not the truth."""
    head = u32(kind) + u64(len(contents) if count is None else count)
    return head + b"".join(value(kind, content) for content in contents)


def key(name: str | bytes, kind: int, content: Scalar) -> bytes:
    """A key with a scalar or string value."""
    return string(name) + u32(kind) + value(kind, content)


def array_key(
    name: str, kind: int, contents: Sequence[Scalar] = (), count: int | None = None
) -> bytes:
    """A key with an array value."""
    return string(name) + u32(ARRAY) + array(kind, contents, count)


def tensor(
    name: str | bytes,
    dims: Sequence[int],
    type_id: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    """The description of a tensor, `dims` in the file's order (contiguous first)."""
    count = u32(len(dims) if n_dims is None else n_dims)
    return string(name) + count + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file. Without `data` it ends with the header, unpadded."""
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_kv is None else n_kv,
    )
    header = magic + u32(version) + b"".join(map(u64, counts)) + b"".join(keys) + b"".join(tensors)
    if data is None:
        return header
    return header + bytes(-len(header) % alignment) + data


def split_model(directory: Path, counts: Sequence[int], stem: str = "m") -> list[Path]:
    """A split model of F32 vectors t0, t1, ... of 8 values i, `counts` of them in each part."""
    total, paths, first = sum(counts), [], 0
    for number, count in enumerate(counts):
        path = directory / f"{stem}-{number + 1:05}-of-{len(counts):05}.gguf"
        path.write_bytes(part(number, len(counts), total, range(first, first + count)))
        paths.append(path)
        first += count
    return paths


def part(number: int, count: int, total: int, names: Sequence[int]) -> bytes:
    """One part of a split model."""
    keys = [
        key("split.no", U16, number),
        key("split.count", U16, count),
        key("split.tensors.count", I32, total),
        key("test.part", U32, number),
    ]
    tensors = [tensor(f"t{name}", [8], offset=32 * index) for index, name in enumerate(names)]
    data = b"".join(struct.pack("<8f", *[name] * 8) for name in names)
    return gguf(keys, tensors, data)
