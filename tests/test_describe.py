"""What `inspect` says, against gguf-py's reader and counts by hand."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from command import DEMO, run, variant
from conftest import SHARED, shared

from cpuinfer import estimate, machine

STORIES = SHARED / "models/stories260K.gguf"


def report(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    result = run(capsys, "inspect", "--json", *argv)
    assert (result.code, result.err) == (0, "") and result.out.count("\n") == 1
    assert result.out.isascii()
    found: dict[str, Any] = json.loads(result.out)
    return found


def text(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    result = run(capsys, "inspect", *argv)
    assert (result.code, result.err) == (0, "")
    assert all(line.isprintable() for line in result.out.splitlines())
    return result.out


@pytest.mark.parametrize("path", [DEMO, STORIES], ids=lambda path: path.name)
def test_the_document_agrees_with_gguf_py(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not path.exists():
        pytest.skip(f"no {path}")
    found, reader = report(capsys, path), gguf.GGUFReader(path)
    assert found["tensors"] == [
        {
            "name": tensor.name,
            "type": tensor.tensor_type.name,
            "shape": tensor.shape[::-1].tolist(),
            "bytes": int(tensor.n_bytes),
        }
        for tensor in reader.tensors
    ]
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert found["bytes"] == path.stat().st_size
    fields = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(found["metadata"]) == set(fields)
    for key, field in fields.items():
        expected = field.contents()
        if isinstance(expected, float | list) and not isinstance(expected, str):
            np.testing.assert_array_equal(found["metadata"][key], expected)
        else:
            assert found["metadata"][key] == expected


def test_kinds_of_tensors_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, DEMO)
    kinds = {(kind["kind"], kind["type"]): kind for kind in found["kinds"]}
    layers = found["metadata"]["llama.block_count"]
    assert kinds["blk.*.attn_norm.weight", "F32"]["tensors"] == layers
    totals: dict[str, int] = defaultdict(int)
    for kind in kinds.values():
        for amount in ("tensors", "parameters", "bytes"):
            totals[amount] += kind[amount]
    assert totals == {
        "tensors": len(found["tensors"]),
        "parameters": found["parameters"],
        "bytes": sum(tensor["bytes"] for tensor in found["tensors"]),
    }


def test_memory_for_a_context_and_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    # 4 layers, 2 key and value heads of 32, keys and values, 2 bytes: 1 KiB a position; the window
    # of 128 keeps 127 positions in front of a chunk of 256.
    memory = report(capsys, DEMO)["memory"]
    assert (memory["cache"], memory["sliding_window"]) == (1024 * (127 + 256), 128)
    assert memory["weights"] == DEMO.stat().st_size
    assert memory["total"] == sum(memory[part] for part in ("weights", "cache", "scratch"))
    for argv, positions, item in (
        (["--sliding-window", "off"], 2048, 2),
        (["--sliding-window", "off", "--kv-type", "f32"], 2048, 4),
        (["--context-length", "300"], 300, 2),
        (["--sliding-window", "10", "--context-length", "1000"], 9 + 256, 2),
    ):
        memory = report(capsys, DEMO, *argv)["memory"]
        assert memory["cache"] == 512 * item * positions, argv


def test_memory_that_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ["--sliding-window", "off", "--kv-type", "f32"]
    total = report(capsys, DEMO, *off)["memory"]["total"]
    monkeypatch.setattr(machine, "memory_available", lambda: total - 1)
    memory = report(capsys, DEMO, *off)["memory"]
    assert memory["fitting_context_length"] == memory["instead"]["context_length"] == 1792
    assert memory["instead"]["q8_0_context_length"] == 2048
    shown = text(capsys, DEMO, *off)
    assert "which is too little" in shown
    fits = "a context of 1792 positions fits, with a q8_0 cache one of 2048"
    assert f"instead       {fits}\n" in shown
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 20)
    memory = report(capsys, DEMO)["memory"]
    assert memory["fitting_context_length"] == 0 and not memory["instead"]["types"]
    assert "1.0 MiB, which is too little" in text(capsys, DEMO)
    assert "instead       take a smaller model" in text(capsys, DEMO)


def test_other_types_of_a_model_have_the_size_that_quantize_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q4.gguf"
    assert run(capsys, "quantize", DEMO, out, "Q4_K_M", "--allow-requantize").code == 0
    expected = report(capsys, DEMO)["memory"]["type_bytes"]["Q4_K_M"]
    assert abs(out.stat().st_size - expected) < 1000  # keys of its own


def test_the_speed_to_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 10.0)
    monkeypatch.setattr(machine, "instruction_set", lambda: "avx2")
    assert report(capsys, DEMO)["speed"] is None  # too small
    monkeypatch.setattr(estimate, "FROM_MEMORY", 1)
    speed = report(capsys, DEMO)["speed"]
    cores, _ = machine.threads()
    threads, _ = machine.decode_threads(cores)
    assert (speed["bandwidth"], speed["threads"], speed["positions"]) == (10, threads, 128)
    # The embedding is the output as well, or is not read.
    tensors = {tensor["name"]: tensor["bytes"] for tensor in report(capsys, DEMO)["tensors"]}
    if "output.weight" in tensors:
        del tensors["token_embd.weight"]
    weights = sum(tensors.values())
    assert speed["tokens_per_second"] == pytest.approx(9e9 / (weights + 1024))
    assert speed["tokens_per_second_full"] == pytest.approx(9e9 / (weights + 128 * 1024))
    assert f"(10.0 GB/s read by {threads} threads)" in text(capsys, DEMO)
    short = report(capsys, DEMO, "--context-length", "64")["speed"]
    assert short["positions"] == 64
    # Of a context that does not fit, the one that does.
    total = report(capsys, DEMO, "--sliding-window", "off")["memory"]["total"]
    monkeypatch.setattr(machine, "memory_available", lambda: total - 1)
    assert report(capsys, DEMO, "--sliding-window", "off")["speed"]["positions"] == 1792
    monkeypatch.setattr(machine, "memory_available", lambda: 1000)
    assert report(capsys, DEMO)["speed"] is None


def test_the_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    shown = text(capsys, DEMO)
    for words in (
        ["size", f"{DEMO.stat().st_size:,} bytes"],
        ["architecture", "llama"],
        ["window", "128 positions"],
        ["runs here", "yes"],
        ["llama.embedding_length", "256"],
        ["tokenizer.ggml.tokens", '["<unk>", "<s>", "</s>"', "(2048 in all)"],
    ):
        (line,) = [line for line in shown.splitlines() if line.startswith(words[0])]
        assert all(word in line for word in words[1:]), line
    assert "blk.3.ffn_up.weight" not in shown
    listed = [line.split() for line in text(capsys, DEMO, "--tensors").splitlines()]
    assert ["blk.3.ffn_up.weight", "Q8_0", "768", "x", "256", "204.0", "KiB"] in listed


def test_a_vocabulary_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = shared("vocab/ggml-vocab-llama-spm.gguf")
    found = report(capsys, path)
    assert (found["tensors"], found["parameters"], found["memory"]) == ([], 0, None)
    assert not found["runs"] and "token_embd.weight" in found["reason"]
    assert len(found["metadata"]["tokenizer.ggml.tokens"]) == 32000
    assert "runs here     no: " in text(capsys, path)


def test_an_architecture_that_does_not_run_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(tmp_path / "m.gguf", {"general.architecture": "rwkv"})
    found = report(capsys, path)
    assert found["architecture"] == "rwkv" and found["parameters"] > 3_000_000
    assert not found["runs"] and "rwkv is not supported" in found["reason"]
    assert "runs here     no: general.architecture: rwkv" in text(capsys, path)
    path = variant(tmp_path / "t.gguf", {"tokenizer.ggml.model": "gpt2"})
    found = report(capsys, path)
    assert found["config"]["dim"] == 256 and not found["runs"] and "gpt2" in found["reason"]


def test_T27_text_from_the_file_is_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[2J\x9b31m\r\nname\u202e"
    keys = {
        "some.list": [hostile.encode(), b"\xff\x1b", b"x" * 500],
        "some.numbers": np.array([np.nan, np.inf, 1.5], np.float32),
    }
    path = variant(tmp_path / "hostile\x1b\n.gguf", {"general.name": hostile})
    shown = text(capsys, path, "--tensors")
    assert r"\x1b[2J\x9b31m\r\nname\u202e" in shown
    assert report(capsys, path)["name"] == hostile
    path = variant(tmp_path / "m.gguf", keys)
    shown = text(capsys, path)
    assert r'"\xff\x1b"' in shown and "x" * 61 not in shown
    found = report(capsys, path)["metadata"]
    assert found["some.list"][1] == "\\xff\x1b"
    assert found["some.numbers"] == [None, None, 1.5]


def test_warnings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "longer.gguf"
    path.write_bytes(DEMO.read_bytes() + b"tail")
    assert "4 bytes after the last tensor" in report(capsys, path)["warnings"][0]
    assert "warning       longer.gguf: 4 bytes" in text(capsys, path)
