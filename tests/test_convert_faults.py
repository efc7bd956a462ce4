"""`cpuinfer convert`: checkpoints that are refused, each with a reason of its own."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    Weights,
    assert_refused,
    edit_json,
    random_weights,
    safetensors_bytes,
    write_checkpoint,
    write_json,
    write_shards,
)

from quant.safetensors_file import read_safetensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_shards(write_checkpoint(tmp_path))


def config_fault(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", **changes)


def weights_fault(change: Callable[[Weights], Any], hole: int = 0) -> Callable[[Path], None]:
    """The file of other weights, with `hole` bytes of nothing ahead of the norm."""

    def apply(directory: Path) -> None:
        weights = random_weights()
        change(weights)
        raw = safetensors_bytes(weights)
        if hole:
            size = struct.unpack_from("<Q", raw)[0]
            header = json.loads(raw[8 : 8 + size])
            begin, end = header[NORM]["data_offsets"]
            header[NORM]["data_offsets"] = [begin + hole, end + hole]
            after = [
                e for e in header.values() if e["data_offsets"][0] >= end and e is not header[NORM]
            ]
            for entry in after:
                entry["data_offsets"] = [place + hole for place in entry["data_offsets"]]
            text, data = json.dumps(header).encode(), raw[8 + size :]
            raw = struct.pack("<Q", len(text)) + text + data[:begin] + bytes(hole) + data[begin:]
        (directory / "model.safetensors").write_bytes(raw)

    return apply


def bytes_fault(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def text_fault(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text) and None


def header_fault(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(raw: bytes) -> bytes:
        size = struct.unpack_from("<Q", raw)[0]
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + size :]

    return bytes_fault("model.safetensors", changed)


def swap_for_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def duplicate_key(raw: bytes) -> bytes:
    size = struct.unpack_from("<Q", raw)[0]
    text = raw[8 : 8 + size]
    entry = text[1 : text.index(b"}") + 1]
    text = b"{" + entry + b"," + text[1:]
    return struct.pack("<Q", len(text)) + text + raw[8 + size :]


def few_rows(directory: Path) -> None:
    """An embedding that is shorter than the vocabulary."""
    name = "model.embed_tokens.weight"
    edit_json(directory / "config.json", vocab_size=1000)
    weights_fault(lambda w: w.update({name: w[name][:1000].copy()}))(directory)


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config key": (config_fault(hidden_size=...), "config.json: hidden_size: missing"),
    "config text": (config_fault(hidden_size="64"), "hidden_size: wanted a whole number"),
    "config bool": (config_fault(num_hidden_layers=True), "num_hidden_layers: wanted a whole"),
    "config zero": (config_fault(num_attention_heads=0), "num_attention_heads: wanted a whole"),
    "config heads": (config_fault(num_key_value_heads=3), "3 does not divide 4 heads"),
    "config odd head": (config_fault(head_dim=33), "head_dim: 33 is odd"),
    "config layers": (config_fault(num_hidden_layers=2**30), "1073741824 layers, more than there"),
    "config vocabulary": (config_fault(vocab_size=2**30), "embed_tokens.weight: shape (1030, 64)"),
    "config eps": (config_fault(rms_norm_eps=float("nan")), "rms_norm_eps: wanted a number above"),
    "config code": (config_fault(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "config act": (config_fault(hidden_act="gelu"), "hidden_act: gelu, wanted silu"),
    "config arch": (config_fault(model_type="qwen2"), "model_type: qwen2"),
    "config rope": (config_fault(rope_scaling={"rope_type": "yarn"}), "rope type yarn is not"),
    "config quantized": (config_fault(quantization_config={"bits": 4}), "quantized already"),
    "config scaling": (config_fault(rope_scaling={"rope_type": "linear"}), "factor: missing"),
    "config theta": (config_fault(rope_theta="1e4"), "rope_theta: wanted a number above 0"),
    "config eos": (config_fault(eos_token_id=1030), "eos_token_id: 1030 is no token"),
    "config control": (config_fault(model_type="a\n\x1b[2J"), "model_type: a\\n\\x1b[2J"),
    "config list": (text_fault("config.json", "[]"), "config.json: JSON: not an object"),
    "config cut": (text_fault("config.json", '{"hidden'), "config.json: JSON: "),
    "config deep": (text_fault("config.json", "[" * 10**6), "config.json: JSON: "),
    "tensor missing": (weights_fault(lambda w: w.pop(NORM)), f"{NORM}: no such tensor"),
    "tensor extra": (
        weights_fault(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": w[NORM]})),
        "q_proj.bias: no such tensor in a Llama",
    ),
    "tensor shape": (
        weights_fault(lambda w: w.update({NORM: w[NORM][1:].copy()})),
        f"{NORM}: shape (63,), not (64,)",
    ),
    "tensor nan": (
        weights_fault(lambda w: w["model.layers.1.mlp.up_proj.weight"].__setitem__((7, 3), np.nan)),
        "model.layers.1.mlp.up_proj.weight: nan in row 7, column 3",
    ),
    "tensor type": (
        header_fault(lambda h: h[NORM].update(dtype="I32")),
        f"{NORM}: type I32, only F32, F16, BF16",
    ),
    "tensor of experts": (config_fault(model_type="mixtral"), "num_local_experts: missing"),
    "overlap": (
        header_fault(lambda h: h[NORM].update(data_offsets=[0, 256])),
        "overlaps the tensor before it",
    ),
    "hole": (
        weights_fault(lambda w: w, hole=32),
        "model.norm.weight: has a hole before",
    ),
    "offsets": (
        header_fault(lambda h: h[NORM].update(data_offsets=[0])),
        f"{NORM}: data_offsets [0], wanted begin and end",
    ),
    "entry": (header_fault(lambda h: h.update({NORM: 7})), f"{NORM}: type None, only F32"),
    "shape negative": (
        header_fault(lambda h: h[NORM].update(shape=[-64])),
        f"{NORM}: shape [-64], wanted sizes above 0",
    ),
    "shape too large": (
        header_fault(lambda h: h[NORM].update(shape=[2**62, 2**62])),
        f"{NORM}: 256 bytes, but F32 of shape",
    ),
    "shape of text": (header_fault(lambda h: h[NORM].update(shape="64")), "shape 64, wanted"),
    "duplicate": (
        bytes_fault("model.safetensors", duplicate_key),
        "model.safetensors: JSON: two keys",
    ),
    "shape and size": (
        header_fault(lambda h: h[NORM].update(shape=[65])),
        f"{NORM}: 256 bytes, but F32 of shape (65,) has 260",
    ),
    "cut": (bytes_fault("model.safetensors", lambda b: b[:-1]), "size: too short: "),
    "tail": (bytes_fault("model.safetensors", lambda b: b + b"x"), "size: too long: "),
    "empty": (bytes_fault("model.safetensors", lambda b: b""), "the file ends after 0 bytes"),
    "header of 2**63": (
        bytes_fault("model.safetensors", lambda b: struct.pack("<Q", 2**63) + b[8:]),
        "header: 9223372036854775808 bytes, at most 100000000",
    ),
    "header of 101 MB": (
        bytes_fault("model.safetensors", lambda b: struct.pack("<Q", 101_000_000) + b[8:]),
        "header: 101000000 bytes, at most",
    ),
    "header behind the end": (
        bytes_fault("model.safetensors", lambda b: struct.pack("<Q", len(b)) + b[8:]),
        "bytes, the file has",
    ),
    "header deep": (
        bytes_fault("model.safetensors", lambda b: struct.pack("<Q", 10**6) + b"[" * 10**6),
        "model.safetensors: JSON: ",
    ),
    "not JSON": (
        bytes_fault("model.safetensors", lambda b: b[:8] + b"\xff" + b[9:]),
        "model.safetensors: JSON: ",
    ),
    "renamed pickle": (
        bytes_fault("model.safetensors", lambda b: b"\x80\x04."),
        "ends after 3 bytes",
    ),
    "pickle": (swap_for_pickle, "read from safetensors only"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
    "tokenizer long": (few_rows, "tokenizer.model: pieces: 1024, more than the 1000 embeddings"),
    "tokenizer cut": (bytes_fault("tokenizer.model", lambda b: b[:-9]), "not a SentencePiece"),
    "template bytes": (
        lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template.jinja: text: not UTF-8",
    ),
    "template": (text_fault("tokenizer_config.json", '{"chat_template": 3}'), "wanted a string"),
    "added id": (text_fault("added_tokens.json", '{"<x>": -1}'), "added_tokens.json: <x>"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoint(checkpoint: Path, capfd: pytest.CaptureFixture[str], fault: str) -> None:
    damage, reason = FAULTS[fault]
    damage(checkpoint)
    assert_refused(checkpoint, capfd, reason)


def test_files_of_the_safetensors_library(tmp_path: Path) -> None:
    """Which keeps tensors in an order of its own, and metadata in front."""
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.standard_normal((3, 4), np.float32),
        "a": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "c": rng.standard_normal(5, np.float32),
    }
    safetensors.numpy.save_file(arrays, path, {"format": "np"})
    found = {tensor.name: tensor for tensor in read_safetensors(path)}
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    np.testing.assert_array_equal(found["a"].rows(1, 5), arrays["a"].reshape(6, 4)[1:5])
    np.testing.assert_array_equal(found["b"].rows(2, 3), arrays["b"][2:3])
    np.testing.assert_array_equal(found["c"].rows(0, 1), arrays["c"][None])


@pytest.mark.parametrize(
    "fault",
    [
        *("overlap", "hole", "offsets", "entry", "shape negative", "shape too large"),
        *("shape of text", "shape and size", "cut", "tail", "empty", "header of 2**63"),
        *("header of 101 MB", "header behind the end", "header deep", "not JSON"),
    ],
)
def test_the_safetensors_library_refuses_the_same(checkpoint: Path, fault: str) -> None:
    damage, _ = FAULTS[fault]
    damage(checkpoint)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(checkpoint / "model.safetensors")


INDEX_FAULTS = {
    "missing shard": ("model-00003-of-00003.safetensors", "no such file"),
    "path": ("../model.safetensors", "not the plain name of a file"),
    "absolute path": ("/etc/passwd", "not the plain name of a file"),
    "number": (3, "wanted a file name"),
    "another shard": (
        "model-00002-of-00002.safetensors",
        "00002.safetensors: model.embed_tokens.weight: no such tensor",
    ),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_bad_index(sharded: Path, capfd: pytest.CaptureFixture[str], fault: str) -> None:
    shard, reason = INDEX_FAULTS[fault]
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert index["weight_map"]["model.embed_tokens.weight"] != shard
    index["weight_map"]["model.embed_tokens.weight"] = shard
    write_json(path, index)
    assert_refused(sharded, capfd, reason)


def test_link_out_of_the_directory(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "elsewhere")
    (checkpoint / "model.safetensors").symlink_to(checkpoint.parent / "elsewhere")
    assert_refused(checkpoint, capfd, "leads out of the directory")


def test_pickles_are_never_opened(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One that would leave a mark when it is loaded, under every name weights come in."""
    mark = checkpoint.parent / "mark"
    payload = b"cos\nsystem\n(S'touch " + bytes(mark) + b"'\ntR."
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.npz"):
        (checkpoint / name).write_bytes(payload)
    (checkpoint / "model.safetensors").write_bytes(payload)
    assert_refused(checkpoint, capfd, "model.safetensors: header: ")
    assert not mark.exists()


def test_code_of_a_checkpoint_is_never_run(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = checkpoint.parent / "mark"
    (checkpoint / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_json(checkpoint / "config.json", auto_map={"AutoModel": "modeling_x.X"})
    assert_refused(checkpoint, capfd, "brings its own code, which is not run")
    assert not mark.exists()
