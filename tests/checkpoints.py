"""Small checkpoints in both forms, written by the descriptions of their files alone."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from cpuinfer import cli
from cpuinfer.gguf import open_gguf
from cpuinfer.tokenizer.spm import Vocabulary, model_proto
from quant import dequantize

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "tiny-1024.model"  # 1,024 pieces

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


MISTRAL_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
PARAMS: dict[str, Any] = {
    "dim": DIM,
    "hidden_dim": HIDDEN,
    "n_layers": 2,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "sliding_window": 16,
    "vocab_size": VOCAB,
}


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


def write_checkpoint(parent: Path) -> Path:
    """A whole checkpoint in one file, F32: the directory `tiny`."""
    directory = parent / "tiny"
    directory.mkdir(parents=True)
    write_json(directory / "config.json", CONFIG)
    (directory / "model.safetensors").write_bytes(safetensors_bytes(random_weights()))
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    return directory


def write_shards(checkpoint: Path) -> Path:
    """The same weights in two files with an index, BF16 and F16."""
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


def run(source: Path, output: Path, *options: str) -> gguf.GGUFReader:
    """A conversion that succeeds, without verification: the file as gguf-py reads it."""
    assert cli.main(["convert", str(source), str(output), "--no-verify", *options]) == 0
    return gguf.GGUFReader(output)


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Every key but the reader's own three, as Python values."""
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    return {key: reader.fields[key].contents() for key in keys}


def outcome(
    capfd: pytest.CaptureFixture[str], source: Path, output: Path, *options: str
) -> tuple[int, str]:
    """Exit code and the one line on standard error of a conversion that fails, or tries to."""
    code = cli.main(["convert", str(source), str(output), *options])
    captured = capfd.readouterr()
    assert captured.out == ""
    return code, captured.err


VOCAB_KEYS = ("tokens", "scores", "token_type")


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


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_pairs() -> dict[str, Any]:
    """tokenizer.json of Llama 3's kind, with three merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(68)]
    texts = [*alphabet, "he", "ll", "hell"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = "<|begin_of_text|>"
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "model": {
            "type": "BPE",
            "vocab": {text: id for id, text in enumerate(texts)},
            "merges": ["h e", "l l", "he ll"],
            "ignore_merges": True,
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA_3},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {**byte_level, "use_regex": True},
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": bos, "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                    "special_tokens": {bos: {"id": bos, "ids": [259], "tokens": [bos]}},
                },
            ],
        },
        "added_tokens": [
            {"id": 259, "content": bos, "special": True, **plain},
            {"id": 260, "content": "<tool>", "special": False, **plain},
        ],
    }


def assert_refused(
    source: Path, capfd: pytest.CaptureFixture[str], reason: str, code: int = 65, *options: str
) -> None:
    """Exit code, one line with the reason, and no file beside the checkpoint."""
    before = sorted(source.parent.rglob("*"))
    found, error = outcome(capfd, source, source.parent / "out.gguf", "--type", "F32", *options)
    lines = [line for line in error.splitlines() if "has no chat template" not in line]
    assert (found, len(lines)) == (code, 1), error
    assert lines[0].startswith("cpuinfer: ")
    assert reason in lines[0]
    assert sorted(source.parent.rglob("*")) == before


def as_checkpoint(path: Path, directory: Path) -> Path:
    """A model file of the family, taken apart to a checkpoint in Hugging Face's form."""
    file = open_gguf(path)
    directory.mkdir()
    n_layers = file.uint("llama.block_count")
    theirs = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    theirs += [f"model.layers.{i}.{name}.weight" for i in range(n_layers) for name in LAYER]
    names = {gguf_name(name): name for name in theirs}
    n_heads, dim = file.uint("llama.attention.head_count"), file.uint("llama.embedding_length")
    weights = {}
    for name, tensor in file.tensors.items():
        values = dequantize(tensor.data, tensor.qtype).reshape(tensor.shape)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = values.reshape(-1, dim // n_heads // 2, 2, dim)
            values = pairs.swapaxes(1, 2).reshape(tensor.shape)
        weights[names[name]] = np.ascontiguousarray(values)
    (directory / "model.safetensors").write_bytes(safetensors_bytes(weights))
    (directory / "tokenizer.model").write_bytes(model_proto(Vocabulary.from_gguf(file)))
    texts = {"1": "<s>", "2": "</s>"}
    special = {id: {"content": text, "special": True} for id, text in texts.items()}
    settings = {"added_tokens_decoder": special, "add_prefix_space": True}
    write_json(directory / "tokenizer_config.json", settings)
    config = {
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": file.uint("llama.feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": file.uint("llama.attention.head_count_kv"),
        "rms_norm_eps": file.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": file.uint("llama.context_length"),
        "sliding_window": file.uint("llama.attention.sliding_window", None),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_json(directory / "config.json", config)
    return directory
