"""Importance matrices: the sums against a plain model's, the file, the command."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import reference
from command import DEMO, run, variant
from conftest import TINY, dequantized, llama_tensors, load_llama
from numpy.typing import NDArray

from cpuinfer import LLM, imatrix
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import open_gguf
from cpuinfer.importance import read_importance
from cpuinfer.models.llama import Span
from quant import dequantize
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf

Doubles = NDArray[np.float64]

TEXT = "The old man’s house stood by the sea. Nobody had lived there for 30 years. " * 30


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in F32."""
    file = open_gguf(DEMO)
    path = tmp_path_factory.mktemp("floats") / "floats.gguf"
    tensors = [
        (name, GGMLType.F32, dequantize(t.data, t.qtype).reshape(t.shape))
        for name, t in file.tensors.items()
    ]
    write_gguf(path, file.metadata, tensors)
    return path


def sums_of(config: ModelConfig, weights: dict[str, Doubles], chunks: list[list[int]]) -> Any:
    """Sums of squares by name, over chunks: the reference, whose matrices keep what they meet."""
    squares: dict[str, Doubles] = {}

    class Spy:
        """Stands for a matrix: `x @ spy.T` multiplies and adds up."""

        __array_ufunc__ = None  # so that NumPy leaves x @ spy.T to __rmatmul__

        def __init__(self, name: str, values: Doubles) -> None:
            self.name, self.values = name, values

        @property
        def T(self) -> "Spy":
            return self

        def __getitem__(self, rows: Any) -> Doubles:
            return self.values[rows]

        def __rmatmul__(self, x: Doubles) -> Doubles:
            squares[self.name] = squares.get(self.name, 0.0) + (x**2).sum(axis=0)
            return x @ self.values.T

    spied = {name: Spy(name, w) if w.ndim == 2 else w for name, w in weights.items()}
    for chunk in chunks:
        reference.logits(config, spied, chunk)  # type: ignore[arg-type]
    return squares


def doubles(path: Path) -> dict[str, Doubles]:
    file = open_gguf(path)
    return {name: dequantized(t.data, t.qtype).reshape(t.shape) for name, t in file.tensors.items()}


@pytest.mark.parametrize("with_output", [False, True])
def test_sums_are_those_of_the_plain_model(
    with_output: bool, floats: Path, text_file: Path
) -> None:
    with LLM(floats, kv_type="f32", context_length=300) as llm:
        chunks = imatrix.text_chunks(llm, TEXT)
        assert len(chunks) > 1 and (chunks[:, 0] == llm.tokenizer.bos_id).all()
        sums = imatrix.collect(llm, chunks, with_output)
        config = llm.config
    found = sums.by_name()
    want = sums_of(config, doubles(floats), chunks.tolist())
    output = want.pop("token_embd.weight")
    if with_output:
        want["token_embd.weight"] = output
    assert list(found) == sorted(want)
    for name, squares in want.items():
        np.testing.assert_allclose(found[name], squares, rtol=1e-3, err_msg=name)
        assert sums.tokens[name] == chunks.size


def test_an_observer_changes_nothing(tmp_path: Path) -> None:
    model = load_llama(tmp_path / "m.gguf", TINY, llama_tensors(TINY, GGMLType.Q8_0))
    ids = np.arange(9, dtype=np.int32)
    seen: list[tuple[str, ...]] = []
    want = model.forward([Span(ids, model.make_cache(), 9)])
    got = model.forward(
        [Span(ids, model.make_cache(), 9)], observe=lambda names, x: seen.append(tuple(names))
    )
    np.testing.assert_array_equal(got, want)
    block = [
        ("attn_q", "attn_k", "attn_v"),
        ("attn_output",),
        ("ffn_gate", "ffn_up"),
        ("ffn_down",),
    ]
    layers = [
        tuple(f"blk.{layer}.{name}.weight" for name in names)
        for layer in range(2)
        for names in block
    ]
    assert seen == [*layers, ("token_embd.weight",)]


