"""tools/convert.py and the rooms under it: checkpoints in Hugging Face form to GGUF."""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from quant.checkpoint import StoredTensor

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "tiny-1024.model"  # 1,024 pieces

_spec = importlib.util.spec_from_file_location("convert", ROOT / "tools" / "convert.py")
assert _spec and _spec.loader
convert = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(convert)

# A checkpoint of every oddity: head_dim is not dim / heads, the embedding has more rows than the
# vocabulary has pieces, and rows of 80 values fit no block of 32.
DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 80, 4, 2, 32, 1030
CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "sliding_window": 16,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER = {
    "input_layernorm": (DIM,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, DIM),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, DIM),
    "self_attn.o_proj": (DIM, HEADS * HEAD_DIM),
    "post_attention_layernorm": (DIM,),
    "mlp.gate_proj": (HIDDEN, DIM),
    "mlp.up_proj": (HIDDEN, DIM),
    "mlp.down_proj": (DIM, HIDDEN),
}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Weights = dict[str, NDArray[np.float32]]


def random_weights() -> Weights:
    """By name; exact in bfloat16 and in half, so that the stored type does not matter."""
    shapes = {"model.embed_tokens": (VOCAB, DIM), "model.norm": (DIM,)}
    shapes |= {f"model.layers.{i}.{name}": s for i in range(2) for name, s in LAYER.items()}
    rng = np.random.default_rng(0)
    return {f"{n}.weight": (rng.integers(-64, 65, s) / 256).astype("f4") for n, s in shapes.items()}


def safetensors_bytes(weights: Weights, dtype: str = "F32") -> bytes:
    """A safetensors file, from its description: header length, JSON header, data."""
    header, data = {}, b""
    for name, x in weights.items():
        raw = x.tobytes()
        if dtype == "F16":
            raw = x.astype("<f2").tobytes()
        elif dtype == "BF16":
            raw = (x.view("<u4") >> 16).astype("<u2").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; Ellipsis as a value removes one."""
    values = json.loads(path.read_text()) | changes
    write_json(path, {key: value for key, value in values.items() if value is not ...})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint in one file, F32."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    write_json(directory / "config.json", CONFIG)
    (directory / "model.safetensors").write_bytes(safetensors_bytes(random_weights()))
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    return directory


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same in two files with an index, BF16 and F16."""
    (checkpoint / "model.safetensors").unlink()
    weights = random_weights()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:9]}
    shards["model-00002-of-00002.safetensors"] = names[9:]
    for (file, members), dtype in zip(shards.items(), ("BF16", "F16"), strict=True):
        part = {name: weights[name] for name in members}
        (checkpoint / file).write_bytes(safetensors_bytes(part, dtype))
    places = {name: file for file, members in shards.items() for name in members}
    write_json(checkpoint / "model.safetensors.index.json", {"weight_map": places})
    return checkpoint


def run(source: Path, output: Path, *options: str) -> gguf.GGUFReader:
    assert convert.main([str(source), str(output), *options]) == 0
    return gguf.GGUFReader(output)


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Every key but the reader's own three, as Python values."""
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    return {key: reader.fields[key].contents() for key in keys}


def gguf_name(name: str) -> str:
    plain = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in plain:
        return plain[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_LAYER[rest.removesuffix('.weight')]}.weight"


def gguf_rows(name: str, x: np.ndarray, head_dim: int) -> np.ndarray:
    """q and k row by row from halves to adjacent pairs: row i of a head's first half goes to
    2i, of its second half to 2i + 1. Others as they are."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return x
    rows = np.empty_like(x)
    half = head_dim // 2
    for head in range(len(x) // head_dim):
        for i in range(half):
            rows[head * head_dim + 2 * i] = x[head * head_dim + i]
            rows[head * head_dim + 2 * i + 1] = x[head * head_dim + half + i]
    return rows


def read_safetensors(path: Path) -> Weights:
    """The BF16 weights of a file, by its description."""
    raw = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", raw)[0]
    weights = {}
    for name, info in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16"
        begin, end = info["data_offsets"]
        bits = np.frombuffer(raw[start + begin : start + end], "<u2").astype("<u4") << 16
        weights[name] = bits.view("<f4").reshape(info["shape"])
    return weights


def assert_same_tensors(
    reader: gguf.GGUFReader, source: Weights, head_dim: int, qtype: str, fallback: str = "F16"
) -> None:
    """Every tensor of the source and no other, bit for bit what gguf-py makes of its values."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {gguf_name(name) for name in source}
    for name, x in source.items():
        tensor = tensors[gguf_name(name)]
        kind = gguf.GGMLQuantizationType[qtype]
        if x.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif x.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType[fallback]
        assert tensor.tensor_type == kind, name
        assert tensor.shape.tolist() == list(x.shape[::-1]), name
        want = gguf.quants.quantize(gguf_rows(name, x, head_dim), kind)
        np.testing.assert_array_equal(tensor.data.view("u1"), want.view("u1"), err_msg=name)


