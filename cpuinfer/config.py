"""From a GGUF file's metadata to ModelConfig: the numbers a model is built from.

Every number that becomes a shape, a loop bound or a table passes a range check here. Which tensors
there must be, and of what shape, is the model's part (models/).
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cpuinfer.gguf import GGUFFile, ModelFormatError

# Values of general.architecture whose keys are understood here.
SUPPORTED_ARCHITECTURES = ("llama",)

# A window in positions, "auto" for what the file says, "off" or None for full attention.
SlidingWindow = int | Literal["auto", "off"] | None

_MAX_POSITION = 2**31 - 1
_MAX_TOKENS = 2**24

# Features that change the arithmetic and are not followed here, by their key after the
# architecture's prefix, with the values that mean the feature is absent.
_UNSUPPORTED: dict[str, tuple[str, tuple[float, ...]]] = {
    "expert_count": ("a mixture of experts", (0,)),
    "attention.causal": ("attention to later positions", (1,)),
    "attention.scale": ("a scale of attention of its own", (0,)),
    "attention.clamp_kqv": ("clamping of queries, keys and values", (0,)),
    "attention.sliding_window_pattern": ("a sliding window in some layers only", ()),
    "attn_logit_softcapping": ("a soft cap on attention scores", (0,)),
    "final_logit_softcapping": ("a soft cap on logits", (0,)),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and constants of a model of the Llama family."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_dim: int  # leading values of each head that RoPE turns
    sliding_window: int | None  # keys a query sees, its own included; None: all of them
    context_length: int  # positions the model was trained for
    rope_scale: float = 1.0  # RoPE divides positions by it

    @property
    def group_size(self) -> int:
        """Query heads that share a key and value head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_gguf(cls, file: GGUFFile, sliding_window: SlidingWindow = "auto") -> "ModelConfig":
        """The checked hyper-parameters of `file`.

        `sliding_window` "auto": the file's own, or 4096 for Mistral 7B v0.1, whose files do not
        carry the key; a number, or "off" (None), overrules the file. ModelFormatError names the key
        that is missing, of another type, out of range or at odds with another; ValueError is for
        `sliding_window`.
        """
        _check_window(sliding_window)
        keys = _Keys(file)
        dim = keys.integer("embedding_length", 1, 2**17)
        n_layers = keys.integer("block_count", 1, 512)
        n_heads = keys.integer("attention.head_count", 1, 2**12)
        head_dim = _head_dim(keys, dim, n_heads)
        config = cls(
            dim=dim,
            hidden_dim=keys.integer("feed_forward_length", 1, 2**20),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(keys, n_layers, n_heads),
            head_dim=head_dim,
            vocab_size=_vocab_size(keys),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
            rope_theta=keys.number("rope.freq_base", 1.0, 1e15, default=10_000.0),
            rope_dim=_rope_dim(keys, head_dim),
            sliding_window=None if isinstance(sliding_window, str) else sliding_window,
            context_length=keys.integer("context_length", 1, _MAX_POSITION),
            rope_scale=_rope_scale(keys),
        )
        if sliding_window == "auto":
            return replace(config, sliding_window=_window_of_file(keys, config))
        return config


