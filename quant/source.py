"""A checkpoint -> everything of a GGUF file but the types of its tensors.

source = read_source(directory)
source.metadata, source.tensors
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import hf, mistral
from quant.checkpoint import Checkpoint
from quant.llama import Form, Sizes, SourceTensor, source_tensors
from quant.special_tokens import (
    added_tokens,
    chat_templates,
    special_ids,
    tokenizer_settings,
)
from quant.vocab import vocabulary

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint that has been understood; no weight has been read."""

    checkpoint: Checkpoint
    sizes: Sizes
    form: Form
    metadata: dict[str, Any]
    tensors: tuple[SourceTensor, ...]


def read_source(directory: Path) -> Source:
    """CheckpointError for what is missing, wrong or not supported, OSError for what cannot be
    read."""
    checkpoint = Checkpoint(directory)
    room = mistral if checkpoint.is_mistral else hf
    sizes = room.read_sizes(checkpoint.config)
    # Tensors first: they prove the sizes that the settings claim.
    tensors = tuple(source_tensors(checkpoint, sizes, room.FORM))
    metadata = {
        **_general(checkpoint, tensors, sizes),
        **{f"llama.{key}": value for key, value in _hyper_parameters(sizes).items()},
        **_tokenizer(checkpoint, sizes),
    }
    return Source(checkpoint, sizes, room.FORM, metadata, tensors)


def _general(
    checkpoint: Checkpoint, tensors: tuple[SourceTensor, ...], sizes: Sizes
) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": checkpoint.directory.resolve().name,
        "general.size_label": size_label(tensors, sizes.n_experts),
        "general.quantization_version": _QUANTIZATION_VERSION,
    }


def _hyper_parameters(sizes: Sizes) -> dict[str, Any]:
    """The keys under the architecture's name."""
    keys: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "context_length": sizes.context_length,
        "embedding_length": sizes.dim,
        "block_count": sizes.n_layers,
        "feed_forward_length": sizes.hidden_dim,
        "attention.head_count": sizes.n_heads,
        "attention.head_count_kv": sizes.n_kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": sizes.norm_eps,
        "rope.dimension_count": sizes.head_dim,
        "rope.freq_base": sizes.rope_theta,
    }
    if sizes.sliding_window is not None:
        keys["attention.sliding_window"] = sizes.sliding_window
    if sizes.rope_scale != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": sizes.rope_scale}
    if sizes.n_experts:
        keys |= {"expert_count": sizes.n_experts, "expert_used_count": sizes.n_experts_used}
    return keys


def _tokenizer(checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Any]:
    vocab = vocabulary(checkpoint, sizes.vocab_size, added_tokens(checkpoint))
    vocab |= special_ids(checkpoint, vocab)
    return vocab | tokenizer_settings(checkpoint, vocab) | chat_templates(checkpoint)


def size_label(tensors: tuple[SourceTensor, ...], n_experts: int) -> str:
    """How large a model is in a word, as gguf-py's size_label: 7.2B, or 8x7B for experts."""
    experts = sum(math.prod(t.shape) for t in tensors if t.name.endswith("_exps.weight"))
    total = sum(math.prod(t.shape) for t in tensors)
    if not n_experts:
        return _rounded(total)
    return f"{n_experts}x{_rounded(total - experts + experts // n_experts)}"


def _rounded(count: int) -> str:
    scale, suffix = next(
        (scale, suffix)
        for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
        if count > scale or suffix == "K"
    )
    scaled = count / scale
    decimals = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{decimals}f}{suffix}"
