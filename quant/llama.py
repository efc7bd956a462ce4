"""The Llama family as checkpoints hold it: sizes, names of tensors, order of rows.

A checkpoint's form (hf.py, mistral.py) gives `Sizes` and a `Form`; `source_tensors` finds in its
tensors those of a GGUF file of architecture `llama`, each with rows that are read when asked for.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quant.checkpoint import Checkpoint
from quant.ggml_types import GGMLType
from quant.safetensors_file import StoredTensor
from quant.settings import CheckpointError, Settings


@dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 and later stretch RoPE: long waves by `factor`, short ones not at all."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True)
class Sizes:
    """The hyper-parameters of a model; `n_experts` is 0 where the feed-forward part is one."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    context_length: int
    sliding_window: int | None
    tied: bool  # the output matrix is the embedding
    rope_scale: float = 1.0  # positions are divided by it
    llama3_rope: Llama3Rope | None = None
    n_experts: int = 0
    n_experts_used: int = 0


@dataclass(frozen=True)
class Form:
    """How a kind of checkpoint names tensors: GGUF's name -> its own, with {layer} and {expert}.

    `halves`: RoPE turns the pairs (i, i + head_dim / 2) of a head, as Hugging Face orders them;
    otherwise (2i, 2i + 1), as GGUF and Mistral do.
    """

    names: Mapping[str, str]
    ignored: tuple[str, ...]  # ends of names of what is no weight
    halves: bool


