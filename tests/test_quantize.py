"""`cpuinfer quantize`: the types that tensors get, the files, and what is refused."""

import ctypes
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from command import Result, child, run
from conftest import Tensors
from numpy.typing import NDArray

from cpuinfer import requantize
from cpuinfer.gguf import ModelFormatError, open_gguf
from cpuinfer.importance import read_importance
from quant import dequantize, quantize, quantize_weighted
from quant.ggml_types import GGMLType
from quant.ggml_types import GGMLType as T
from quant.gguf_writer import write_gguf
from quant.mixes import MIXES, Model, Wishes, target_types
from tools import quantize as tool
from tools.random_model import vocabulary

DIM, HIDDEN, VOCAB = 256, 512, 320

# Mixes


def shapes(n_layers: int, dim: int = DIM, tied: bool = False, n_experts: int = 0) -> dict[str, Any]:
    """Names -> (shape, F16) of a Llama with four heads that share one of k and v."""
    experts = "_exps" if n_experts else ""
    e = (n_experts,) if n_experts else ()
    found: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, dim), "output_norm": (dim,)}
    if not tied:
        found["output"] = (VOCAB, dim)
    for layer in range(n_layers):
        found |= {
            f"blk.{layer}.attn_norm": (dim,),
            f"blk.{layer}.attn_q": (dim, dim),
            f"blk.{layer}.attn_k": (dim // 4, dim),
            f"blk.{layer}.attn_v": (dim // 4, dim),
            f"blk.{layer}.attn_output": (dim, dim),
            f"blk.{layer}.ffn_norm": (dim,),
            f"blk.{layer}.ffn_gate{experts}": (*e, 2 * dim, dim),
            f"blk.{layer}.ffn_up{experts}": (*e, 2 * dim, dim),
            f"blk.{layer}.ffn_down{experts}": (*e, dim, 2 * dim),
        }
        if n_experts:
            found[f"blk.{layer}.ffn_gate_inp"] = (n_experts, dim)
    return {
        f"{name}.weight": (shape, T.F32 if len(shape) == 1 or "inp" in name else T.F16)
        for name, shape in found.items()
    }


def targets(mix: str, model: Model, weighted: bool = False, **wishes: Any) -> dict[str, GGMLType]:
    return target_types(
        shapes(model.n_layers, n_experts=model.n_experts),
        MIXES[mix],
        model,
        Wishes(**wishes),
        weighted,
    )


ALL = set(range(32))
# i < 32 / 8, i >= 7 * 32 / 8, and of those between each third: 4 + 2, 4 + 5, ...
MORE = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}

# For a Mistral 7B: what is not of the mix's base type, kind -> type -> layers.
EXCEPTIONS: dict[str, tuple[GGMLType, dict[str, dict[GGMLType, set[int]]]]] = {
    "Q2_K": (
        T.Q2_K,
        {"attn_v": {T.Q4_K: ALL}, "ffn_down": {T.Q3_K: ALL}, "attn_output": {T.Q3_K: ALL}},
    ),
    "Q3_K_S": (T.Q3_K, {}),
    "Q3_K_M": (
        T.Q3_K,
        {
            "attn_v": {T.Q5_K: {0, 1}, T.Q4_K: ALL - {0, 1}},
            "ffn_down": {T.Q5_K: {0, 1}, T.Q4_K: ALL - {0, 1}},
            "attn_output": {T.Q4_K: ALL},
        },
    ),
    "Q3_K_L": (
        T.Q3_K,
        {"attn_v": {T.Q5_K: ALL}, "ffn_down": {T.Q5_K: ALL}, "attn_output": {T.Q5_K: ALL}},
    ),
    "Q4_K_S": (T.Q4_K, {"attn_v": {T.Q5_K: {0, 1, 2, 3}}, "ffn_down": {T.Q5_K: {0, 1, 2, 3}}}),
    "Q4_K_M": (T.Q4_K, {"attn_v": {T.Q6_K: MORE}, "ffn_down": {T.Q6_K: MORE}}),
    "Q5_K_S": (T.Q5_K, {}),
    "Q5_K_M": (T.Q5_K, {"attn_v": {T.Q6_K: MORE}, "ffn_down": {T.Q6_K: MORE}}),
    "Q6_K": (T.Q6_K, {}),
    "Q8_0": (T.Q8_0, {}),
    "Q4_0": (T.Q4_0, {}),
    "Q4_1": (T.Q4_1, {}),
    "Q5_0": (T.Q5_0, {}),
    "Q5_1": (T.Q5_1, {}),
    "F16": (T.F16, {}),
    "BF16": (T.BF16, {}),
    "F32": (T.F32, {}),
}


@pytest.mark.parametrize("mix", MIXES)
def test_types_of_a_mistral_7b(mix: str) -> None:
    base, exceptions = EXCEPTIONS[mix]
    want = {}
    for name, (shape, qtype) in shapes(32).items():
        parts = name.split(".")
        want[name] = qtype if len(shape) == 1 else base
        for other, layers in exceptions.get(parts[-2], {}).items():
            if int(parts[1]) in layers:
                want[name] = other
    if base.block_size > 1 and base is not T.Q8_0:
        want["output.weight"] = T.Q6_K
    assert targets(mix, Model(32, 4)) == want


def test_importances_spare_the_first_ffn_down() -> None:
    for mix, more in (("Q4_0", T.Q4_1), ("Q5_0", T.Q5_1)):
        found = targets(mix, Model(32, 4), weighted=True)
        other = {name for name, qtype in found.items() if qtype is more}
        assert other == {f"blk.{layer}.ffn_down.weight" for layer in range(4)}


def test_a_tensor_of_v_for_each_head_is_large() -> None:
    found = targets("Q2_K", Model(3, 1))
    assert {found[f"blk.{layer}.attn_v.weight"] for layer in range(3)} == {T.Q3_K}


def test_70b_and_its_like_of_65b() -> None:
    """80 layers whose heads share k and v."""
    for group_size, qtype in ((8, T.Q5_K), (1, T.Q4_K)):
        found = targets("Q4_K_S", Model(80, group_size))
        assert found["blk.40.attn_v.weight"] is qtype
        assert found["blk.40.ffn_up.weight"] is T.Q4_K


@pytest.mark.parametrize(("mix", "output"), [("Q4_K_M", T.Q5_K), ("Q3_K_L", T.Q3_K)])
def test_eight_experts(mix: str, output: GGMLType) -> None:
    found = targets(mix, Model(32, 4, n_experts=8))
    assert found["blk.4.attn_k.weight"] is found["blk.4.attn_v.weight"] is T.Q8_0
    assert found["blk.4.attn_output.weight"] is output
    assert found["blk.4.ffn_gate_inp.weight"] is T.F32
    down = found["blk.4.ffn_down_exps.weight"], found["blk.31.ffn_down_exps.weight"]
    assert down == ((T.Q4_K, T.Q6_K) if mix == "Q4_K_M" else (T.Q5_K, T.Q5_K))


def test_an_embedding_that_is_the_output_too() -> None:
    found = target_types(shapes(1, tied=True), MIXES["Q4_0"], Model(1, 4), Wishes())
    assert found["token_embd.weight"] is T.Q6_K
    wishes = Wishes(output_type=T.Q5_K)
    found = target_types(shapes(1, tied=True), MIXES["Q4_0"], Model(1, 4), wishes)
    assert found["token_embd.weight"] is T.Q5_K


@pytest.mark.parametrize(
    ("mix", "cols", "qtype", "output"),
    [
        ("Q2_K", 288, T.Q4_0, T.Q8_0),
        ("Q3_K_S", 288, T.Q4_0, T.Q8_0),
        ("Q4_K_S", 288, T.Q5_0, T.Q8_0),
        ("Q5_K_S", 288, T.Q5_1, T.Q8_0),
        ("Q6_K", 288, T.Q8_0, T.Q8_0),
        ("Q4_0", 288, T.Q4_0, T.Q8_0),
        ("Q4_K_S", 100, T.F16, T.F16),
        ("Q8_0", 100, T.F16, T.F16),
        ("BF16", 100, T.BF16, T.BF16),
    ],
)
def test_rows_that_blocks_do_not_divide(
    mix: str, cols: int, qtype: GGMLType, output: GGMLType
) -> None:
    found = target_types(shapes(32, dim=cols), MIXES[mix], Model(32, 4), Wishes())
    assert found["blk.20.attn_q.weight"] is qtype
    assert found["output.weight"] is output


def test_wishes() -> None:
    model = Model(4, 4)
    assert set(targets("Q4_K_M", model, pure=True).values()) == {T.Q4_K, T.F32}
    found = targets("Q4_K_M", model, output_type=T.Q8_0, token_embedding_type=T.BF16)
    assert (found["output.weight"], found["token_embd.weight"]) == (T.Q8_0, T.BF16)
    patterns = [(r"blk\.[01]\.attn_v", T.Q8_0), ("attn_[vk]", T.F16)]
    found = targets("Q4_K_M", model, tensor_types=patterns)
    assert found["blk.1.attn_v.weight"] is T.Q8_0
    assert found["blk.2.attn_v.weight"] is found["blk.1.attn_k.weight"] is T.F16
    assert found["blk.1.attn_norm.weight"] is T.F32


# Files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers in F16, with norms in F32."""
    path = tmp_path_factory.mktemp("quantize") / "model.gguf"
    write_model(path)
    return path


def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    rng = np.random.default_rng(sum(name.encode()))
    return (rng.standard_normal(shape) * 0.02).astype(np.float32)


def write_model(
    path: Path, qtype: GGMLType = T.F16, n_layers: int = 2, **changed: NDArray[np.float32]
) -> None:
    """Matrices of `qtype`; `changed` has values of one of layer 0's instead."""
    tensors: Tensors = []
    for name, (shape, kind) in shapes(n_layers).items():
        x = changed.get(name.removeprefix("blk.0.").removesuffix(".weight"))
        x = values(name, shape) if x is None else x
        tensors.append((name, kind if kind is T.F32 else qtype, x))
    write_gguf(path, metadata(n_layers), tensors)


def metadata(n_layers: int) -> dict[str, Any]:
    keys = {
        "context_length": 512,
        "embedding_length": DIM,
        "block_count": n_layers,
        "feed_forward_length": HIDDEN,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
        "vocab_size": VOCAB,
    }
    odd = {
        "test.u64": np.uint64(2**63),
        "test.i8": np.int8(-3),
        "test.f64": np.float64(math.pi),
        "test.flag": True,
        "test.latin": b"caf\xe9",
        "test.halves": np.arange(3, dtype=np.int16),
        "general.file_type": 1,
    }
    named = {f"llama.{key}": value for key, value in keys.items()}
    return {"general.architecture": "llama", **named, **odd, **vocabulary(VOCAB)}


def quantized(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Result:
    result = run(capsys, "quantize", *words)
    assert result.code == 0, result
    return result


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "BF16"])
def test_tensors_and_keys(
    mix: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    result = quantized(capsys, source, out, mix)
    assert result.err == "" and str(out) in result.out
    before, after = open_gguf(source), open_gguf(out)
    model = Model(2, 4)
    assert {name: t.qtype for name, t in after.tensors.items()} == targets(mix, model)
    for name, tensor in before.tensors.items():
        x = dequantize(tensor.data, tensor.qtype)
        want = tensor.data if tensor.qtype is T.F32 else quantize(x, after.tensors[name].qtype)
        np.testing.assert_array_equal(after.tensors[name].data, want)
        assert after.tensors[name].shape == tensor.shape
    changed = {"general.file_type", "general.quantization_version"}
    assert after.uint("general.file_type") == {"Q4_K_M": 15, "Q8_0": 7, "BF16": 32}[mix]
    assert after.uint("general.quantization_version") == 2
    assert set(after.metadata) == set(before.metadata) | changed
    fields = [gguf.GGUFReader(path).fields for path in (source, out)]
    for key in before.metadata.keys() - changed:
        theirs, ours = (field[key] for field in fields)
        assert theirs.types == ours.types, key
        for one, other in zip(theirs.parts[3:], ours.parts[3:], strict=True):
            np.testing.assert_array_equal(one, other)


def test_threads_do_not_matter(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requantize, "_STEP", 1000)  # the last step of a tensor is shorter
    for threads in ("1", "3"):
        quantized(capsys, source, tmp_path / threads, "Q3_K_M", "--threads", threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_a_dry_run_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    words = (source, out, "q4_k_m", "--pure")
    lines = quantized(capsys, *words, "--dry-run").out.splitlines()
    assert list(tmp_path.iterdir()) == []
    row = next(line for line in lines if line.startswith("blk.1.ffn_down.weight"))
    # 256 rows of two blocks of 144 bytes
    assert row.split()[1:] == [
        *("256", "x", "512", "F16", "->", "Q4_K", "0.26", "->", "0.07", "MB")
    ]
    document = json.loads(quantized(capsys, *words, "--dry-run", "--json").out)
    assert "output" not in document and "seconds" not in document
    written = json.loads(quantized(capsys, *words, "--json").out)
    assert written["output"] == str(out) and written["seconds"] > 0
    assert written["tensors"] == document["tensors"]
    assert written["bytes"] == sum(t.data.nbytes for t in open_gguf(out).tensors.values())
    (tensor,) = (t for t in written["tensors"] if t["name"] == "blk.1.ffn_down.weight")
    assert tensor == {
        "name": "blk.1.ffn_down.weight",
        "shape": [256, 512],
        "type_before": "F16",
        "type": "Q4_K",
        "bytes_before": 256 * 512 * 2,
        "bytes": 256 * 2 * 144,
        "weighted": False,
    }


def test_options_reach_the_mix(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output-type", "f16", "--token-embedding-type=Q5_1", "--tensor-type=attn_k=Q8_0"]
    quantized(capsys, source, tmp_path / "o", "Q4_0", *options)
    found = {name: t.qtype for name, t in open_gguf(tmp_path / "o").tensors.items()}
    wishes = {
        "output_type": T.F16,
        "token_embedding_type": T.Q5_1,
        "tensor_types": [("attn_k", T.Q8_0)],
    }
    assert found == targets("Q4_0", Model(2, 4), **wishes)


def test_the_tool_is_the_command(source: Path, tmp_path: Path) -> None:
    assert tool.main([str(source), str(tmp_path / "o"), "F32"]) == 0
    assert {t.qtype for t in open_gguf(tmp_path / "o").tensors.values()} == {T.F32}


def test_a_split_model_becomes_one_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = open_gguf(source)
    tensors = [(t.name, t.qtype, t.data.reshape(*t.shape[:-1], -1)) for t in file.tensors.values()]
    parts = [tmp_path / f"m-0000{part + 1}-of-00002.gguf" for part in range(2)]
    for part, path in enumerate(parts):
        split = {"no": np.uint16(part), "count": np.uint16(2)}
        keys = {f"split.{key}": value for key, value in split.items()}
        keys["split.tensors.count"] = np.int32(len(tensors))
        some = tensors[:9] if part == 0 else tensors[9:]
        write_gguf(path, (metadata(2) if part == 0 else {}) | keys, some)
    quantized(capsys, parts[1], tmp_path / "one", "Q5_K_M")
    quantized(capsys, source, tmp_path / "whole", "Q5_K_M")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "whole").read_bytes()
    result = run(capsys, "quantize", parts[0], parts[1], "Q5_K_M", "--force")
    assert result == Result(2, "", f"cpuinfer: {parts[1]}: input and output are the same file\n")


# Importance


def importances(n_layers: int = 2) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(3)
    return {
        name: rng.exponential(size=shape[-1]).astype(np.float32)
        for name, (shape, _) in shapes(n_layers).items()
        if name.startswith("blk") and len(shape) > 1
    }


def write_imatrix(path: Path, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """In GGUF: sums over 8 tokens."""
    tensors: Tensors = []
    for name, found in weights.items():
        tensors.append((f"{name}.in_sum2", T.F32, found[None] * np.float32(8)))
        tensors.append((f"{name}.counts", T.F32, np.full((1, 1), 8, np.float32)))
    keys = {"general.type": "imatrix", "imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 7}
    write_gguf(path, keys, tensors)


def write_old_imatrix(path: Path, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """In the older format: sums over 4 calls."""
    raw = struct.pack("<i", len(weights))
    for name, found in weights.items():
        raw += struct.pack("<i", len(name)) + name.encode()
        raw += struct.pack("<ii", 4, len(found)) + (found * np.float32(4)).tobytes()
    path.write_bytes(raw + struct.pack("<ii", 7, 8) + b"wiki.txt")


@pytest.mark.parametrize("write", [write_imatrix, write_old_imatrix])
def test_importance_of_columns(
    write: Any, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = importances()
    del weights["blk.1.ffn_up.weight"]
    write(tmp_path / "imatrix", weights)
    words = (source, tmp_path / "o", "Q4_K_S", "--imatrix", tmp_path / "imatrix", "--json")
    result = quantized(capsys, *words)
    found = {t["name"] for t in json.loads(result.out)["tensors"] if t["weighted"]}
    assert found == set(weights)
    assert "says nothing of 3 tensors: token_embd.weight, output.weight, blk.1.ffn_up" in result.err
    before, after = open_gguf(source), open_gguf(tmp_path / "o")
    for name, tensor in after.tensors.items():
        x = dequantize(before.tensors[name].data, before.tensors[name].qtype)
        if name in weights:
            want = quantize_weighted(x, weights[name], tensor.qtype)
        else:
            want = quantize(x, tensor.qtype) if tensor.qtype is not T.F32 else tensor.data
        np.testing.assert_array_equal(tensor.data, want)
    assert after.text("quantize.imatrix.file") == "imatrix"
    assert after.text("quantize.imatrix.dataset") == "wiki.txt"
    assert after.uint("quantize.imatrix.entries_count") == len(weights)
    assert after.uint("quantize.imatrix.chunks_count") == 7


def test_each_expert_has_its_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that no token was given to counts all its columns alike."""
    monkeypatch.setattr(requantize, "_STEP", 100 * HIDDEN)  # steps end where an expert does
    tensors: Tensors = []
    for name, (shape, qtype) in shapes(1, n_experts=8).items():
        tensors.append((name, qtype, values(name, shape)))
    write_gguf(tmp_path / "moe", metadata(1) | {"llama.expert_count": 8}, tensors)
    weights = np.random.default_rng(5).exponential(size=(8, HIDDEN)).astype(np.float32)
    counts = np.array([1, 2, 4, 0, 1, 1, 1, 1], np.float32)[:, None]
    name = "blk.0.ffn_down_exps.weight"
    sums: Tensors = [
        (f"{name}.in_sum2", T.F32, weights * counts),
        (f"{name}.counts", T.F32, counts),
    ]
    write_gguf(tmp_path / "imatrix", {}, sums)
    file = open_gguf(tmp_path / "moe")
    importance = read_importance(tmp_path / "imatrix")
    plan = requantize.plan(file, "Q4_0", Wishes(), importance)
    requantize.run(plan, tmp_path / "o", 2, lambda *_: None)
    found = open_gguf(tmp_path / "o").tensors[name]
    x = dequantize(file.tensors[name].data, T.F16).reshape(8, DIM, HIDDEN)
    weights[3] = 1
    for expert, rows in enumerate(found.data.reshape(8, DIM, -1)):
        want = quantize_weighted(x[expert], weights[expert], T.Q4_0)
        np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "entries: 4 bytes needed, 0 left"),
        (struct.pack("<i", 0), "entries: none: not an importance matrix"),
        (struct.pack("<i", -1), "entries: a count of -1"),
        (struct.pack("<ii", 1, 2**31 - 1), "entry: 2147483647 bytes needed, 0 left"),
        (struct.pack("<ii2sii", 1, 2, b"ab", 1, 9), "ab: 36 bytes needed, 0 left"),
        (struct.pack("<ii2siif", 1, 2, b"ab", 1, 1, math.nan), "ab: a weight is negative or no"),
        (struct.pack("<ii2siif", 1, 2, b"ab", 1, 1, -1.0), "ab: a weight is negative or no"),
    ],
)
def test_a_damaged_importance_matrix(
    raw: bytes, reason: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(raw)
    words = (source, tmp_path / "o", "Q4_0", "--imatrix", tmp_path / "bad")
    result = run(capsys, "quantize", *words)
    assert (result.code, result.out) == (65, "") and result.err.count("\n") == 1
    assert f"{tmp_path / 'bad'}: {reason}" in result.err
    assert not (tmp_path / "o").exists()


def test_importances_of_another_model(tmp_path: Path, source: Path) -> None:
    write_imatrix(tmp_path / "i", {"blk.0.attn_q.weight": np.ones(128, np.float32)})
    importance = read_importance(tmp_path / "i")
    with pytest.raises(ModelFormatError, match="attn_q.weight: 128 values, the tensor has 1 x 256"):
        requantize.plan(open_gguf(source), "Q4_0", Wishes(), importance)
    write_gguf(tmp_path / "none", {}, [("a", T.F32, np.ones(3, np.float32))])
    with pytest.raises(ModelFormatError, match="no such tensors: not an importance matrix"):
        read_importance(tmp_path / "none")


# What is refused


def test_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bad, qtype in ((math.nan, T.F16), (-math.inf, T.F32)):
        x = values("q", (DIM, DIM))
        x[200, 7] = bad
        write_model(tmp_path / "m", qtype, 1, attn_q=x)
        result = run(capsys, "quantize", tmp_path / "m", tmp_path / "o", "Q4_K_M")
        assert result.code == 65 and result.out == ""
        where = f"tensor blk.0.attn_q.weight: {bad} in row 200, column 7"
        assert where in result.err and result.err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_weights_too_large_for_a_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = values("q", (DIM, DIM))
    x[3, 3] = 1e9
    write_model(tmp_path / "m", T.BF16, 1, attn_q=x)
    result = run(capsys, "quantize", tmp_path / "m", tmp_path / "o", "Q4_K_M")
    assert result.code == 65
    assert "tensor blk.0.attn_q.weight: Q4_K cannot hold a block whose largest" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_quantizing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m", T.Q8_0, 1)
    words = (tmp_path / "m", tmp_path / "o", "Q4_K_M")
    result = run(capsys, "quantize", *words)
    assert result.code == 2 and "token_embd.weight is Q8_0 already" in result.err
    assert "--allow-requantize" in result.err and not (tmp_path / "o").exists()
    quantized(capsys, *words, "--allow-requantize")
    before, after = (open_gguf(path).tensors for path in words[:2])
    x = dequantize(before["blk.0.attn_q.weight"].data, T.Q8_0)
    got = after["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(got.data, quantize(x, T.Q4_K))
    # To the type that it has: the same bytes, no permission needed
    quantized(capsys, tmp_path / "m", tmp_path / "same", "Q8_0")
    for name, tensor in open_gguf(tmp_path / "same").tensors.items():
        np.testing.assert_array_equal(tensor.data, before[name].data)


@pytest.mark.parametrize("link", ["path", "symbolic", "hard"])
def test_input_and_output_are_one(
    link: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "m", tmp_path / "o"
    write_model(path, n_layers=1)
    raw = path.read_bytes()
    if link == "symbolic":
        out.symlink_to(path)
    elif link == "hard":
        os.link(path, out)
    else:
        out = tmp_path / "." / "m"
    result = run(capsys, "quantize", path, out, "Q4_0", "--force")
    assert result.code == 2 and "input and output are the same file" in result.err
    assert path.read_bytes() == raw


def test_an_output_that_exists(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    out.write_text("precious")
    result = run(capsys, "quantize", source, out, "Q4_0")
    assert result == Result(73, "", f"cpuinfer: {out}: it exists (--force replaces it)\n")
    assert out.read_text() == "precious"
    quantized(capsys, source, out, "Q4_0", "--force")
    assert open_gguf(out).uint("general.file_type") == 2


def test_an_output_that_cannot_be_made(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "no" / "o", tmp_path):
        result = run(capsys, "quantize", source, out, "Q4_0", "--force")
        assert result == Result(73, "", f"cpuinfer: {out}: the file cannot be made\n")


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ("MODEL OUT Q4_K_X", 2, "invalid choice: 'Q4_K_X'"),
        ("MODEL OUT Q4_0 --output-type Q9", 2, "invalid type of a tensor value: 'Q9'"),
        ("MODEL OUT Q4_0 --tensor-type [=Q8_0", 2, "invalid PATTERN=TYPE value: '[=Q8_0'"),
        ("MODEL OUT Q4_0 --tensor-type attn_v", 2, "invalid PATTERN=TYPE value: 'attn_v'"),
        ("MODEL OUT Q4_0 --threads 0", 2, "--threads 0: at least 1"),
        ("MODEL OUT Q4_0 --imatrix missing", 66, "missing: No such file"),
        ("missing OUT Q4_0", 66, "missing: no such file or model"),
        (f"{__file__} OUT Q4_0", 65, "magic"),
    ],
)
def test_wrong_words(
    words: str,
    code: int,
    reason: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": source, "OUT": tmp_path / "o"}
    result = run(capsys, "quantize", *(places.get(word, word) for word in words.split()))
    assert (result.code, result.out) == (code, "") and result.err.count("\n") == 1
    assert reason in result.err
    assert list(tmp_path.iterdir()) == []


def test_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors: Tensors = [("a.weight", T.F32, np.ones((2, 32), np.float32))]
    write_gguf(tmp_path / "m", {"general.architecture": "gpt2"}, tensors)
    result = run(capsys, "quantize", tmp_path / "m", tmp_path / "o", "Q4_0")
    assert result.code == 65 and "gpt2; the mixes of types are known for llama only" in result.err


def interrupted(source: Path, out: Path, sent: signal.Signals) -> tuple[int, bytes]:
    """Exit code and errors of a run that gets a signal while a tensor is worked on."""
    first = (
        "import os, time; from cpuinfer import requantize as r; whole = r._packed\n"
        "def slow(*a): os.write(1, b'.'); time.sleep(0.05); return whole(*a)\n"
        "r._packed, r._STEP = slow, 256\n"
    )
    script = f"{first}\nimport sys; from cpuinfer.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "quantize", source, out, "Q8_0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(3)
        assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing(
    sent: signal.Signals, code: int, source: Path, tmp_path: Path
) -> None:
    assert interrupted(source, tmp_path / "o", sent) == (code, b"")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_goes_with_the_next(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = interrupted(source, tmp_path / "o", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".o.partial"]
    assert run(capsys, "quantize", source, tmp_path / "o", "Q8_0").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    first = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100000, 100000))"
    first += "\nimport signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    result = child("quantize", source, tmp_path / "o", "Q8_0", first=first)
    assert result.returncode == 74 and result.stderr.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_the_bytes_read(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    file = open_gguf(source)
    total = sum(tensor.data.nbytes for tensor in file.tensors.values())
    threads = threading.active_count()
    plan = requantize.plan(file, "Q4_0", Wishes())
    requantize.run(plan, tmp_path / "o", 2, lambda *report: seen.append(report))
    assert seen[0] == ("quantize", 0, total) and seen[-1] == ("quantize", total, total)
    assert seen == sorted(seen)
    assert threading.active_count() == threads


# llama.cpp's own program, where it is installed


@pytest.fixture(scope="module")
def llama() -> Iterator[ModuleType]:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    yield llama_cpp
    llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))


def by_llama(llama: ModuleType, source: Path, out: Path, mix: str, **params: Any) -> None:
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = MIXES[mix].file_type, 2
    for name, value in params.items():
        setattr(options, name, value)
    code = llama.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(options))
    assert code == 0


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = open_gguf(one), open_gguf(other)
    kinds = [{name: t.qtype for name, t in file.tensors.items()} for file in (ours, theirs)]
    assert kinds[0] == kinds[1]
    for name, tensor in theirs.tensors.items():
        np.testing.assert_array_equal(ours.tensors[name].data, tensor.data, err_msg=name)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 layers, four heads to one of k and v, as Mistral 7B."""
    path = tmp_path_factory.mktemp("deep") / "deep.gguf"
    write_model(path, n_layers=32)
    return path


@pytest.mark.parametrize("mix", MIXES)
def test_files_equal_llama_quantize(
    llama: ModuleType, mix: str, deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized(capsys, deep, tmp_path / "ours", mix)
    by_llama(llama, deep, tmp_path / "theirs", mix)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    ours, theirs = (open_gguf(tmp_path / name).metadata for name in ("ours", "theirs"))
    for key in ("general.file_type", "general.quantization_version"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("words", "params"),
    [
        ("--pure", {"pure": True}),
        ("--output-type Q5_K", {"output_tensor_type": 13}),
        ("--token-embedding-type Q8_0", {"token_embedding_type": 8}),
    ],
)
def test_options_equal_llama_quantize(
    llama: ModuleType,
    words: str,
    params: dict[str, Any],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quantized(capsys, source, tmp_path / "ours", "Q3_K_M", *words.split())
    by_llama(llama, source, tmp_path / "theirs", "Q3_K_M", **params)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("mix", ["Q4_0", "Q5_1", "Q2_K", "Q3_K_L", "Q4_K_M", "Q8_0"])
def test_importance_equals_llama_quantize(
    llama: ModuleType, mix: str, deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = importances(32)
    write_imatrix(tmp_path / "imatrix", weights)
    kind, floats = llama.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
    entries = [
        kind(name.encode(), found.ctypes.data_as(floats), len(found))
        for name, found in weights.items()
    ]
    array = (kind * (len(entries) + 1))(*entries)
    quantized(capsys, deep, tmp_path / "ours", mix, "--imatrix", tmp_path / "imatrix")
    by_llama(llama, deep, tmp_path / "theirs", mix, imatrix=array)
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
