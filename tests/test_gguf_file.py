"""GGUF files on the disk: opened, mapped, split, and read as gguf-py reads them."""

import errno
import mmap
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import gguf_files as files
import numpy as np
import pytest
from gguf_files import I32, STRING, U16
from gguf_oracle import assert_read_the_same

from cpuinfer.gguf import ModelFormatError, open_gguf
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = SHARED / "gguf_samples"
PATH = Path("model.gguf")

needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/data is not here")


def refusal(read: Callable[[], object]) -> ModelFormatError:
    """The error `read` raises, which is one line."""
    with pytest.raises(ModelFormatError) as caught:
        read()
    assert str(caught.value).isprintable()
    return caught.value


# What is no readable file (G30)


def test_G30_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError, match="missing.gguf"):
        open_gguf(tmp_path / "missing.gguf")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        open_gguf(tmp_path)
    with pytest.raises(OSError, match="loop") as caught:
        open_gguf(str(tmp_path / "loop"))
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="not a regular file: '/dev/zero'"):
        open_gguf("/dev/zero")


def test_G30_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    code = f"from cpuinfer.gguf import open_gguf; open_gguf({str(tmp_path / 'fifo.gguf')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "not a regular file" in done.stderr


def test_G30_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(files.gguf())
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        tmp_path.chmod(0o755)
        os.seteuid(65_534)
    try:
        with pytest.raises(PermissionError, match="model.gguf"):
            open_gguf(path)
    finally:
        os.seteuid(user)


