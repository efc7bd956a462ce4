"""quant.gguf_writer: what it writes, as gguf-py reads it; and that a failure leaves no trace."""

import errno
import os
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quant import quantize
from quant.ggml_types import GGMLType
from quant.gguf_writer import Tensor, write_gguf

Kind = gguf.GGUFValueType
LEGACY = [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("value", "types", "want"),
    [
        (7, [Kind.UINT32], 7),
        (2**32 - 1, [Kind.UINT32], 2**32 - 1),
        (0.1, [Kind.FLOAT32], float(np.float32(0.1))),
        (True, [Kind.BOOL], True),
        ("grün\n", [Kind.STRING], "grün\n"),
        ("", [Kind.STRING], ""),
        (b"bytes", [Kind.STRING], "bytes"),
        (np.uint8(250), [Kind.UINT8], 250),
        (np.int8(-3), [Kind.INT8], -3),
        (np.uint16(65535), [Kind.UINT16], 65535),
        (np.int16(-300), [Kind.INT16], -300),
        (np.uint32(5), [Kind.UINT32], 5),
        (np.int32(-5), [Kind.INT32], -5),
        (np.uint64(2**60), [Kind.UINT64], 2**60),
        (np.int64(-(2**60)), [Kind.INT64], -(2**60)),
        (np.float32(1.5), [Kind.FLOAT32], 1.5),
        (np.float64(0.1), [Kind.FLOAT64], 0.1),
        (np.bool_(False), [Kind.BOOL], False),
        (["a", "", "▁b"], [Kind.ARRAY, Kind.STRING], ["a", "", "▁b"]),
        ([b"a", "b"], [Kind.ARRAY, Kind.STRING], ["a", "b"]),
        ([1, 2, 3], [Kind.ARRAY, Kind.UINT32], [1, 2, 3]),
        ((1.0, 2.5), [Kind.ARRAY, Kind.FLOAT32], [1.0, 2.5]),
        ([True, False], [Kind.ARRAY, Kind.BOOL], [True, False]),
        (np.array([1, -2], np.int32), [Kind.ARRAY, Kind.INT32], [1, -2]),
        (np.array([1, 2], ">u2"), [Kind.ARRAY, Kind.UINT16], [1, 2]),
        (np.array([0.1, 3], np.float64)[::-1], [Kind.ARRAY, Kind.FLOAT64], [3, 0.1]),
    ],
)
def test_metadata(tmp_path: Path, value: Any, types: list[Kind], want: Any) -> None:
    write_gguf(tmp_path / "m.gguf", {"first": "x", "key": value, "last": 9}, [])
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    field = reader.fields["key"]
    assert field.types[:2] == types
    assert field.contents() == want
    assert reader.fields["first"].contents() == "x"
    assert reader.fields["last"].contents() == 9


@pytest.mark.parametrize(
    "value",
    [-1, 2**32, None, [], [1, "a"], [True, 1], [[1]], np.zeros((2, 2)), np.complex64(1), {}],
    ids=repr,
)
def test_metadata_that_gguf_cannot_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="^metadata the.key: "):
        write_gguf(tmp_path / "m.gguf", {"the.key": value}, [])
    assert list(tmp_path.iterdir()) == []


def test_tensors(tmp_path: Path) -> None:
    """Types, shapes, order and bytes; packed rows and values alike."""
    path = tmp_path / "m.gguf"
    x = values(5, 96)
    tensors: list[Any] = [(f"w.{t.name}", t, x) for t in LEGACY]
    tensors += [
        ("norm", GGMLType.F32, values(7)),
        ("half", GGMLType.F16, values(3, 5)),
        ("brain", GGMLType.BF16, values(2, 3, 4)),
        ("packed", GGMLType.Q8_0, quantize(x, GGMLType.Q8_0)),
        ("k", GGMLType.Q6_K, np.arange(420, dtype=np.uint8).reshape(2, 210)),
        Tensor("late", GGMLType.F32, (2, 3), lambda: values(2, 3).astype(np.float64)),
    ]
    write_gguf(path, {"general.architecture": "llama"}, tensors)

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = ["w." + t.name for t in LEGACY] + ["norm", "half", "brain", "packed", "k", "late"]
    assert list(read) == names
    assert all(tensor.data_offset % 32 == 0 for tensor in read.values())
    for qtype in LEGACY:
        tensor = read[f"w.{qtype.name}"]
        assert tensor.tensor_type == qtype
        assert tensor.shape.tolist() == [96, 5]
        np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(x, tensor.tensor_type))
    np.testing.assert_array_equal(read["packed"].data, read["w.Q8_0"].data)
    np.testing.assert_array_equal(read["norm"].data, values(7))
    np.testing.assert_array_equal(read["half"].data, values(3, 5).astype(np.float16))
    assert read["brain"].shape.tolist() == [4, 3, 2]
    np.testing.assert_array_equal(
        read["brain"].data.view(np.uint16).ravel(),
        gguf.quants.quantize(values(2, 3, 4), gguf.GGMLQuantizationType.BF16).view("u2").ravel(),
    )
    assert read["k"].shape.tolist() == [256, 2]
    np.testing.assert_array_equal(read["k"].data.ravel(), np.arange(420, dtype=np.uint8))
    np.testing.assert_array_equal(read["late"].data, values(2, 3))


