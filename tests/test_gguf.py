"""The header of a GGUF file and its values: what is refused, how that is said, what is read."""

import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files as files
import numpy as np
import pytest
from gguf_faults import Fault, faults
from gguf_files import BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64

from cpuinfer import gguf_header, gguf_values
from cpuinfer.gguf import GGUFFile, ModelFormatError, escape, open_gguf, parse
from quant.ggml_types import GGMLType

PATH = Path("model.gguf")
ALIGNMENT = "general.alignment"
DTYPES = {
    U8: np.uint8,
    I8: np.int8,
    U16: np.uint16,
    I16: np.int16,
    U32: np.uint32,
    I32: np.int32,
    U64: np.uint64,
    I64: np.int64,
    F32: np.float32,
    F64: np.float64,
    BOOL: np.bool_,
}


def load(*keys: bytes) -> GGUFFile:
    """A file with these keys and no tensors."""
    return parse(files.gguf(keys), PATH)


def refusal(read: Callable[[], object]) -> ModelFormatError:
    """The error `read` raises, which is one line."""
    with pytest.raises(ModelFormatError) as caught:
        read()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_500
    return caught.value


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.id) for fault in faults()])
def test_fault_is_refused(fault: Fault, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(fault.raw)
    tracemalloc.start()
    error = refusal(lambda: open_gguf(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (error.path, error.field, error.offset) == (path, fault.field, fault.offset)
    assert fault.reason in error.reason or fault.reason in str(error)
    assert str(error).startswith(f"{path}: {fault.field}: ")
    assert peak < 1 << 20  # whatever sizes the file claims


def test_G31_caps_on_keys_and_tensors() -> None:
    keys = [files.key(f"k{index}", U8, 1) for index in range(65_537)]
    infos = [files.tensor(f"t{index}", [0]) for index in range(65_537)]
    error = refusal(lambda: parse(files.gguf(keys), PATH))
    assert (error.field, error.offset, error.reason) == (
        "n_kv",
        16,
        "65537, at most 65536 are allowed",
    )
    error = refusal(lambda: parse(files.gguf(tensors=infos), PATH))
    assert (error.field, error.offset) == ("n_tensors", 8)
    assert error.reason == "65537, at most 65536 are allowed"
    assert len(parse(files.gguf(keys[1:]), PATH).metadata) == 65_536
    assert len(parse(files.gguf(tensors=infos[1:]), PATH).tensors) == 65_536


def sparse(path: Path, pieces: list[bytes], gap: int) -> Path:
    """A file of `pieces`, each followed by `gap` zeros that take no room on the disk."""
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            file.seek(gap, os.SEEK_CUR)
        file.truncate(file.tell())
    return path


LONG_STRING = files.u64((64 << 20) + 1)
MANY = (16 << 20) + 1


@pytest.mark.parametrize(
    ("entry", "gap", "reason"),
    [
        (files.string("k") + files.u32(STRING) + LONG_STRING, 65 << 20, "at most 67108864"),
        (files.array_key("k", STRING, (), 1) + LONG_STRING, 65 << 20, "at most 67108864"),
        (files.array_key("k", U8, (), MANY), 17 << 20, "16777217 elements, at most 16777216"),
        (files.array_key("k", STRING, (), MANY), 129 << 20, "16777217 elements, at most 16777216"),
    ],
    ids=["string", "string-in-array", "array", "array-of-strings"],
)
def test_caps_on_values(entry: bytes, gap: int, reason: str, tmp_path: Path) -> None:
    path = sparse(tmp_path / "model.gguf", [files.gguf([entry])], gap)
    tracemalloc.start()
    error = refusal(lambda: open_gguf(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.field == "k"
    assert reason in error.reason
    assert peak < 1 << 20


def test_cap_on_metadata(tmp_path: Path) -> None:
    largest = 16 << 20
    # Names of 8 bytes make the elements start at multiples of 8: they are not copied.
    keys = [files.array_key(f"array--{index}", U64, (), largest) for index in range(4)]
    pieces = [files.gguf([keys[0]], n_kv=4), *keys[1:]]
    path = sparse(tmp_path / "model.gguf", pieces, 8 * largest)
    error = refusal(lambda: open_gguf(path))
    assert error.field == "array--3"
    assert "bytes left of the 536870912 allowed for metadata" in error.reason


def test_names_of_types_are_those_of_gguf_py() -> None:
    names = gguf_header.TYPE_NAMES.split()
    for qtype in gguf.GGMLQuantizationType:
        assert names[qtype.value] == qtype.name


def test_G25_cut_at_every_byte() -> None:
    keys = [files.key("general.name", STRING, "n" * 400), files.array_key("list", STRING, "abcdef")]
    infos = [
        files.tensor("a", [64, 2]),
        files.tensor("b", [256, 3], GGMLType.Q4_K, 512),
        files.tensor("c", [3], GGMLType.F32, 512 + 448),
    ]
    data = np.random.default_rng(1).bytes(512 + 448 + 12)
    raw = files.gguf(keys, infos, data)
    assert 1_500 < len(raw) < 2_048
    assert parse(raw, PATH).tensors["c"].data.tobytes() == data[-12:]
    for size in range(len(raw)):
        error = refusal(lambda size=size: parse(raw[:size], PATH))
        if size >= len(raw) - len(data):
            missing = len(raw) - size
            assert f"{len(raw)} bytes needed, {size} there, {missing} missing" in error.reason


# What is said


def test_error_is_one_printable_line_of_bounded_length() -> None:
    error = ModelFormatError(Path("dir\n/m\udc80\x1b.gguf"), "key\r\n", None, "x\u2028" * 1_000)
    assert str(error).isprintable()
    assert str(error).startswith(r"dir\n/m\udc80\x1b.gguf: key\r\n: x\u2028x")
    assert len(str(error)) < 500
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.field, copy.offset, copy.reason) == error.args
    assert str(ModelFormatError(PATH, "f", 7, "r" * 400)).endswith("r (byte 7)")
    assert str(ModelFormatError(PATH, "f", 7, "r" * 401)).endswith("r... (byte 7)")
    assert str(ModelFormatError(PATH, "f", 7, "r")) == "model.gguf: f: r (byte 7)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, größer 漢字", "plain text, größer 漢字"),
        ("a\tb\n\x1b[0m\x7f\x9b", r"a\tb\n\x1b[0m\x7f\x9b"),
        ("\u202eabc\ud800", r"\u202eabc\ud800"),
        (b"ok \xff\xe2\x82", r"ok \xff\xe2\x82"),
        ("ä".encode(), "ä"),
    ],
)
def test_escape(text: str | bytes, shown: str) -> None:
    assert escape(text) == shown
    assert escape(shown) == shown


def text_like() -> bytes:
    """A file with line feeds (lengths of 10) and bytes that are no UTF-8."""
    keys = [files.key(f"ten-chars{index}", F32, -1.5) for index in range(3)]
    return files.gguf([*keys, files.key("a", STRING, "\ufffd\r\n"), files.key("b", F32, 0.1)])


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        (text_like().replace(b"\n", b"\r\n"), "copied as text (each line feed has a carriage"),
        (text_like().decode(errors="replace").encode(), "converted to UTF-8 text"),
    ],
    ids=["CRLF", "UTF-8"],
)
def test_text_conversion_is_named(raw: bytes, hint: str) -> None:
    assert len(parse(text_like(), PATH).metadata) == 5
    assert hint in refusal(lambda: parse(raw, PATH)).reason
    assert "text" not in refusal(lambda: parse(text_like()[:-1], PATH)).reason


