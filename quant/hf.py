"""A Llama or Mistral checkpoint -> the metadata and tensors of a GGUF file of architecture `llama`.

metadata, tensors = llama_gguf(Checkpoint(directory), qtype)
write_gguf(path, metadata, tensors)
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.checkpoint import Checkpoint, CheckpointError, Settings, StoredTensor
from quant.ggml_types import GGMLType
from quant.gguf_writer import Tensor
from quant.vocab import CONTROL, USER_DEFINED, sentencepiece_metadata

MODEL_TYPES = ("llama", "mistral")

# llama_ftype of llama.h: what most weights of a file are
FILE_TYPES = {
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_0: 2,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8,
    GGMLType.Q5_1: 9,
    GGMLType.BF16: 32,
}
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

_LAYER_NAMES = {
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


def llama_gguf(checkpoint: Checkpoint, qtype: GGMLType) -> tuple[dict[str, Any], list[Tensor]]:
    """The metadata, and the tensors in the order of the layers, none of them read yet.

    Matrices become `qtype`, or F16 where its blocks do not divide the rows; vectors F32.
    CheckpointError for what is missing or wrong, and for anything that would make the engine
    compute something else than the checkpoint says.
    """
    _check_architecture(checkpoint.config)
    tensors = _tensors(checkpoint, qtype)  # first: they prove the sizes that config.json claims
    return _metadata(checkpoint, qtype), tensors


def _check_architecture(config: Settings) -> None:
    model_type = config.text("model_type")
    if model_type not in MODEL_TYPES:
        raise config.wrong("model_type", f"{model_type}, wanted {' or '.join(MODEL_TYPES)}")
    if config.has("auto_map"):
        raise config.wrong("auto_map", "the model brings its own code, which is not run")
    if config.text("hidden_act", "silu") != "silu":
        raise config.wrong("hidden_act", f"{config.text('hidden_act')}, wanted silu")


def _metadata(checkpoint: Checkpoint, qtype: GGMLType) -> dict[str, Any]:
    config = checkpoint.config
    n_heads, n_kv_heads, head_dim = _heads(checkpoint)
    vocab_size = config.count("vocab_size")
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": checkpoint.directory.resolve().name,
        "general.file_type": FILE_TYPES[qtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
        "llama.vocab_size": vocab_size,
        "llama.context_length": config.count("max_position_embeddings"),
        "llama.embedding_length": config.count("hidden_size"),
        "llama.block_count": config.count("num_hidden_layers"),
        "llama.feed_forward_length": config.count("intermediate_size"),
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": _rope_theta(checkpoint),
    }
    if config.has("sliding_window"):
        metadata["llama.attention.sliding_window"] = config.count("sliding_window")
    model = checkpoint.file("tokenizer.model")
    metadata |= sentencepiece_metadata(model, vocab_size, _added_tokens(checkpoint))
    metadata |= _special_ids(checkpoint, metadata)
    metadata |= _tokenizer_settings(checkpoint)
    metadata |= _chat_templates(checkpoint)
    return metadata


def _tensors(checkpoint: Checkpoint, qtype: GGMLType) -> list[Tensor]:
    wanted = _shapes(checkpoint)
    for name in checkpoint.tensors.keys() - wanted.keys():
        tied = name == "lm_head.weight"  # a copy of the embedding, written by some programs
        if not tied and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(checkpoint.directory, name, "no such tensor in a Llama model")
    n_heads, n_kv_heads, _ = _heads(checkpoint)
    tensors = []
    for source_name, (name, shape) in wanted.items():
        if source_name not in checkpoint.tensors:
            raise CheckpointError(checkpoint.directory, source_name, "no such tensor")
        source = checkpoint.tensors[source_name]
        if source.shape != shape:
            raise CheckpointError(source.path, source_name, f"shape {source.shape}, not {shape}")
        read = source.read
        if name.endswith("attn_q.weight"):
            read = partial(_interleaved, source, n_heads)
        elif name.endswith("attn_k.weight"):
            read = partial(_interleaved, source, n_kv_heads)
        tensors.append(Tensor(name, _stored_type(shape, qtype), shape, read))
    return tensors


def _interleaved(source: StoredTensor, n_heads: int) -> NDArray[np.float32]:
    """Rows of q or k in GGUF's order, for RoPE on adjacent pairs (2i, 2i + 1).

    Hugging Face rotates the pairs (i, i + head_dim / 2): LlamaModel.permute of llama.cpp's
    convert_hf_to_gguf.py.
    """
    halves = source.read().reshape(n_heads, 2, -1, source.shape[1])  # (H, 2, d / 2, D)
    return halves.swapaxes(1, 2).reshape(source.shape)


def _stored_type(shape: tuple[int, ...], qtype: GGMLType) -> GGMLType:
    if len(shape) == 1:
        return GGMLType.F32
    return GGMLType.F16 if shape[-1] % qtype.block_size else qtype


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's name in the checkpoint -> its name in GGUF and its shape."""
    config = checkpoint.config
    dim, hidden_dim = config.count("hidden_size"), config.count("intermediate_size")
    n_layers, vocab_size = config.count("num_hidden_layers"), config.count("vocab_size")
    if n_layers > len(checkpoint.tensors):
        raise config.wrong("num_hidden_layers", f"{n_layers}, more than there are tensors")
    n_heads, n_kv_heads, head_dim = _heads(checkpoint)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (dim,),
        "attn_q": (n_heads * head_dim, dim),
        "attn_k": (n_kv_heads * head_dim, dim),
        "attn_v": (n_kv_heads * head_dim, dim),
        "attn_output": (dim, n_heads * head_dim),
        "ffn_norm": (dim,),
        "ffn_gate": (hidden_dim, dim),
        "ffn_up": (hidden_dim, dim),
        "ffn_down": (dim, hidden_dim),
    }

    def entries() -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        yield "model.embed_tokens.weight", ("token_embd.weight", (vocab_size, dim))
        for i in range(n_layers):
            for source, name in _LAYER_NAMES.items():
                yield f"model.layers.{i}.{source}.weight", (f"blk.{i}.{name}.weight", layer[name])
        yield "model.norm.weight", ("output_norm.weight", (dim,))
        if not config.flag("tie_word_embeddings", False):
            yield "lm_head.weight", ("output.weight", (vocab_size, dim))

    return dict(entries())