def test_alignment_of_the_metadata_holds(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = [(name, GGMLType.F32, values(3)) for name in "abc"]
    write_gguf(path, {"general.alignment": 128}, tensors)
    reader = gguf.GGUFReader(path)
    assert reader.alignment == 128
    assert [t.data_offset % 128 for t in reader.tensors] == [0, 0, 0]
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, values(3))
    assert path.stat().st_size % 128 == 0


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def data() -> np.ndarray:
        assert all(ref() is None for ref in alive), "the tensor before is still held"
        packed = np.zeros(4000, np.uint8)
        alive.append(weakref.ref(packed))
        return packed

    tensors = [Tensor(name, GGMLType.F32, (1000,), data) for name in "abc"]
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([("a", GGMLType.F32, values(2)), ("a", GGMLType.F32, values(2))], "two tensors"),
        ([("x" * 64, GGMLType.F32, values(2))], "more than 63 bytes"),
        ([("a", GGMLType.F32, np.float32(2))], "1 to 4 sizes"),
        ([("a", GGMLType.F32, values(1, 1, 1, 1, 1))], "1 to 4 sizes"),
        ([("a", GGMLType.F32, values(3, 0))], "1 to 4 sizes"),
        ([("a", GGMLType.Q4_0, values(2, 33))], "a: Q4_0 rows are multiples of 32"),
        ([("a", GGMLType.Q4_K, values(2, 288))], "a: Q4_K rows are multiples of 256"),
        ([("a", GGMLType.F32, np.zeros(4, np.int32))], "got int32"),
        ([("a", GGMLType.Q4_0, np.zeros((2, 19), np.uint8))], "packed rows are uint8"),
        ([Tensor("a", GGMLType.F32, (2, 3), lambda: values(3, 2))], "its data"),
        ([("a", GGMLType.F16, np.full(3, 1e6))], "a: F16 cannot hold"),
    ],
)
def test_tensors_that_cannot_be_written(tmp_path: Path, tensors: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        write_gguf(tmp_path / "m.gguf", {}, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [0, 4, 33])
def test_impossible_alignment(tmp_path: Path, alignment: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        write_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, [])


def broken() -> np.ndarray:
    raise KeyboardInterrupt


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail(*_: Any) -> None:
    raise OSError(errno.EIO, "broken disk")


@pytest.mark.parametrize("old", [None, b"the old file"])
@pytest.mark.parametrize("fault", ["interrupt", "no space", "fsync", "replace"])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, old: bytes | None
) -> None:
    path = tmp_path / "m.gguf"
    if old is not None:
        path.write_bytes(old)
    tensors: list[Any] = [("a", GGMLType.F32, values(100_000))]
    if fault == "interrupt":
        tensors.append(Tensor("b", GGMLType.F32, (3,), broken))
        with pytest.raises(KeyboardInterrupt):
            write_gguf(path, {}, tensors)
    elif fault == "no space":
        with largest_file(100_000), pytest.raises(OSError, match=r"0\.4 MB are needed"):
            write_gguf(path, {}, tensors)
    else:
        monkeypatch.setattr(os, fault, fail)
        with pytest.raises(OSError, match="broken disk"):
            write_gguf(path, {}, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["m.gguf"])
    if old is not None:
        assert path.read_bytes() == old


def test_old_file_is_replaced_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "m.gguf"
    target.write_bytes(b"old")
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    write_gguf(link, {"key": 3}, [])
    assert link.is_symlink()
    assert gguf.GGUFReader(target).fields["key"].contents() == 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["link.gguf", "m.gguf", "sub"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_gguf(tmp_path / "m.gguf", {}, [])
    finally:
        os.umask(mask)
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o640


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="no regular file"):
        write_gguf(tmp_path / "pipe", {}, [])
    assert (tmp_path / "pipe").is_fifo()