# What is read


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("data", [None, b""], ids=["unpadded", "padded"])
def test_HEADER_EMPTY(version: int, data: bytes | None) -> None:
    empty = parse(files.gguf(version=version, data=data), PATH)
    assert (empty.version, dict(empty.metadata), dict(empty.tensors)) == (version, {}, {})
    assert empty.nbytes == (24 if data is None else 32)
    assert empty.warnings == ()


def random_value(rng: np.random.Generator, kind: int) -> Any:
    if kind == STRING:
        return "".join(map(chr, rng.integers(32, 0x2FFF, rng.integers(0, 9))))
    dtype = np.dtype(DTYPES[kind])
    if kind == BOOL:
        return bool(rng.integers(2))
    if kind in (F32, F64):
        return dtype.type(rng.normal()).item()
    limits = np.iinfo(dtype)
    return int(rng.integers(limits.min, limits.max, dtype=dtype, endpoint=True))


def test_KV_SUCCESS() -> None:
    rng = np.random.default_rng(2)
    kinds = [kind for kind in (*DTYPES, STRING) for _ in range(5)]
    scalars = {f"scalar.{i}": (kind, random_value(rng, kind)) for i, kind in enumerate(kinds)}
    arrays = {
        f"array.{i}": (kind, [random_value(rng, kind) for _ in range(i % 5 * 7)])
        for i, kind in enumerate(kinds)
    }
    read = load(
        *(files.key(name, *content) for name, content in scalars.items()),
        *(files.array_key(name, *content) for name, content in arrays.items()),
    )
    assert list(read.metadata) == [*scalars, *arrays]
    for name, (_, content) in scalars.items():
        assert type(read.metadata[name]) is type(content)
        assert read.metadata[name] == content
    for name, (kind, contents) in arrays.items():
        found = read.metadata[name]
        if kind == STRING:
            assert found == [text.encode() for text in contents]
            continue
        assert isinstance(found, np.ndarray)
        assert found.dtype == DTYPES[kind]
        assert found.tolist() == contents
        assert found.flags.aligned
        assert not found.flags.writeable
    assert read.warnings == ()