def test_R02_no_room_in_the_address_space(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(files.gguf(data=b""))
    os.truncate(path, 4 << 30)
    code = f"""
import resource
from cpuinfer.gguf import open_gguf
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), -1))
try:
    open_gguf({str(path)!r})
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        f"{path}: no room to map 4294967296 bytes, the address space of this process is limited "
        "(ulimit -v)\n"
    )


def test_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, length: int, access: int) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    path = tmp_path / "model.gguf"
    path.write_bytes(files.gguf(data=b""))
    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(OSError, match="No such device: .*model.gguf"):
        open_gguf(path)


# Mapped, not copied


def test_tensors_are_views_of_the_map(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rows = 1 << 15
    path.write_bytes(files.gguf(tensors=[files.tensor("a", [8192, rows])], data=b""))
    os.truncate(path, path.stat().st_size + 4 * 8192 * rows)  # 1 GiB, not on the disk
    tracemalloc.start()
    read = open_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    data = read.tensors["a"].data
    assert type(data) is np.ndarray
    assert (data.dtype, data.shape) == (np.uint8, (rows, 4 * 8192))
    assert not data.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        data.flags.writeable = True
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(getattr(base, "obj", base), mmap.mmap)
    path.unlink()
    assert data[rows - 1, 8191] == 0


def test_no_descriptor_stays_open_after_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(files.gguf(version=9) + bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    # Not with pytest.raises, which keeps the error, and with it the frames that hold the map.
    for _ in range(3):
        try:
            open_gguf(path)
        except ModelFormatError:
            continue
        pytest.fail("version 9 was read")
    assert len(os.listdir("/proc/self/fd")) == before


# Split models (G29)


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_split_model_opens_from_any_part(opened: int, tmp_path: Path) -> None:
    paths = files.split_model(tmp_path, (2, 0, 1), stem="a name\n-00001-of-00002.gguf")
    read = open_gguf(paths[opened])
    assert read.path == paths[0]
    assert read.uint("test.part") == 0
    assert read.nbytes == sum(path.stat().st_size for path in paths)
    assert {name: set(t.data.view(np.float32).flat) for name, t in read.tensors.items()} == {
        "t0": {0.0},
        "t1": {1.0},
        "t2": {2.0},
    }
    with pytest.raises(TypeError):
        read.tensors["t3"] = read.tensors["t0"]  # type: ignore[index]
    assert read.error("t2", "x").path == paths[2]
    assert read.error("test.part", "x").path == paths[0]


def test_split_model_through_links_as_in_a_download_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(files.split_model(tmp_path / "blobs", (1, 1))):
        blob = path.rename(tmp_path / "blobs" / f"{number}abc")
        (tmp_path / "snapshot" / path.name).symlink_to(blob)
    assert list(open_gguf(tmp_path / "snapshot" / "m-00001-of-00002.gguf").tensors) == ["t0", "t1"]


@pytest.mark.parametrize("count", [0, 1])
def test_model_merged_or_in_one_part(count: int, tmp_path: Path) -> None:
    path = tmp_path / "merged.gguf"
    path.write_bytes(files.part(0, count, 1, [0]))
    assert list(open_gguf(path).tensors) == ["t0"]


@pytest.mark.parametrize(
    ("number", "raw", "field", "reason"),
    [
        (2, None, "split.count", "m-00003-of-00003.gguf, another part"),
        (0, None, "split.count", "m-00001-of-00003.gguf, another part"),
        (0, files.part(0, 4, 3, [0]), "split.no", "must end in -00001-of-00004.gguf"),
        (0, files.part(1, 3, 3, [0]), "split.no", "must end in -00002-of-00003.gguf"),
        (0, files.part(2**16 - 1, 3, 3, [0]), "split.no", "must end in -65536-of-00003.gguf"),
        (1, files.part(1, 4, 3, [1]), "split.count", "4, expected 3"),
        (1, files.part(2, 3, 3, [1]), "split.no", "2, expected 1"),
        (2, files.part(2, 3, 4, [2]), "split.tensors.count", "4, expected 3"),
        (2, files.part(2, 3, 3, []), "split.tensors.count", "3, but the parts hold 2 tensors"),
        (2, files.part(2, 3, 3, [0]), "tensor t0", "an earlier part of the split model has it too"),
        (2, files.gguf(), "split.no", "the key is missing"),
        (1, files.part(1, 3, 3, [1])[:-1], "tensor t1", "1 missing"),
    ],
    ids=[
        "part-missing",
        "first-part-missing",
        "count-of-name",
        "number-of-name",
        "number-huge",
        "count",
        "number",
        "tensor-count-differs",
        "tensor-count",
        "tensor-twice",
        "not-a-part",
        "part-cut",
    ],
)
def test_G29_split_model_with_a_fault(
    number: int, raw: bytes | None, field: str, reason: str, tmp_path: Path
) -> None:
    paths = files.split_model(tmp_path, (1, 1, 1))
    if raw is None:
        paths[number].unlink()
    else:
        paths[number].write_bytes(raw)
    error = refusal(lambda: open_gguf(paths[1 if number == 0 and raw is None else 0]))
    assert error.field == field
    assert reason in error.reason


@pytest.mark.parametrize(
    "name",
    [
        "m.gguf",
        "m-1-of-2.gguf",
        "m-1-of-00002.gguf",
        "m-00001-of-2.gguf",
        "m-00001-of-00002.gguf.part",
    ],
)
def test_G29_part_with_another_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(files.part(0, 2, 1, [0]))
    assert "must end in -00001-of-00002.gguf" in refusal(lambda: open_gguf(path)).reason


def test_G29_no_path_leaves_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "a"
    directory.mkdir()
    (tmp_path / "x-00002-of-00002.gguf").write_bytes(files.part(1, 2, 2, [1]))
    keys = [
        files.key("split.no", U16, 0),
        files.key("split.count", U16, 2),
        files.key("split.tensors.count", I32, 2),
        files.key("general.name", STRING, "../x"),
        files.key("split.name", STRING, "../x-00002-of-00002.gguf"),
    ]
    path = directory / "..x-00001-of-00002.gguf"
    path.write_bytes(files.gguf(keys, [files.tensor("t0", [8])], bytes(32)))
    opened = []
    open_file = os.open

    def record(path: Path, flags: int) -> int:
        opened.append(path)
        return open_file(path, flags)

    monkeypatch.setattr(os, "open", record)
    refusal(lambda: open_gguf(path))
    assert opened == [path, directory / "..x-00002-of-00002.gguf"]


# Files of others


@needs_samples
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(SHARED)))
        for path in sorted([*SHARED.rglob("*.gguf"), *SHARED.rglob("fuzz/*.bin")])
    ],
)
def test_shared_file_is_read_as_by_gguf_py_or_refused(path: Path) -> None:
    refused = {
        "hdr-suppress-eos.gguf": ("tensor 13 of 20", "19 bytes needed, 11 bytes left"),
        "hdr-wrap-first-offset.gguf": ("tensor token_embd.weight", "data offset 1844674407370955"),
        "hdr-zero-first-dim.gguf": ("tensor output_norm.weight", "data offset 66304 where 0"),
        "bad-version.bin": ("version", "GGUF version 1"),
        "huge-counts.bin": ("n_tensors", "18446744073709551615 are announced"),
        "kv-arr-huge-n.bin": ("k", "an array of 4294967295 elements"),
        "kv-huge-strlen.bin": ("n_kv", "1 are announced, 8 bytes left"),
        "magic-only.bin": ("header", "too short: 4 bytes"),
        "tensor-huge-dims.bin": ("tensor t", "is too large"),
        "trunc-magic.bin": ("header", "too short: 3 bytes"),
        "ggml-vocab-bert-bge.gguf": ("key 6 of 20", "converted to UTF-8 text"),
        "mangled-by-text-conversion": ("key 10 of 22", "converted to UTF-8 text"),
    }
    expected = refused.get(path.name) or refused.get(path.parent.name)
    if expected:
        error = refusal(lambda: open_gguf(path))
        assert error.field == expected[0]
        assert expected[1] in error.reason
    elif "-of-" in path.name:
        whole = open_gguf(path.parent / "dummy.gguf")
        parts = open_gguf(path)
        assert list(parts.tensors) == list(whole.tensors)
        for name, tensor in whole.tensors.items():
            assert parts.tensors[name].data.tobytes() == tensor.data.tobytes()
    elif path.name.startswith("vocab-spm"):
        # gguf-py takes seconds for a large vocabulary: once, for the next file, will do.
        llama = open_gguf(SHARED / "vocab" / "ggml-vocab-llama-spm.gguf")
        tokens = "tokenizer.ggml.tokens"
        assert open_gguf(path).array(tokens, str) == llama.array(tokens, str)
    else:
        assert_read_the_same(path)


@pytest.mark.parametrize("seed", range(12))
def test_G33_file_of_gguf_py_is_read_the_same(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if seed % 3 == 0:
        writer.add_custom_alignment(int(rng.choice([1, 8, 64, 4096])))
    kinds = [kind for kind in gguf.GGUFValueType if kind != gguf.GGUFValueType.ARRAY]
    for index in range(rng.integers(1, 120)):
        kind = kinds[rng.integers(len(kinds))]
        values = random_values(rng, kind, int(rng.integers(1, 40)))
        if rng.integers(2):
            writer.add_key_value(f"key.{index}", values[0], kind)
        else:
            writer.add_key_value(f"key.{index}", values, gguf.GGUFValueType.ARRAY, sub_type=kind)
    for index in range(rng.integers(0, 60)):
        qtype = list(GGMLType)[rng.integers(len(GGMLType))]
        rows = rng.integers(1, 5, rng.integers(0, 4))
        shape = (*rows.tolist(), qtype.row_bytes(qtype.block_size * int(rng.integers(1, 9))))
        data = rng.integers(0, 256, shape, np.uint8)
        writer.add_tensor(f"tensor.{index}", data, raw_dtype=gguf.GGMLQuantizationType(qtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_read_the_same(path)
    assert open_gguf(path).warnings == ()


def random_values(
    rng: np.random.Generator, kind: gguf.GGUFValueType, count: int
) -> list[int] | list[float] | list[str]:
    if kind == gguf.GGUFValueType.STRING:
        letters = rng.integers(32, 0x2FFF, (count, 6))
        return ["".join(map(chr, row)) for row in letters.tolist()]
    dtype = np.dtype(gguf.GGUFReader.gguf_scalar_to_np[kind])
    if kind == gguf.GGUFValueType.BOOL:
        return [bool(value) for value in rng.integers(0, 2, count)]
    if dtype.kind == "f":
        return [float(value) for value in rng.normal(size=count).astype(dtype)]
    limits = np.iinfo(dtype)
    return [
        int(value)
        for value in rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    ]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_released_pages_leave_memory_and_are_read_again(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32)  # 4 MiB
    write_gguf(tmp_path / "m.gguf", {}, [("t", GGMLType.F32, values.reshape(1, -1))])
    tensor = open_gguf(tmp_path / "m.gguf").tensors["t"]

    def resident() -> int:
        """KiB of the map that are in this process's memory."""
        maps = Path("/proc/self/smaps").read_text().split("m.gguf", 1)[1]
        return int(maps.split("Rss:", 1)[1].split()[0])

    assert (tensor.data.view(np.float32) == values).all()
    assert resident() > 4000
    tensor.release()
    assert resident() < 100
    assert (tensor.data.view(np.float32) == values).all()
