"""Malformed and foreign files, each with one fault, and what has to be said of it.

Ids: G numbers are rows of the project's fault matrix, names in capitals are the cases of
llama.cpp's tests/test-gguf.cpp.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from gguf_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array_key,
    gguf,
    key,
    string,
    tensor,
    u32,
    u64,
)

BIG = 2**64 - 1
HUGE_COUNTS = (BIG, 2**63, 0x7FFFFFFF)
MAX_DIM = 2**31 - 1
Q4_0, Q4_K, TYPE_I8, TYPE_I64 = 2, 12, 24, 27
ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class Fault:
    """A file to be refused for `field`, at byte `offset`, with `reason` in the message."""

    id: str
    raw: bytes
    field: str
    offset: int
    reason: str


def faults() -> Iterator[Fault]:
    """Every one of them."""
    for group in (foreign, headers, key_names, value_types, strings, arrays, alignments):
        yield from group()
    for group in (tensor_names, tensor_shapes, tensor_types, tensor_offsets):
        yield from group()


def foreign() -> Iterator[Fault]:
    for raw in (b"", b"GGU", b"GGUF", gguf()[:23]):
        yield Fault(f"G01-{len(raw)}-bytes", raw, "header", 0, f"too short: {len(raw)} bytes")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.pkl", "x" * 40)
    table = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for name, raw, reason in (
        ("HEADER_BAD_MAGIC", gguf(magic=b"FUGG"), "not a GGUF file, it begins with b'FUGG'"),
        ("zip", archive.getvalue(), "not a GGUF file but a ZIP archive"),
        ("pickle-2", pickle.dumps([0] * 40, 2), "not a GGUF file but a Python pickle"),
        ("pickle-3", pickle.dumps([0] * 40, 3), "not a GGUF file but a Python pickle"),
        ("pickle-4", pickle.dumps([0] * 40, 4), "not a GGUF file but a Python pickle"),
        ("pickle-5", pickle.dumps([0] * 40, 5), "not a GGUF file but a Python pickle"),
        ("safetensors", u64(len(table)) + table + bytes(4), "but a safetensors file"),
        ("GGML", b"lmgg" + bytes(40), "not a GGUF file but a GGML model"),
        ("GGMF", b"fmgg" + bytes(40), "not a GGUF file but a GGMF model"),
        ("GGJT", b"tjgg" + bytes(40), "not a GGUF file but a GGJT model"),
        ("GGLA", b"algg" + bytes(40), "not a GGUF file but a GGLA adapter"),
        ("GGML-in-letters", b"GGML" + bytes(40), "not a GGUF file but a GGML model"),
        ("GGJT-in-letters", b"GGJT" + bytes(40), "not a GGUF file but a GGJT model"),
        ("gzip", b"\x1f\x8b\x08" + bytes(40), "not a GGUF file but a gzip archive"),
        ("html", b"\n <!DOCTYPE HTML><html>Not found</html>", "not a GGUF file but a web page"),
        ("json", b'{"error": "Unauthorized"}', "not a GGUF file but JSON text"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
    ):
        yield Fault(f"G02-{name}", raw, "magic", 0, reason)


def headers() -> Iterator[Fault]:
    for case, version in (("_0", 0), ("_1", 1), ("_FUTURE", 4)):
        reason = f"GGUF version {version} is not supported"
        yield Fault(f"G03-HEADER_BAD_VERSION{case}", gguf(version=version), "version", 4, reason)
    swapped = gguf(version=0x03000000)
    yield Fault("G03-big-endian", swapped, "version", 4, "byte-swapped (big-endian)")
    for count in HUGE_COUNTS:
        reason = f"{count} are announced, 64 bytes left"
        raw = gguf(n_tensors=count) + bytes(64)
        yield Fault(f"G04-HEADER_BAD_N_TENSORS-{count:x}", raw, "n_tensors", 8, reason)
        raw = gguf(n_kv=count) + bytes(64)
        yield Fault(f"G05-HEADER_BAD_N_KV-{count:x}", raw, "n_kv", 16, reason)
    raw = gguf(n_tensors=3) + bytes(71)
    yield Fault("G04-one-byte-too-few", raw, "n_tensors", 8, "3 are announced, 71 bytes left")
    raw = gguf(n_kv=3) + bytes(38)
    yield Fault("G05-one-byte-too-few", raw, "n_kv", 16, "3 are announced, 38 bytes left")
    raw = gguf(n_tensors=3) + bytes(72)
    yield Fault("G04-exactly-enough", raw, "tensor 1 of 3", 24, "the name is empty")
    raw = gguf(n_kv=3) + bytes(39)
    yield Fault("G05-exactly-enough", raw, "key 1 of 3", 24, "the key is empty")


def key_names() -> Iterator[Fault]:
    for length in (BIG, 0x80000000, 21):
        raw = gguf([string("k" * 20, length)])
        reason = f"{length} bytes needed, 20 bytes left"
        yield Fault(f"G06-KV_BAD_KEY_SIZE-{length:x}", raw, "key 1 of 1", 32, reason)
    for name, text, reason in (
        ("KV_EMPTY_KEY", b"", "the key is empty"),
        ("not-ascii", "schlüssel".encode(), "is not printable ASCII"),
        ("not-utf8", b"k\xff", r"the key k\xff is not printable ASCII"),
        ("newline", b"k\n", r"the key k\n is not printable ASCII"),
        ("65536-bytes", b"k" * 65_536, "a string of 65536 bytes, at most 65535"),
    ):
        raw = gguf([key(text, U8, 1)])
        yield Fault(f"G07-{name}", raw, "key 1 of 1", 24, reason)
    raw = gguf([key("k", U8, 1), key("k", U8, 1)])
    yield Fault("G13-KV_DUPLICATE_KEY", raw, "k", 38, "the key is there twice")
    raw = gguf([key(ALIGNMENT, U32, 32)] * 2)
    yield Fault("G13-alignment-twice", raw, ALIGNMENT, 57, "the key is there twice")


def value_types() -> Iterator[Fault]:
    for kind in (13, 255, 2**32 - 1):
        raw = gguf([string("k") + u32(kind) + bytes(16)])
        yield Fault(f"G08-KV_BAD_TYPE-{kind}", raw, "k", 33, f"unknown value type {kind}")
    raw = gguf([key("k", BOOL, 2)])
    yield Fault("G14-bool-2", raw, "k", 37, "a boolean is 0 or 1, not 2")
    raw = gguf([array_key("k", BOOL, [0, 1, 255])])
    yield Fault("G14-bool-array", raw, "k", 37, "a boolean in the array is neither 0 nor 1")
    raw = gguf([key("k", U64, 1)])[:-1]
    yield Fault("scalar-cut", raw, "k", 37, "8 bytes needed, 7 bytes left")


def strings() -> Iterator[Fault]:
    for length in (BIG, 2**63, 4):
        raw = gguf([string("k") + u32(STRING) + string("abc", length)])
        reason = f"{length} bytes needed, 3 bytes left"
        yield Fault(f"G09-KV_BAD_VALUE_SIZE-{length:x}", raw, "k", 45, reason)
        raw = gguf([array_key("k", STRING, ["abc"], 2) + string("abc", length)])
        yield Fault(f"G09-string-in-array-{length:x}", raw, "k", 68, reason)
    raw = gguf([array_key("k", STRING, ["ten letter"], 2)]) + bytes(7)
    yield Fault("G09-length-in-array-cut", raw, "k", 67, "8 bytes needed, 7 bytes left")


def arrays() -> Iterator[Fault]:
    for kind, size in ((U8, 1), (U16, 2), (F32, 4), (U64, 8), (STRING, 8)):
        for count in (2**63, 2**40, 3):
            raw = gguf([array_key("k", kind, (), count)]) + bytes(3 * size - 1)
            reason = f"an array of {count} elements, {3 * size - 1} bytes left"
            yield Fault(f"G10-type-{kind}-{count:x}", raw, "k", 37, reason)
    for depth in (1, 5_000):
        raw = gguf([string("k") + u32(ARRAY) + (u32(ARRAY) + u64(1)) * depth + u32(U8) + u64(0)])
        yield Fault(f"G11-depth-{depth}", raw, "k", 37, "arrays of arrays are not supported")
    for kind in (13, 2**32 - 1):
        raw = gguf([array_key("k", kind, (), 2**60)])
        yield Fault(f"G12-{kind}", raw, "k", 37, f"unknown type {kind} of array elements")


def alignments() -> Iterator[Fault]:
    for case, number in (("", 0), ("-KV_BAD_ALIGN", 13), ("", 2**17), ("", 2**31)):
        raw = gguf([key(ALIGNMENT, U32, number)])
        reason = f"{number} is not a power of two from 1 to 65536"
        yield Fault(f"G15{case}-{number}", raw, ALIGNMENT, 24, reason)
    tensors = [tensor("a", [4]), tensor("b", [4], offset=26)]
    for case, data in (("TENSORS", None), ("DATA", bytes(52))):
        raw = gguf([key(ALIGNMENT, U32, 13)], tensors, data, alignment=13)
        yield Fault(f"{case}_BAD_ALIGN", raw, ALIGNMENT, 24, "13 is not a power of two")
    for name, entry in (
        ("KV_WRONG_TYPE_ALIGN", key(ALIGNMENT, I32, 32)),
        ("u64", key(ALIGNMENT, U64, 32)),
        ("bool", key(ALIGNMENT, BOOL, 1)),
        ("string", key(ALIGNMENT, STRING, "32")),
        ("array", array_key(ALIGNMENT, U32, [32])),
    ):
        yield Fault(f"G15-{name}", gguf([entry]), ALIGNMENT, 24, "not an unsigned 32-bit integer")


def tensor_names() -> Iterator[Fault]:
    for name, text, reason in (
        ("empty", b"", "the name is empty"),
        ("TENSORS_BAD_NAME_SIZE", b"n" * 64, "a string of 64 bytes, at most 63"),
        ("nul", b"a\0b", r"the name a\x00b is not printable"),
        ("newline", b"a\nb", r"the name a\nb is not printable"),
        ("escape", b"\x1b[31m", r"the name \x1b[31m is not printable"),
        ("bidi", "a\u202eb".encode(), r"the name a\u202eb is not printable"),
        ("not-utf8", b"a\xffb", r"the name a\xffb is not printable"),
    ):
        raw = gguf(tensors=[tensor(text, [8])], data=bytes(32))
        yield Fault(f"G21-{name}", raw, "tensor 1 of 1", 24, reason)
    raw = gguf(tensors=[string("n" * 30, 31)])
    yield Fault("G21-length", raw, "tensor 1 of 1", 32, "31 bytes needed, 30 bytes left")
    raw = gguf(tensors=[tensor("a", [8]), tensor("a", [8], offset=32)], data=bytes(64))
    yield Fault("G22-TENSORS_DUPLICATE_NAME", raw, "tensor a", 57, "the name is there twice")


def tensor_shapes() -> Iterator[Fault]:
    for case, n_dims in (("-TENSORS_BAD_N_DIMS", 5), ("", 2**32 - 1)):
        raw = gguf(tensors=[tensor("a", [1] * 5, n_dims=n_dims)], data=bytes(32))
        yield Fault(f"G16{case}-{n_dims}", raw, "tensor a", 33, f"{n_dims} dimensions, at most 4")
    raw = gguf(tensors=[tensor("name", [1], n_dims=4)])
    yield Fault("G16-dims-cut", raw, "tensor name", 56, "8 bytes needed, 4 bytes left")
    for case, dims in (
        ("2^32 twice", [2**32, 2**32]),
        ("2^33 x 2^31", [2**33, 2**31]),
        ("2^63 x 2", [2**63, 2]),
        ("TENSORS_BAD_SHAPE", [BIG]),
        ("2^42+1", [1, 2**42 + 1]),
        ("TENSORS_NE_TOO_BIG", [4 * MAX_DIM, 4 * MAX_DIM]),
        ("one dimension", [1, 1, 1, MAX_DIM + 1]),
        ("product", [MAX_DIM, MAX_DIM, MAX_DIM]),
        ("2^63 values", [2**21, 2**21, 2**21]),
        ("product beside zero", [0, MAX_DIM, MAX_DIM, MAX_DIM]),
    ):
        raw = gguf(tensors=[tensor("a", dims)], data=bytes(32))
        reason = f"the shape {' x '.join(map(str, dims))} is too large"
        yield Fault(f"G17-{case}", raw, "tensor a", 37, reason)
    # The values are 2^63 - 1, as many as allowed; their bytes wrap where sizes have 64 bits.
    raw = gguf(tensors=[tensor("a", [218_934_409, 859_764_727, 49])], data=bytes(32))
    needed = 96 + 4 * (2**63 - 1)
    reason = f"{needed} bytes needed, 128 there, {needed - 128} missing"
    yield Fault("G17-TENSORS_NBYTES_TOO_BIG", raw, "tensor a", 96, reason)
    for name, type_id, cols, block in (("Q4_K", Q4_K, 255, 256), ("Q4_0", Q4_0, 33, 32)):
        raw = gguf(tensors=[tensor("a", [cols, 1], type_id)], data=bytes(256))
        reason = f"rows of {cols} values, {name} has blocks of {block}"
        yield Fault(f"G19-{name}", raw, "tensor a", 53, reason)
    raw = gguf(tensors=[tensor("a", [], Q4_0)], data=bytes(32))
    yield Fault("G19-scalar", raw, "tensor a", 37, "rows of 1 values, Q4_0 has blocks of 32")


def tensor_types() -> Iterator[Fault]:
    for case, type_id, shown in (
        ("", 4, "Q4_2 (4)"),
        ("", 5, "Q4_3 (5)"),
        ("", 9, "Q8_1 (9)"),
        ("", 23, "IQ4_XS (23)"),
        ("", 28, "F64 (28)"),
        *(("", type_id, f"({type_id})") for type_id in (31, 32, 33, 36, 37, 38)),
        ("", 39, "MXFP4 (39)"),
        ("-TENSORS_BAD_TYPE", 42, "42"),
        ("", 1000, "1000"),
        ("", 2**32 - 1, "4294967295"),
    ):
        raw = gguf(tensors=[tensor("a", [256], type_id)], data=bytes(2048))
        yield Fault(f"G20{case}-{type_id}", raw, "tensor a", 45, "unsupported tensor type")
        yield Fault(f"G20-shown-{type_id}", raw, "tensor a", 45, shown)
    raw = gguf(tensors=[tensor("a", [2**40, 2**20 - 1], TYPE_I64)], data=bytes(32))
    yield Fault("TENSORS_NBYTES_TOO_BIG", raw, "tensor a", 37, "is too large")
    dim = 0x7FFFFFFFFFFFFFC0
    infos = [tensor("a", [dim], TYPE_I8), tensor("b", [dim], TYPE_I8, dim)]
    raw = gguf(tensors=infos, data=bytes(32))
    yield Fault("G24-DATA_MEM_SIZE_OVERFLOW", raw, "tensor a", 37, "is too large")


def tensor_offsets() -> Iterator[Fault]:
    for name, first, second in (
        ("TENSORS_BAD_OFFSET", 0, BIG),
        ("hole", 0, 64),
        ("overlap", 0, 0),
        ("unaligned", 0, 16),
        ("negative", 0, 2**64 - 32),
    ):
        infos = [tensor("a", [4], offset=first), tensor("b", [4], offset=second)]
        raw = gguf(tensors=infos, data=bytes(256))
        reason = f"data offset {second} where 32 follows"
        yield Fault(f"G23-{name}", raw, "tensor b", 82, reason)
    infos = [tensor("a", [4], offset=32), tensor("b", [4])]
    raw = gguf(tensors=infos, data=bytes(64))
    yield Fault("G23-descending", raw, "tensor a", 49, "data offset 32 where 0 follows")
    for case, data in (("TENSORS", None), ("DATA", bytes(64))):
        infos = [tensor("a", [1]), tensor("b", [1], offset=4)]
        raw = gguf(tensors=infos, data=data)
        yield Fault(f"{case}_INCONSISTENT_ALIGN", raw, "tensor b", 82, "offset 4 where 32 follows")
    # Two tensors, their bytes together more than 2^64.
    half = 4 * MAX_DIM * (MAX_DIM // 2 + 1)
    infos = [tensor("a", [MAX_DIM, 2**30]), tensor("b", [MAX_DIM, 2**30 + 2], offset=half)]
    raw = gguf(tensors=infos, data=bytes(32))
    needed = 128 + 8 * MAX_DIM * (2**30 + 1)
    reason = f"{needed} bytes needed, 160 there, {needed - 160} missing"
    yield Fault("G24-sum-of-sizes", raw, "tensor a", 128, reason)
    whole = gguf(tensors=[tensor("a", [8]), tensor("b", [8], offset=32)], data=bytes(64))
    for name, missing, field, offset in (
        ("DATA_NOT_ENOUGH_DATA", 1, "tensor b", 128),
        ("half", 33, "tensor a", 96),
        ("all", 64, "tensor a", 96),
    ):
        reason = f"160 bytes needed, {160 - missing} there, {missing} missing"
        yield Fault(f"G25-{name}", whole[: len(whole) - missing], field, offset, reason)