class _Keys:
    """The keys of a file under its architecture's prefix, with range checks."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.prefix = file.text("general.architecture")
        if self.prefix not in SUPPORTED_ARCHITECTURES:
            known = ", ".join(SUPPORTED_ARCHITECTURES)
            reason = f"{self.prefix} is not supported; supported: {known}"
            raise file.error("general.architecture", reason)
        for name, (feature, absent) in _UNSUPPORTED.items():
            value = self.get(name)
            if value is not None and (isinstance(value, np.ndarray) or value not in absent):
                raise self.error(name, f"{feature} is not supported yet")

    def error(self, name: str, reason: str) -> ModelFormatError:
        return self.file.error(f"{self.prefix}.{name}", reason)

    def get(self, name: str) -> object:
        """The raw value, or None where the key is absent."""
        return self.file.metadata.get(f"{self.prefix}.{name}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number within low..high; a missing key is an error unless there is a default."""
        key = f"{self.prefix}.{name}"
        value = self.file.uint(key) if default is None else self.file.uint(key, default)
        if not low <= value <= high:
            raise self.error(name, f"expected {low} to {high}, got {value}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number above `low`, at most `high`, likewise."""
        key = f"{self.prefix}.{name}"
        value = self.file.number(key) if default is None else self.file.number(key, default)
        if not low < value <= high:
            reason = f"expected a number above {low:g}, at most {high:g}, got {value:g}"
            raise self.error(name, reason)
        return value


def _n_kv_heads(keys: _Keys, n_layers: int, n_heads: int) -> int:
    """Key and value heads; a list with a number for each layer must repeat one number."""
    name = "attention.head_count_kv"
    value = keys.get(name)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or value.shape != (n_layers,):
            raise keys.error(name, f"expected a whole number, or one for each of {n_layers} layers")
        if (value != value[0]).any():
            raise keys.error(name, "layers with different numbers of heads are not supported")
        n_kv_heads = int(value[0])
    else:
        n_kv_heads = keys.integer(name, 1, n_heads, default=n_heads)
    if not 1 <= n_kv_heads <= n_heads or n_heads % n_kv_heads:
        raise keys.error(name, f"{n_heads} heads cannot share {n_kv_heads} key and value heads")
    return n_kv_heads


def _head_dim(keys: _Keys, dim: int, n_heads: int) -> int:
    """Values of a head: dim / n_heads unless the file says otherwise."""
    name = "attention.key_length"
    if keys.get(name) is None and dim % n_heads:
        raise keys.error("attention.head_count", f"{n_heads} heads do not divide {dim} values")
    head_dim = keys.integer(name, 2, 2**12, default=dim // n_heads)
    name = "attention.value_length"
    value_dim = keys.integer(name, 2, 2**12, default=head_dim)
    if value_dim != head_dim:
        raise keys.error(name, f"expected the length of a key, {head_dim}, got {value_dim}")
    return head_dim


def _vocab_size(keys: _Keys) -> int:
    """How many tokens there are, by their list, their embeddings and a key: all must agree."""
    tokens = keys.file.metadata.get("tokenizer.ggml.tokens")
    embedding = keys.file.tensors.get("token_embd.weight")
    counts: dict[str, int] = {}
    if isinstance(tokens, list):
        counts["tokenizer.ggml.tokens"] = len(tokens)
    if embedding is not None and len(embedding.shape) == 2:
        counts["token_embd.weight"] = embedding.shape[0]
    if keys.get("vocab_size") is not None or not counts:
        counts[f"{keys.prefix}.vocab_size"] = keys.integer("vocab_size", 1, _MAX_TOKENS)
    name, vocab_size = next(iter(counts.items()))
    if any(count != vocab_size for count in counts.values()):
        found = ", ".join(f"{count} in {where}" for where, count in counts.items())
        raise keys.file.error(name, f"different numbers of tokens: {found}")
    if not 1 <= vocab_size <= _MAX_TOKENS:
        raise keys.file.error(name, f"expected 1 to {_MAX_TOKENS} tokens, got {vocab_size}")
    return vocab_size


def _rope_dim(keys: _Keys, head_dim: int) -> int:
    """Leading values of a head that are turned, in pairs; all of them by default."""
    rope_dim = keys.integer("rope.dimension_count", 2, head_dim, default=head_dim)
    if rope_dim % 2:
        raise keys.error("rope.dimension_count", f"expected an even number, got {rope_dim}")
    return rope_dim


def _rope_scale(keys: _Keys) -> float:
    """The factor positions are divided by: linear scaling, under its present or its older key.

    As in llama.cpp, a factor without a type means linear, and a factor of 0 means none.
    """
    name = "rope.scaling.type"
    kind = keys.file.text(f"{keys.prefix}.{name}", "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise keys.error(name, f"scaling of positions by {kind} is not supported yet")
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if keys.get(name) is not None:
            return 1.0 if keys.get(name) == 0 else keys.number(name, 1e-3, 1e6)
    return 1.0


def _check_window(sliding_window: SlidingWindow) -> None:
    """ValueError for what is neither a window nor one of the words."""
    if sliding_window in ("auto", "off", None):
        return
    if type(sliding_window) is not int or not 1 <= sliding_window <= _MAX_POSITION:
        raise ValueError(f"sliding_window is a number from 1, auto or off, got {sliding_window!r}")


def _window_of_file(keys: _Keys, config: ModelConfig) -> int | None:
    """The window the file asks for (0 is none), or that of Mistral 7B v0.1 for a file of its shape.

    That model has a window of 4096 in every layer (arXiv 2310.06825, table 1), and llama.cpp's
    converter does not write the key for architecture llama.
    """
    name = "attention.sliding_window"
    if keys.get(name) is not None:
        return keys.integer(name, 0, _MAX_POSITION) or None
    sizes = (config.n_layers, config.dim, config.hidden_dim, config.n_kv_heads)
    constants = (config.rope_theta, config.context_length)
    if (keys.prefix, sizes, constants) == ("llama", (32, 4096, 14336, 8), (10_000.0, 32768)):
        return 4096
    return None