@dataclass(frozen=True)
class GivenTensor:
    """A vector that is not in the checkpoint, but follows from its settings."""

    path: Path  # whose settings they are
    name: str
    values: NDArray[np.float32]
    dtype: GGMLType = GGMLType.F32

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """All of it."""
        return self.values[None][start:end]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the GGUF file to be: `parts` hold its rows, one below another, equally many.

    `head_dim` is not 0 where the rows of each head have to change places, from halves to
    neighbours: row i of the first half goes to 2i, of the second one to 2i + 1.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor | GivenTensor, ...]
    head_dim: int = 0

    @property
    def dtype(self) -> GGMLType:
        """The type in the checkpoint."""
        return self.parts[0].dtype

    @property
    def n_rows(self) -> int:
        """Of all parts; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """In the checkpoint."""
        return math.prod(self.shape) * self.dtype.block_bytes

    @property
    def part_rows(self) -> int:
        """Rows of each part."""
        return self.n_rows // len(self.parts)

    def wrong(self, row: int, reason: str) -> CheckpointError:
        """The error to raise for what is in a row."""
        part = self.parts[row // self.part_rows]
        return CheckpointError(part.path, part.name, reason)

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """Rows start to end of one part, (end - start, cols), in GGUF's order."""
        part, start = divmod(start, self.part_rows)
        end -= part * self.part_rows
        assert start < end <= self.part_rows
        if not self.head_dim:
            return self.parts[part].rows(start, end)
        first = start // self.head_dim * self.head_dim  # whole heads
        last = -(-end // self.head_dim) * self.head_dim
        heads = self.parts[part].rows(first, last).reshape(-1, 2, self.head_dim // 2, self.shape[1])
        return heads.swapaxes(1, 2).reshape(last - first, -1)[start - first : end - first]


@dataclass(frozen=True)
class _Wanted:
    shape: tuple[int, ...]
    n_experts: int = 1


def source_tensors(checkpoint: Checkpoint, sizes: Sizes, form: Form) -> list[SourceTensor]:
    """The tensors of the GGUF file, in the order of the layers, none of them read yet.

    CheckpointError where one is missing, has another shape, or is none of this family's.
    """
    rest = set(checkpoint.tensors)
    if sizes.n_layers > len(rest):
        reason = f"{sizes.n_layers} layers, more than there are tensors"
        raise CheckpointError(checkpoint.directory, "config", reason)
    found = []
    for name, wanted in _wanted(sizes):
        parts = []
        for expert in range(wanted.n_experts):
            source = _own_name(name, form, expert)
            if source not in checkpoint.tensors:
                raise CheckpointError(checkpoint.directory, source, "no such tensor")
            tensor = checkpoint.tensors[source]
            if tensor.shape != wanted.shape[-2:]:
                reason = f"shape {tensor.shape}, not {wanted.shape[-2:]}"
                raise CheckpointError(tensor.path, source, reason)
            rest.discard(source)
            parts.append(tensor)
        turned = form.halves and name.endswith(("attn_q.weight", "attn_k.weight"))
        head_dim = sizes.head_dim if turned else 0
        found.append(SourceTensor(name, wanted.shape, tuple(parts), head_dim))
    if sizes.tied:  # a copy of the embedding, written by some programs
        rest.discard(_own_name("output.weight", form, 0))
    for name in sorted(rest):
        if not name.endswith(form.ignored):
            raise CheckpointError(checkpoint.directory, name, "no such tensor in a Llama model")
    if sizes.llama3_rope is not None:
        factors = rope_factors(sizes, sizes.llama3_rope)
        given = GivenTensor(checkpoint.config.path, "rope_freqs.weight", factors)
        found.append(SourceTensor(given.name, factors.shape, (given,)))
    return found


def rope_factors(sizes: Sizes, rope: Llama3Rope) -> NDArray[np.float32]:
    """(head_dim / 2,): what the frequency of each pair is divided by, as Meta's apply_scaling."""
    frequencies = sizes.rope_theta ** -(np.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    waves = rope.original_context_length * frequencies / (2 * np.pi)  # in the trained context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)


def _own_name(name: str, form: Form, expert: int) -> str:
    """`blk.3.attn_q.weight` -> what the checkpoint calls it."""
    base = name.removesuffix(".weight")
    if not base.startswith("blk."):
        return f"{form.names[base]}.weight"
    _, layer, kind = base.split(".")
    return f"{form.names[kind].format(layer=layer, expert=expert)}.weight"


def _wanted(sizes: Sizes) -> Iterator[tuple[str, _Wanted]]:
    """Every tensor by GGUF's name."""
    dim, q_rows = sizes.dim, sizes.n_heads * sizes.head_dim
    kv_rows = sizes.n_kv_heads * sizes.head_dim
    layer = {
        "attn_norm": _Wanted((dim,)),
        "attn_q": _Wanted((q_rows, dim)),
        "attn_k": _Wanted((kv_rows, dim)),
        "attn_v": _Wanted((kv_rows, dim)),
        "attn_output": _Wanted((dim, q_rows)),
        "ffn_norm": _Wanted((dim,)),
    }
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        shape = (dim, sizes.hidden_dim) if name == "ffn_down" else (sizes.hidden_dim, dim)
        if sizes.n_experts:
            layer[f"{name}_exps"] = _Wanted((sizes.n_experts, *shape), sizes.n_experts)
        else:
            layer[name] = _Wanted(shape)
    if sizes.n_experts:
        layer["ffn_gate_inp"] = _Wanted((sizes.n_experts, dim))
    yield "token_embd.weight", _Wanted((sizes.vocab_size, dim))
    for i in range(sizes.n_layers):
        for name, wanted in layer.items():
            yield f"blk.{i}.{name}.weight", wanted
    yield "output_norm.weight", _Wanted((dim,))
    if not sizes.tied:
        yield "output.weight", _Wanted((sizes.vocab_size, dim))


def check_heads(config: Settings, sizes: Sizes, kv_key: str, head_key: str) -> None:
    """CheckpointError unless heads share keys evenly and RoPE finds pairs in them."""
    if sizes.n_heads % sizes.n_kv_heads:
        reason = f"{sizes.n_kv_heads} does not divide {sizes.n_heads} heads"
        raise config.wrong(kv_key, reason)
    if sizes.head_dim % 2:
        raise config.wrong(head_key, f"{sizes.head_dim} is odd; RoPE rotates pairs")