def test_longest_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_values, "MAX_STRING_BYTES", 5)
    read = load(files.key("a", STRING, "12345"), files.array_key("b", STRING, ["12345", ""]))
    assert (read.text("a"), read.array("b", str)) == ("12345", [b"12345", b""])
    assert "of 6 bytes" in refusal(lambda: load(files.key("a", STRING, "123456"))).reason
    assert "of 6 bytes" in refusal(lambda: load(files.array_key("a", STRING, ["123456"]))).reason


def test_header_that_resembles_safetensors() -> None:
    infos = [files.tensor(f"t{index}", [0]) for index in range(ord("{"))]
    raw = files.gguf(tensors=infos)
    assert raw[8:9] == b"{"
    assert len(parse(raw, PATH).tensors) == 123


def test_longest_key_and_tensor_name() -> None:
    assert load(files.key("k" * 65_535, U8, 1)).uint("k" * 65_535) == 1
    raw = files.gguf(tensors=[files.tensor("ä" + "n" * 61, [8])], data=bytes(32))
    assert list(parse(raw, PATH).tensors) == ["ä" + "n" * 61]


def test_G14_text_that_is_not_utf8() -> None:
    name, tokens = b"Mod\xe8le", [b"\xff\xfe", b"", b"\xed\xa0\x80"]
    read = load(files.key("general.name", STRING, name), files.array_key("tokens", STRING, tokens))
    assert read.text("general.name") == "Mod\ufffdle"
    assert read.array("tokens", str) == tokens
    assert read.warnings == ("model.gguf: 1 values are not valid UTF-8, the first is general.name",)


def test_other_warnings() -> None:
    assert load(files.key("Author", U8, 1)).warnings == (
        "model.gguf: 1 keys are not lower case, the first is Author",
    )
    assert parse(files.gguf() + bytes(7) + b"\1", PATH).warnings == (
        "model.gguf: the padding before the tensor data is not zero",
    )