@pytest.mark.parametrize("qtype", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize(("model", "head_dim"), [("mistral-window", 32), ("mistral-full", 64)])
def test_tensors_of_real_checkpoints(tmp_path: Path, model: str, head_dim: int, qtype: str) -> None:
    source = SHARED / "hf" / model
    if not source.is_dir():
        pytest.skip("shared/data/hf is not here")
    reader = run(source, tmp_path / "m.gguf", "--type", qtype)
    weights = read_safetensors(source / "model.safetensors")
    assert_same_tensors(reader, weights, head_dim, qtype)


VOCAB_KEYS = ("tokens", "scores", "token_type")


@pytest.mark.parametrize("model", ["mistral-window", "mistral-full"])
def test_metadata_of_real_checkpoints(tmp_path: Path, model: str) -> None:
    source = SHARED / "hf" / model
    if not source.is_dir():
        pytest.skip("shared/data/hf is not here")
    reader = run(source, tmp_path / "m.gguf", "--type", "BF16")
    found = metadata(reader)
    vocab = {key: found.pop(f"tokenizer.ggml.{key}") for key in VOCAB_KEYS}
    window = model == "mistral-window"
    head_dim = 32 if window else 64
    want = {
        "general.architecture": "llama",
        "general.name": model,
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 1024,
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.block_count": 3 if window else 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": 1e4 if window else 1e6,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    if window:
        want["llama.attention.sliding_window"] = 24
    assert found == want
    assert_is_the_tiny_vocabulary(vocab)
    types = {key: reader.fields[f"tokenizer.ggml.{key}"].types[-1].name for key in VOCAB_KEYS}
    assert types == {"tokens": "STRING", "scores": "FLOAT32", "token_type": "INT32"}


def assert_is_the_tiny_vocabulary(vocab: dict[str, list[Any]]) -> None:
    """The pieces of tiny-1024.model: three special ones, 256 bytes, then merges by rank."""
    tokens, scores, types = (vocab[key][:1024] for key in VOCAB_KEYS)
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[258] == "<0xFF>"
    assert types[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert types[3:259] == [gguf.TokenType.BYTE] * 256
    assert set(types[259:]) == {gguf.TokenType.NORMAL}
    assert scores[:259] == [0.0] * 259
    assert scores[259:] == [-float(i) for i in range(len(scores) - 259)]


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type(checkpoint: Path, capfd: pytest.CaptureFixture[str], qtype: str) -> None:
    """Rows of 80 values (ffn_down) fall back to F16, and the tool says so."""
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", qtype)
    assert_same_tensors(reader, random_weights(), HEAD_DIM, qtype)
    captured = capfd.readouterr()
    assert captured.out == ""
    if qtype.startswith("Q"):
        assert captured.err == (
            f"stored as F16, because {qtype} wants rows that are multiples of 32: "
            "blk.0.ffn_down.weight, blk.1.ffn_down.weight\n"
        )
    else:
        assert captured.err == ""
    names = {"F32": "ALL_F32"}
    file_type = gguf.LlamaFileType[names.get(qtype, f"MOSTLY_{qtype}")]
    assert metadata(reader)["general.file_type"] == file_type


def test_shards_of_bf16_and_f16(sharded: Path) -> None:
    reader = run(sharded, sharded.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, random_weights(), HEAD_DIM, "F32")


def test_two_runs_write_the_same_bytes(sharded: Path) -> None:
    for name in ("a", "b"):
        run(sharded, sharded.parent / name, "--type", "Q4_0")
    assert (sharded.parent / "a").read_bytes() == (sharded.parent / "b").read_bytes()


def test_tied_embedding_ignores_a_copy(checkpoint: Path) -> None:
    """lm_head.weight beside tie_word_embeddings, and old rotary buffers, are no weights."""
    weights = random_weights()
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes(weights | extra))
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, weights, HEAD_DIM, "F32")


def test_separate_output(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    weights = random_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes(weights))
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, weights, HEAD_DIM, "F32")


