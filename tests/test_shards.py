"""Split models: where they are divided, what the parts hold, the way back, what is refused."""

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import DEMO, child, run
from gguf_files import F32, STRING, U8, U32, array_key, gguf, key, tensor

from cpuinfer import shards
from cpuinfer.gguf import open_gguf

Usage = namedtuple("Usage", ["total", "used", "free"])

ODD = [array_key("a.floats", F32, [1.5, float("nan")]), key("b.byte", U8, 7)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Six F32 tensors of 8 to 48 values, and keys of several types."""
    directory = tmp_path / "source"
    directory.mkdir()
    path = directory / "small.gguf"
    path.write_bytes(one_file([8, 16, 24, 32, 40, 48]))
    return path


def one_file(sizes: Sequence[int], keys: Sequence[bytes] = ()) -> bytes:
    tensors, data = [], b""
    for number, size in enumerate(sizes):
        tensors.append(tensor(f"t{number}", [8, size // 8], offset=len(data)))
        data += np.arange(size, dtype=np.float32).tobytes()
        data += bytes(-len(data) % 32)
    text = array_key("c.text", STRING, ["ä", b"\xff", ""])
    return gguf([*ODD, text, key("d.count", U32, 3), *keys], tensors, data)


def parts(directory: Path, stem: str, count: int) -> list[Path]:
    return [directory / f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]


def names(path: Path) -> list[int]:
    """Sizes of the tensors that a part holds by itself, read byte by byte elsewhere."""
    import gguf as gguf_py

    return [int(t.n_elements) for t in gguf_py.GGUFReader(path).tensors]


# Dividing


@pytest.mark.parametrize(
    ("most", "counts"),
    [(1, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (6, [6]), (100, [6])],
)
def test_so_many_tensors(
    most: int, counts: list[int], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "split", small, tmp_path / "m", "--max-tensors", str(most), "--json")
    assert (found.code, found.err) == (0, "")
    report = json.loads(found.out)
    paths = parts(tmp_path, "m", len(counts))
    assert [part["file"] for part in report["parts"]] == [str(path) for path in paths]
    assert [part["tensors"] for part in report["parts"]] == counts
    assert [part["bytes"] for part in report["parts"]] == [path.stat().st_size for path in paths]
    sizes = [8, 16, 24, 32, 40, 48]
    assert [names(path) for path in paths] == [
        sizes[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))
    ]


@pytest.mark.parametrize("most", [450, 500, 600, 1000])
def test_no_part_is_larger_than_allowed(most: int, small: Path, tmp_path: Path) -> None:
    file = open_gguf(small)
    divided = shards.divide(file, max_bytes=most)
    paths = shards.part_paths(tmp_path / "m", len(divided))
    shards.split(file, divided, paths, lambda *_: None)
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) <= most and len(paths) > 1
    # Nor are there more parts than necessary, but for the bytes that may be needed to fill up.
    fullest = [a + b for a, b in zip(sizes[1:], sizes[2:], strict=False)]
    assert all(both > most - 300 for both in fullest)


def test_metadata_may_fill_the_first_part(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(one_file([200], [key("e.long", STRING, "x" * 900)]))
    file = open_gguf(path)
    divided = shards.divide(file, max_bytes=1300)
    assert [len(part) for part in divided] == [0, 1]
    paths = shards.part_paths(tmp_path / "p", 2)
    shards.split(file, divided, paths, lambda *_: None)
    assert list(open_gguf(paths[1]).tensors) == ["t0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-size", "390"], "t5 takes"),
        (["--max-size", "100"], "the metadata alone takes"),
        (["--max-size", "0"], "at least one tensor and one byte"),
        (["--max-tensors", "0"], "at least one tensor and one byte"),
        (["--max-size", "1X"], "invalid size such as 2G"),
        (["--max-size", "1.2.3M"], "invalid size such as 2G"),
        ([], "one of the arguments --max-size --max-tensors is required"),
    ],
)
def test_limits_that_cannot_be_kept(
    words: list[str],
    message: str,
    small: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(capsys, "split", small, tmp_path / "m", *words)
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert message in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("given", "expected"), [("3K", 3e3), ("1.5m", 15e5), ("2G", 2e9)])
def test_units(
    given: str,
    expected: float,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(shards, "divide", lambda file, max_bytes: asked.append(max_bytes) or [[]])
    monkeypatch.setattr(shards, "split", lambda file, parts, paths, p: paths[0].touch())
    assert run(capsys, "split", small, small.with_name("m"), "--max-size", given).code == 0
    assert asked == [expected]


# There and back


def test_the_way_back_is_byte_for_byte(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "split", small, tmp_path / "m", "--max-tensors", "4").code == 0
    first, second = parts(tmp_path, "m", 2)
    found = run(capsys, "join", first, tmp_path / "joined.gguf", "--json")
    assert (found.code, found.err) == (0, "")
    assert json.loads(found.out)["tensors"] == 6
    assert (tmp_path / "joined.gguf").read_bytes() == small.read_bytes()
    # Any part will do, and a split model can be split otherwise.
    assert run(capsys, "join", second, tmp_path / "again.gguf").code == 0
    assert (tmp_path / "again.gguf").read_bytes() == small.read_bytes()
    assert run(capsys, "split", second, tmp_path / "n", "--max-tensors", "3").code == 0
    assert run(capsys, "join", parts(tmp_path, "n", 2)[0], tmp_path / "n.gguf").code == 0
    assert (tmp_path / "n.gguf").read_bytes() == small.read_bytes()


def test_the_bundled_model_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "split", DEMO, tmp_path / "m", "--max-size", "1M").code == 0
    paths = sorted(tmp_path.iterdir())
    assert len(paths) > 3
    before, after = open_gguf(DEMO), open_gguf(paths[2])
    assert list(after.tensors) == list(before.tensors)
    for name, one in before.tensors.items():
        other = after.tensors[name]
        assert (other.qtype, other.shape) == (one.qtype, one.shape)
        np.testing.assert_array_equal(other.data, one.data)
    assert run(capsys, "join", paths[0], tmp_path / "joined.gguf").code == 0
    words = ["generate", "-p", "Once", "-n", "12", "--temperature", "0"]
    expected = run(capsys, words[0], DEMO, *words[1:]).out
    for path in (tmp_path / "joined.gguf", paths[0]):
        assert run(capsys, words[0], path, *words[1:]).out == expected


def test_keys_of_the_parts(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gguf as gguf_py

    run(capsys, "split", small, tmp_path / "m", "--max-tensors", "4")
    for number, path in enumerate(parts(tmp_path, "m", 2)):
        fields = gguf_py.GGUFReader(path).fields
        kinds = {name: f.types[0].name for name, f in fields.items() if name.startswith("split")}
        assert kinds == {
            "split.no": "UINT16",
            "split.count": "UINT16",
            "split.tensors.count": "INT32",
        }
        values = [int(fields[name].parts[-1][0]) for name in kinds]
        assert sorted(values) == sorted([number, 2, 6])
        assert fields["split.no"].parts[-1][0] == number
        assert fields["split.count"].parts[-1][0] == 2
        assert ("d.count" in fields) == (number == 0)


# What is refused, and what is left behind


def test_outputs_that_are_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ["split", small, tmp_path / "m", "--max-tensors", "3"]
    assert run(capsys, *split).code == 0
    paths = parts(tmp_path, "m", 2)
    kept = paths[1].read_bytes()
    paths[0].unlink()
    found = run(capsys, *split)
    assert found.code == 73 and "--force replaces it" in found.err
    assert not paths[0].exists()
    assert run(capsys, *split, "--force").code == 0
    assert paths[1].read_bytes() == kept
    # The parts of a split model would be read while they are replaced.
    again = run(capsys, "split", paths[0], tmp_path / "m", "--max-tensors", "3", "--force")
    assert again.code == 2 and "input and output are the same file" in again.err
    for output, code in ((paths[1], 2), (small, 73), (tmp_path, 73), (tmp_path / "no/o", 73)):
        before = output.read_bytes() if output.is_file() else b""
        assert run(capsys, "join", paths[0], output, *["--force"] * (code == 2)).code == code
        assert not output.is_file() or output.read_bytes() == before


def test_only_split_models_are_joined(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(capsys, "join", small, tmp_path / "o.gguf")
    assert (found.code, found.err.count("\n")) == (2, 1) and "not a part" in found.err
    assert not (tmp_path / "o.gguf").exists()


def test_a_part_that_is_missing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "split", small, tmp_path / "m", "--max-tensors", "2")
    parts(tmp_path, "m", 3)[1].unlink()
    found = run(capsys, "join", parts(tmp_path, "m", 3)[0], tmp_path / "o.gguf")
    assert found.code == 65 and "m-00002-of-00003.gguf" in found.err


def test_a_disk_that_is_too_small(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 400, 600))
    found = run(capsys, "split", small, tmp_path / "m", "--max-tensors", "2")
    assert found.code == 74 and os.strerror(errno.ENOSPC) in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failure_in_a_later_part_leaves_nothing(small: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    first = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (600, 600))"
    first += "\nimport signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    result = child("split", small, tmp_path / "m", "--max-tensors", "4", first=first)
    assert result.returncode == 74 and result.stderr.count(b"\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(
    sent: signal.Signals, code: int, small: Path, tmp_path: Path
) -> None:
    """It comes while the second part is written."""
    script = (
        "import os, time; from cpuinfer import shards as s; whole = s.write_gguf\n"
        "def slow(*a): whole(*a); os.write(1, b'.'); time.sleep(0.3)\n"
        "s.write_gguf = slow\n"
        "import sys; from cpuinfer.cli import main; sys.exit(main())"
    )
    words = ["split", str(small), str(tmp_path / "m"), "--max-tensors", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_counts_bytes(small: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    file = open_gguf(small)
    divided = shards.divide(file, max_tensors=4)
    paths = shards.part_paths(tmp_path / "m", 2)
    shards.split(file, divided, paths, lambda *report: seen.append(report))
    shards.join(open_gguf(paths[0]), tmp_path / "o", lambda *report: seen.append(report))
    steps = [0, 8, 24, 48, 80, 120, 168]
    assert seen == [(name, 4 * done, 672) for name in ("split", "join") for done in steps]


# llama.cpp, where it is installed


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[Any]:
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    silent = module.llama_log_callback(lambda *_: None)
    module.llama_log_set(silent, ctypes.c_void_p(0))
    yield module
    module.llama_log_set(ctypes.cast(None, module.llama_log_callback), ctypes.c_void_p(0))


def test_llama_cpp_opens_the_parts(
    llama_cpp: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "split", DEMO, tmp_path / "m", "--max-size", "1M").code == 0
    first = min(tmp_path.iterdir())
    assert run(capsys, "join", first, tmp_path / "joined.gguf").code == 0

    def logits(path: Path) -> Any:
        model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False)
        model.eval(list(range(3, 20)))
        found = np.array(model.scores[:17])
        model.close()
        return found

    whole = logits(DEMO)
    np.testing.assert_array_equal(logits(first), whole)
    np.testing.assert_array_equal(logits(tmp_path / "joined.gguf"), whole)