@pytest.mark.parametrize("trailing", [1, 32, 10_000])
@pytest.mark.parametrize("tensors", [[], [files.tensor("a", [3])]])
def test_G27_trailing_bytes(tensors: list[bytes], trailing: int) -> None:
    raw = files.gguf(tensors=tensors, data=bytes(32 * len(tensors)) + b"x" * trailing)
    assert parse(raw, Path("d/\x1b.gguf")).warnings == (
        rf"\x1b.gguf: {trailing} bytes after the last tensor are ignored",
    )


@pytest.mark.parametrize("missing", [1, 19, 20])
def test_G26_final_padding_may_be_missing(missing: int) -> None:
    raw = files.gguf(tensors=[files.tensor("a", [3])], data=bytes(range(32)))
    read = parse(raw[: len(raw) - missing], PATH)
    assert read.tensors["a"].data.tobytes() == bytes(range(12))
    assert read.warnings == ()


def test_G16_no_dimensions() -> None:
    raw = files.gguf(tensors=[files.tensor("a", [])], data=struct.pack("<f", 2.5))
    read = parse(raw, PATH).tensors["a"]
    assert read.shape == ()
    assert read.data.view(np.float32).tolist() == [[2.5]]


@pytest.mark.parametrize(
    ("dims", "rows", "row_bytes"),
    [
        ([0], 1, 0),
        ([4, 0], 0, 16),
        ([0, 4], 4, 0),
        ([0, 2**31 - 1, 2**31 - 1], (2**31 - 1) ** 2, 0),
        ([2**31 - 1, 0, 2**31 - 1], 0, 2**33 - 4),
    ],
)
def test_G18_TENSORS_ZERO_DIM(dims: list[int], rows: int, row_bytes: int) -> None:
    raw = files.gguf(tensors=[files.tensor("a", dims), files.tensor("b", [1])], data=b"data")
    read = parse(raw, PATH)
    assert read.tensors["a"].shape == tuple(reversed(dims))
    assert read.tensors["a"].data.shape == (rows, row_bytes)
    assert read.tensors["b"].data.tobytes() == b"data"
    alone = files.gguf(tensors=[files.tensor("a", dims)])
    assert parse(alone, PATH).tensors["a"].data.size == 0


@pytest.mark.parametrize("alignment", [1, 2, 8, 32, 65_536])
@pytest.mark.parametrize("name", ["a", "ab", "abc", "abcd"])
def test_G28_TENSORS_SUCCESS_and_CUSTOM_ALIGN(alignment: int, name: str) -> None:
    infos, data, placed = [], b"", []
    for dims, qtype, rows, row_bytes in (
        ([3, 5], GGMLType.F16, 5, 6),
        ([3], GGMLType.F32, 1, 12),
        ([32, 2, 3], GGMLType.Q5_0, 6, 22),
        ([7], GGMLType.F32, 1, 28),
    ):
        data += bytes(-len(data) % alignment)
        infos.append(files.tensor(f"t{len(infos)}", dims, qtype, len(data)))
        placed.append((len(data), tuple(reversed(dims)), qtype, (rows, row_bytes)))
        data += bytes((len(data) + i) % 256 for i in range(rows * row_bytes))
    # With alignment 1 the length of a key's name decides where the data starts.
    keys = [files.key(ALIGNMENT, U32, alignment), files.key(name, U8, 0)]
    raw = files.gguf(keys, infos, data, alignment=alignment)
    whole = np.frombuffer(raw, np.uint8)
    tensors = parse(raw, PATH).tensors.values()
    for tensor, (offset, shape, qtype, data_shape) in zip(tensors, placed, strict=True):
        assert (tensor.shape, tensor.qtype, tensor.data.shape) == (shape, qtype, data_shape)
        size = tensor.data.size
        assert tensor.data.tobytes() == bytes((offset + i) % 256 for i in range(size))
        assert not tensor.data.flags.writeable
        assert tensor.data.flags.c_contiguous
        item = 4 if qtype is GGMLType.F32 else 2
        assert tensor.data.ctypes.data % item == 0
        unaligned = (len(raw) - len(data) + offset) % item != 0
        assert np.shares_memory(tensor.data, whole) == (not unaligned)