def test_the_file(floats: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = text_file.with_name("o.gguf")
    words = ["imatrix", floats, "-f", text_file, "-o", out, "--ctx", "64", "--chunks", "3"]
    found = run(capsys, *words, "--kv-type", "f32", "--json")
    assert (found.code, found.err) == (0, "")
    report = json.loads(found.out)
    assert (report["chunks"], report["context_length"], report["tensors"]) == (3, 64, 28)
    reader = gguf.GGUFReader(out)
    fields = {name: f.contents() for name, f in reader.fields.items() if "." in name[5:]}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == [str(text_file)]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 64)
    with LLM(floats, kv_type="f32", context_length=64) as llm:
        want = sums_of(llm.config, doubles(floats), imatrix.text_chunks(llm, TEXT)[:3].tolist())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 28
    for name in want:
        if name == "token_embd.weight":
            continue
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert (sums.tensor_type, counts.tensor_type) == (GGMLType.F32, GGMLType.F32)
        assert sums.shape.tolist() == [len(want[name]), 1] and counts.shape.tolist() == [1, 1]
        np.testing.assert_allclose(sums.data[0], want[name], rtol=1e-3, err_msg=name)
        assert counts.data.tolist() == [[3 * 64]]


def test_quantize_reads_it(
    floats: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = text_file.with_name("o.gguf")
    assert run(capsys, "imatrix", floats, "-f", text_file, "-o", out, "--ctx", "64").code == 0
    importance = read_importance(out)
    assert importance.dataset == str(text_file)
    with LLM(floats, context_length=64) as llm:
        chunks = imatrix.text_chunks(llm, TEXT)
        sums = imatrix.collect(llm, chunks).by_name()
    assert importance.chunks == len(chunks)
    for name, squares in sums.items():
        np.testing.assert_allclose(importance.weights[name], squares / chunks.size, rtol=1e-6)
    quantized = text_file.with_name("q.gguf")
    words = ["quantize", floats, quantized, "Q4_0", "--imatrix", out, "--json"]
    found = run(capsys, *words)
    assert found.code == 0
    tensors = json.loads(found.out)["tensors"]
    assert {t["name"] for t in tensors if t["weighted"]} == set(sums)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--ctx", "2048"], 65, "chunks of 2048 take at least 2048"),
        (["--ctx", "7"], 2, "at least 8"),
        (["--chunks", "0"], 2, "chunks must be at least 1"),
        (["--ctx", "4096"], 2, "more than the 2048 positions"),
    ],
)
def test_what_cannot_be_measured(
    words: list[str], code: int, message: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_file.write_text(TEXT[:2000], encoding="utf-8")
    out = text_file.with_name("o.gguf")
    found = run(capsys, "imatrix", "-f", text_file, "-o", out, *words)
    assert (found.code, found.out, found.err.count("\n")) == (code, "", 1)
    assert message in found.err
    assert not out.exists()


def test_outputs_that_are_refused(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = text_file.with_name("model.gguf")
    model.write_bytes(DEMO.read_bytes())
    words = ["imatrix", model, "-f", text_file, "--ctx", "64", "--chunks", "1"]
    found = run(capsys, *words, "-o", model, "--force")
    assert found.code == 2 and "input and output are the same file" in found.err
    assert model.read_bytes() == DEMO.read_bytes()
    out = text_file.with_name("o.gguf")
    out.write_text("mine")
    assert run(capsys, *words, "-o", out).code == 73
    assert out.read_text() == "mine"
    assert run(capsys, *words, "-o", out, "--force").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_activations_that_are_no_numbers(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = variant(text_file.with_name("nan.gguf"), nan="blk.1.attn_norm.weight")
    out = text_file.with_name("o.gguf")
    found = run(capsys, "imatrix", model, "-f", text_file, "-o", out, "--ctx", "64")
    assert found.code == 65 and "blk.1.attn_q.weight are no numbers" in found.err
    assert not out.exists()


def test_ctrl_c_leaves_nothing(text_file: Path) -> None:
    script = (
        "import os, time; from cpuinfer import imatrix as i; whole = i.Sums.observe\n"
        "def slow(*a): os.write(1, b'.'); time.sleep(0.05); whole(*a)\n"
        "i.Sums.observe = slow\n"
        "import sys; from cpuinfer.cli import main; sys.exit(main())"
    )
    out = text_file.with_name("o.gguf")
    words = ["imatrix", "-f", str(text_file), "-o", str(out), "--ctx", "64"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert [path.name for path in text_file.parent.iterdir()] == ["text.txt"]


def test_progress_counts_tokens() -> None:
    seen: list[tuple[str, int, int]] = []
    with LLM(DEMO, context_length=300) as llm:
        chunks = imatrix.text_chunks(llm, TEXT)[:2]
        imatrix.collect(llm, chunks, on_progress=lambda *report: seen.append(report))
    assert seen == [("text", done, 600) for done in (0, 256, 300, 556, 600)]