def test_embedding_longer_than_the_vocabulary(checkpoint: Path) -> None:
    """Added tokens by their id, ids without a name as unused ones."""
    tokens = {"1024": {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>"}}
    write_json(checkpoint / "tokenizer_config.json", {"added_tokens_decoder": tokens})
    write_json(checkpoint / "added_tokens.json", {"<think>": 1026})
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    vocab = {key: found[f"tokenizer.ggml.{key}"] for key in VOCAB_KEYS}
    assert_is_the_tiny_vocabulary(vocab)
    assert vocab["tokens"][1024:] == [
        "<|im_end|>",
        "[PAD1025]",
        "<think>",
        "[PAD1027]",
        "[PAD1028]",
        "[PAD1029]",
    ]
    unused, control = gguf.TokenType.UNUSED, gguf.TokenType.CONTROL
    user = gguf.TokenType.USER_DEFINED
    assert vocab["token_type"][1024:] == [control, unused, user, unused, unused, unused]
    assert len(vocab["scores"]) == VOCAB


def key_of(checkpoint: Path, key: str, **config: Any) -> Any:
    """What a changed config.json writes under a key; None when the key is absent."""
    edit_json(checkpoint / "config.json", **config)
    return metadata(run(checkpoint, checkpoint.parent / "m.gguf", "--force")).get(key)


def test_rope_theta_old_and_new(checkpoint: Path) -> None:
    key = "llama.rope.freq_base"
    assert key_of(checkpoint, key) == 500000.0
    assert key_of(checkpoint, key, rope_parameters={"rope_theta": 2e4}, rope_theta=...) == 2e4
    assert key_of(checkpoint, key, rope_parameters={"rope_type": "default"}) == 1e4
    assert key_of(checkpoint, key, rope_parameters=..., rope_scaling=None) == 1e4


def test_sliding_window(checkpoint: Path) -> None:
    key = "llama.attention.sliding_window"
    assert key_of(checkpoint, key) == 16
    assert key_of(checkpoint, key, sliding_window=None) is None
    assert key_of(checkpoint, key, sliding_window=...) is None


def test_ids_that_end_a_text(checkpoint: Path) -> None:
    """The union of both files, in GGUF's three roles and as a list."""
    write_json(
        checkpoint / "generation_config.json", {"eos_token_id": [7, 2, 9], "bos_token_id": 5}
    )
    edit_json(checkpoint / "config.json", eos_token_id=2, bos_token_id=None)
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom")}
    assert ids == {"bos": 5, "eos": 2, "eot": 7, "eom": 9}
    assert found["tokenizer.ggml.eos_token_ids"] == [2, 7, 9]


def test_tokenizer_settings_and_template(checkpoint: Path) -> None:
    settings = {"add_bos_token": False, "add_eos_token": True, "add_prefix_space": False}
    template = "{{ bos_token }}{% for m in messages %}…\n{% endfor %}"
    write_json(checkpoint / "tokenizer_config.json", settings | {"chat_template": template})
    found = metadata(run(checkpoint, checkpoint.parent / "a.gguf"))
    assert found["tokenizer.chat_template"] == template
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is False

    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": named})
    found = metadata(run(checkpoint, checkpoint.parent / "b.gguf"))
    assert found["tokenizer.chat_template"] == "A"
    assert found["tokenizer.chat_template.tool_use"] == "B"

    (checkpoint / "chat_template.jinja").write_text("C")
    found = metadata(run(checkpoint, checkpoint.parent / "c.gguf"))
    assert found["tokenizer.chat_template"] == "C"


def test_checkpoint_in_a_hugging_face_cache(checkpoint: Path) -> None:
    """There, files are links from snapshots/REVISION to blobs."""
    cache = checkpoint.parent / "models--tiny"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = cache / "blobs" / f"hash-of-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    reader = run(snapshot, checkpoint.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, random_weights(), HEAD_DIM, "F32")


def config_fault(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", **changes)


def weights_fault(change: Callable[[Weights], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        weights = random_weights()
        change(weights)
        (directory / "model.safetensors").write_bytes(safetensors_bytes(weights))

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
    "config layers": (config_fault(num_hidden_layers=2**30), "more than there are tensors"),
    "config vocabulary": (config_fault(vocab_size=2**30), "embed_tokens.weight: shape (1030, 64)"),
    "config eps": (config_fault(rms_norm_eps=float("nan")), "rms_norm_eps: wanted a number above"),
    "config code": (config_fault(auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "config act": (config_fault(hidden_act="gelu"), "hidden_act: gelu, wanted silu"),
    "config arch": (config_fault(model_type="qwen2"), "model_type: qwen2"),
    "config rope": (config_fault(rope_scaling={"rope_type": "llama3"}), "rope type llama3"),
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
        "model.layers.1.mlp.up_proj.weight: not a finite number at [7, 3]",
    ),
    "tensor type": (
        header_fault(lambda h: h[NORM].update(dtype="I32")),
        f"{NORM}: type I32, only F32, F16, BF16",
    ),
    "overlap": (
        header_fault(lambda h: h[NORM].update(data_offsets=[0, 256])),
        "safetensors header: ",
    ),
    "duplicate": (
        bytes_fault("model.safetensors", duplicate_key),
        "model.safetensors: JSON: two keys",
    ),
    "shape and size": (header_fault(lambda h: h[NORM].update(shape=[65])), "safetensors header: "),
    "cut": (bytes_fault("model.safetensors", lambda b: b[:-1]), "safetensors header: "),
    "tail": (bytes_fault("model.safetensors", lambda b: b + b"x"), "safetensors header: "),
    "empty": (bytes_fault("model.safetensors", lambda b: b""), "safetensors header: "),
    "header size": (
        bytes_fault("model.safetensors", lambda b: b"\xff" * 7 + b"\x7f" + b[8:]),
        "safetensors header: ",
    ),
    "not JSON": (
        bytes_fault("model.safetensors", lambda b: b[:8] + b"\xff" + b[9:]),
        "safetensors header: ",
    ),
    "renamed pickle": (bytes_fault("model.safetensors", lambda b: b"\x80\x04."), "safetensors hea"),
    "pickle": (swap_for_pickle, "read from safetensors only"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
    "tokenizer long": (few_rows, "tokenizer.model: pieces: 1024, more than the 1000 embeddings"),
    "tokenizer cut": (bytes_fault("tokenizer.model", lambda b: b[:-9]), "not a SentencePiece"),
    "template": (text_fault("tokenizer_config.json", '{"chat_template": 3}'), "wanted a string"),
    "added id": (text_fault("added_tokens.json", '{"<x>": -1}'), "added_tokens.json: <x>"),
}


def assert_refused(
    source: Path, capfd: pytest.CaptureFixture[str], reason: str, code: int = 65
) -> None:
    """Exit code, one line with the reason, and no file beside the checkpoint."""
    before = sorted(source.parent.rglob("*"))
    assert convert.main([str(source), str(source.parent / "out.gguf"), "--type", "F32"]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("convert: ")
    assert captured.err.count("\n") == 1
    assert reason in captured.err
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoint(checkpoint: Path, capfd: pytest.CaptureFixture[str], fault: str) -> None:
    damage, reason = FAULTS[fault]
    damage(checkpoint)
    assert_refused(checkpoint, capfd, reason)


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


def test_interruption_leaves_nothing(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = StoredTensor.read

    def read(self: StoredTensor) -> NDArray[np.float32]:
        if self.name == NORM:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(StoredTensor, "read", read)
    assert_refused(checkpoint, capfd, "interrupted", code=130)


def test_no_such_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(tmp_path / "nowhere", capfd, "nowhere: no such directory", code=66)


def test_existing_output_wants_force(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = checkpoint.parent / "out.gguf"
    output.write_bytes(b"mine")
    assert_refused(checkpoint, capfd, "exists (--force replaces it)", code=73)
    assert output.read_bytes() == b"mine"
    run(checkpoint, output, "--force")


@pytest.mark.parametrize("place", ["missing/m.gguf", "tiny/config.json/m.gguf", "tiny"])
def test_output_that_cannot_be_made(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    assert convert.main([str(checkpoint), str(checkpoint.parent / place), "--force"]) == 73
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_output_is_never_an_input(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], link: Callable[..., None] | None
) -> None:
    weights = checkpoint / "model.safetensors"
    output = weights if link is None else checkpoint.parent / "link.gguf"
    if link is not None:
        link(weights, output)
    before = weights.read_bytes()
    assert convert.main([str(checkpoint), str(output), "--force"]) == 2
    assert "a file of the checkpoint itself" in capfd.readouterr().err
    assert weights.read_bytes() == before


def test_as_a_program(checkpoint: Path) -> None:
    """From another directory, without the repository on the path of modules."""
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), "tiny", "m.gguf"]
    here = checkpoint.parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert metadata(gguf.GGUFReader(here / "m.gguf"))["general.name"] == "tiny"
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        73,
        "convert: m.gguf: exists (--force replaces it)\n",
    )