def _heads(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """n_heads, n_kv_heads, head_dim"""
    config = checkpoint.config
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    n_kv_heads = config.count("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise config.wrong("num_key_value_heads", f"{n_kv_heads} does not divide {n_heads} heads")
    if not config.has("head_dim") and dim % n_heads:
        raise config.wrong("num_attention_heads", f"{n_heads} does not divide {dim} dimensions")
    head_dim = config.count("head_dim", dim // n_heads)
    if head_dim % 2:
        raise config.wrong("head_dim", f"{head_dim} is odd; RoPE rotates pairs")
    return n_heads, n_kv_heads, head_dim


def _rope_theta(checkpoint: Checkpoint) -> float:
    """theta from `rope_parameters` (transformers 5) or `rope_theta`; 10000 is their default."""
    config = checkpoint.config
    for key in ("rope_parameters", "rope_scaling"):
        section = config.section(key)
        kind = section.text("rope_type", section.text("type", "default"))
        if kind != "default":
            raise config.wrong(key, f"rope type {kind} is not supported yet")
    return config.section("rope_parameters").number(
        "rope_theta", config.number("rope_theta", 10000.0)
    )


def _added_tokens(checkpoint: Checkpoint) -> dict[int, tuple[str, int]]:
    """id -> (text, token type) from tokenizer_config.json and the older added_tokens.json."""
    added: dict[int, tuple[str, int]] = {}
    plain = checkpoint.settings("added_tokens.json")
    for text in plain.values:
        added[plain.count(text)] = text, USER_DEFINED
    decoder = checkpoint.settings("tokenizer_config.json").section("added_tokens_decoder")
    for id in decoder.values:
        token = decoder.section(id)
        if not id.isdecimal():
            raise decoder.wrong("added_tokens_decoder", f"{id!r} is no token id")
        kind = CONTROL if token.flag("special", False) else USER_DEFINED
        added[int(id)] = token.text("content"), kind
    return added


def _special_ids(checkpoint: Checkpoint, vocab: dict[str, Any]) -> dict[str, Any]:
    """BOS and the ids that end a text, where config.json and generation_config.json name them.

    GGUF has one `eos` and, for others, `eot` and `eom`; all of them are in `eos_token_ids` too,
    a key that Ollama writes.
    """
    metadata: dict[str, Any] = {}
    ends: list[int] = []
    for settings in (checkpoint.config, checkpoint.settings("generation_config.json")):
        for key in ("bos_token_id", "eos_token_id"):
            if not settings.has(key):
                continue
            value = settings.values[key]
            ids = value if isinstance(value, list) else [value]
            if not all(type(id) is int and 0 <= id < vocab["llama.vocab_size"] for id in ids):
                raise settings.wrong(key, f"{value!r} is no token of this vocabulary")
            if key == "eos_token_id":
                ends += [id for id in ids if id not in ends]
            elif ids:
                metadata.setdefault("tokenizer.ggml.bos_token_id", ids[0])
    for role, id in zip(("eos", "eot", "eom"), ends, strict=False):
        metadata[f"tokenizer.ggml.{role}_token_id"] = id
    if len(ends) > 1:
        metadata["tokenizer.ggml.eos_token_ids"] = np.array(ends, np.int32)
    return metadata


def _tokenizer_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tokenizer_config.json says about BOS, EOS and the leading space."""
    config = checkpoint.settings("tokenizer_config.json")
    return {
        "tokenizer.ggml.add_bos_token": config.flag("add_bos_token", True),
        "tokenizer.ggml.add_eos_token": config.flag("add_eos_token", False),
        "tokenizer.ggml.add_space_prefix": config.flag("add_prefix_space", True),
    }


def _chat_templates(checkpoint: Checkpoint) -> dict[str, Any]:
    """The templates word for word: the main one, and others by name."""
    if checkpoint.has_file("chat_template.jinja"):
        return {
            "tokenizer.chat_template": checkpoint.file("chat_template.jinja").read_text("utf-8")
        }
    config = checkpoint.settings("tokenizer_config.json")
    if not isinstance(config.values.get("chat_template"), list):
        has_one = config.has("chat_template")
        return {"tokenizer.chat_template": config.text("chat_template")} if has_one else {}
    metadata: dict[str, Any] = {}
    for entry in config.values["chat_template"]:
        if not isinstance(entry, dict):
            raise config.wrong("chat_template", f"wanted a name and a template, got {entry!r}")
        template = Settings(config.path, entry)
        name = template.text("name")
        suffix = "" if name == "default" else f".{name}"
        metadata[f"tokenizer.chat_template{suffix}"] = template.text("template")
    return metadata
