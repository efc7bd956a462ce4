"""Llama and Mistral: token ids in, logits out.

Weights keep the names of the GGUF file.  Grouped-query attention under an optional sliding window,
RoPE on adjacent pairs, RMSNorm before each half of a block, SwiGLU (arXiv 2302.13971, 2310.06825).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from cpuinfer import lora, ops
from cpuinfer.cache import KVCache
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile, QTensor
from cpuinfer.team import computing
from cpuinfer.weights import Weight, has_kernel, pack
from quant import dequantize
from quant.ggml_types import GGMLType

Floats = npt.NDArray[np.float32]
#: Called with the names of matrices and the activations (T, cols) that they are about to meet.
Observer = Callable[[Sequence[str], Floats], None]

#: The most tokens one sequence adds in a pass: enough to make prefill a matter of arithmetic, few
#: enough that a layer of a 7B model takes a fraction of a second, for Ctrl-C is heard between them.
CHUNK = 256

#: The most rows whose pass is a matter of reading the weights, not of arithmetic.
DECODE_ROWS = 16


class Cancelled(Exception):
    """A forward pass was given up between two layers; no cache has moved."""


@dataclass(frozen=True)
class Span:
    """New int32 tokens of one sequence, its cache, and how many of the last want logits."""

    tokens: npt.NDArray[np.int32]
    cache: KVCache
    n_logits: int


@dataclass(frozen=True)
class Rope:
    """The angles of a pass: cos, sin (T, rope_dim / 2)."""

    cos: Floats
    sin: Floats


@dataclass(frozen=True)
class Matrices:
    """Matrices that meet the same activations, and what adapters add to their products."""

    names: tuple[str, ...]
    weights: list[Weight]
    additions: tuple[lora.Addition, ...]

    def multiply(self, x: Floats, observe: Observer | None) -> list[Floats]:
        """x (T, cols) times each matrix (rows, cols): [(T, rows), ...]"""
        if observe is not None:
            observe(self.names, x)
        products = ops.linear(x, *self.weights)
        if self.additions:
            lora.add(products, x, self.additions)
        return products


@dataclass(frozen=True)
class Block:
    """One layer's weights."""

    attn_norm: Floats
    attn_q_k_v: Matrices
    attn_output: Matrices
    ffn_norm: Floats
    ffn_gate_up: Matrices
    ffn_down: Matrices


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a file must have, and their shapes in NumPy order; `output` is optional."""
    c = config
    q_rows, kv_rows = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (c.vocab_size, c.dim),
        "output_norm.weight": (c.dim,),
        "output.weight": (c.vocab_size, c.dim),
        "rope_freqs.weight": (c.rope_dim // 2,),
    }
    block = {
        "attn_norm": (c.dim,),
        "attn_q": (q_rows, c.dim),
        "attn_k": (kv_rows, c.dim),
        "attn_v": (kv_rows, c.dim),
        "attn_output": (c.dim, q_rows),
        "ffn_norm": (c.dim,),
        "ffn_gate": (c.hidden_dim, c.dim),
        "ffn_up": (c.hidden_dim, c.dim),
        "ffn_down": (c.dim, c.hidden_dim),
    }
    for i in range(c.n_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


OPTIONAL = ("output.weight", "rope_freqs.weight")


def check_tensors(file: GGUFFile, config: ModelConfig) -> list[str]:
    """ModelFormatError unless every tensor is there with its shape; names of those not used."""
    shapes = expected_shapes(config)
    for name, shape in shapes.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            if name not in OPTIONAL:
                raise file.error(name, "the tensor is missing")
            continue
        if tensor.shape != shape:
            raise file.error(name, f"shape {tensor.shape}, expected {shape}")
        if len(shape) == 1 and tensor.qtype is not GGMLType.F32:
            raise file.error(name, f"type {tensor.qtype.name}, expected F32")
    unused = [name for name in file.tensors if name not in shapes]
    for name in unused:
        if name.endswith(".bias") or name.startswith("rope_factors"):
            raise file.error(name, "models with this tensor are not supported yet")
    return unused


class Llama:
    """A model in memory: matrices packed, norms as they are, the embedding left in the file."""

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        kv_type: str = "f16",
        threads: int = 1,
        prefill_threads: int | None = None,
        context_length: int | None = None,
        chunk: int = CHUNK,
        progress: Callable[[int, int], None] | None = None,
        adapters: Sequence[lora.Adapter] = (),
        endless: bool = False,
    ) -> None:
        """`chunk` is the most tokens a sequence adds in a pass; passes of more than DECODE_ROWS
        tokens in all run on `prefill_threads`, if that is given.

        `endless` texts may be longer than `context_length`, which then bounds the ring alone.

        `progress(done, total)` is called with bytes of weights while they are packed.
        """
        check_tensors(file, config)
        self.config = config
        self.kv_type = kv_type
        self.threads = threads
        self.prefill_threads = prefill_threads or threads
        self.context_length = context_length or config.context_length
        self.chunk = min(chunk, self.context_length)
        self.limit = None if endless else self.context_length
        tensors = file.tensors
        total = sum(t.data.nbytes for t in tensors.values())
        done = 0

        def matrices(*names: str) -> Matrices:
            nonlocal done
            weights = []
            for _, alike in groupby((tensors[name] for name in names), _kind):
                group = list(alike)
                weights.append(pack(*group))
                for tensor in group:
                    done += tensor.data.nbytes
                    if has_kernel(tensor.qtype):
                        tensor.release()
            if progress is not None:
                progress(done, total)
            return Matrices(names, weights, lora.additions(adapters, names))

        with computing(self.prefill_threads):
            self.token_embd = tensors["token_embd.weight"]
            self.embedding_addition = lora.embedding_addition(adapters)
            self.blk = [_load_block(tensors, matrices, i) for i in range(config.n_layers)]
            self.output_norm = _vector(tensors["output_norm.weight"])
            tied = "output.weight" not in tensors
            self.output = matrices("token_embd.weight" if tied else "output.weight")
        exponents = np.arange(0, config.rope_dim, 2) / config.rope_dim
        self.frequencies = config.rope_theta**-exponents / config.rope_scale
        if "rope_freqs.weight" in tensors:
            factors = _vector(tensors["rope_freqs.weight"])
            if not (np.isfinite(factors).all() and (factors > 0).all()):
                raise file.error("rope_freqs.weight", "expected finite numbers above 0")
            self.frequencies /= factors

    @property
    def capacity(self) -> int:
        """Positions a cache keeps."""
        return capacity(self.config, self.chunk, self.context_length)

    def make_cache(self) -> KVCache:
        """An empty cache for one sequence; a ring takes its memory at once."""
        c = self.config
        cache = KVCache(c.n_layers, c.n_kv_heads, c.head_dim, self.capacity, self.kv_type)
        if c.sliding_window is not None:
            cache.take_memory()
        return cache

    def forward(
        self,
        spans: Sequence[Span],
        cancel: threading.Event | None = None,
        observe: Observer | None = None,
    ) -> Floats:
        """Append each span's tokens to its cache; logits (sum of n_logits, V) in order of spans.

        Everything but attention ignores which sequence a row belongs to, so prefill, decoding and
        batches are this one path, and a row's logits do not depend on its neighbours.  Cancelled
        is raised between layers when `cancel` is set; then no cache has moved.  `observe` sees the
        activations that enter each matrix.
        """
        for span in spans:
            if not 1 <= len(span.tokens) <= self.chunk:
                raise ValueError(f"a pass takes 1 to {self.chunk} tokens, got {len(span.tokens)}")
            if not 0 <= span.n_logits <= len(span.tokens):
                raise ValueError(f"logits of {span.n_logits} of {len(span.tokens)} tokens")
        if len({id(span.cache) for span in spans}) < len(spans):
            raise ValueError("two spans of a pass have the same cache")
        ids = np.concatenate([span.tokens for span in spans])
        for span in spans:
            span.cache.claim(len(span.tokens))
        with computing(self.threads if len(ids) <= DECODE_ROWS else self.prefill_threads):
            x = ops.embed(ids, self.token_embd)  # (T, D)
            if self.embedding_addition is not None:
                self.embedding_addition.add(x, ids)
            rope = self._rope(spans)
            for layer, block in enumerate(self.blk):
                if cancel is not None and cancel.is_set():
                    raise Cancelled
                x += self._attention(block, layer, x, rope, spans, observe)
                x += self._feed_forward(block, x, observe)
            for span in spans:
                span.cache.advance(len(span.tokens))
            return self._logits(x, spans, observe)

    def _attention(
        self,
        block: Block,
        layer: int,
        x: Floats,
        rope: Rope,
        spans: Sequence[Span],
        observe: Observer | None,
    ) -> Floats:
        c = self.config
        h = ops.rms_norm(x, block.attn_norm, c.norm_eps)
        q, k, v = block.attn_q_k_v.multiply(h, observe)
        q = q.reshape(-1, c.n_heads, c.head_dim)  # (T, H, d)
        k, v = (y.reshape(-1, c.n_kv_heads, c.head_dim) for y in (k, v))  # (T, K, d)
        ops.rope(q, rope.cos, rope.sin)
        ops.rope(k, rope.cos, rope.sin)
        outs, row = [], 0
        for span in spans:
            rows = slice(row, row := row + len(span.tokens))
            outs.append(ops.attend(q[rows], k[rows], v[rows], span.cache, layer, c.sliding_window))
        out = outs[0] if len(outs) == 1 else np.concatenate(outs)
        return block.attn_output.multiply(out.reshape(len(x), -1), observe)[0]

    def _feed_forward(self, block: Block, x: Floats, observe: Observer | None) -> Floats:
        h = ops.rms_norm(x, block.ffn_norm, self.config.norm_eps)
        gate, up = block.ffn_gate_up.multiply(h, observe)
        return block.ffn_down.multiply(ops.silu_mul(gate, up), observe)[0]

    def _logits(self, x: Floats, spans: Sequence[Span], observe: Observer | None) -> Floats:
        rows: list[int] = []
        end = 0
        for span in spans:
            end += len(span.tokens)
            rows += range(end - span.n_logits, end)
        if not rows:
            return np.empty((0, self.config.vocab_size), np.float32)
        last = ops.rms_norm(x[rows], self.output_norm, self.config.norm_eps)
        return self.output.multiply(last, observe)[0]

    def _rope(self, spans: Sequence[Span]) -> Rope:
        """Angles in double precision: at position 32,768 single precision is off by 1e-3."""
        positions = np.concatenate(
            [np.arange(s.cache.offset, s.cache.offset + len(s.tokens)) for s in spans]
        )
        angles = positions[:, None] * self.frequencies  # (T, rope_dim / 2)
        return Rope(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def capacity(config: ModelConfig, chunk: int, context_length: int) -> int:
    """Positions a cache must keep: see cache.py."""
    if config.sliding_window is None:
        return context_length
    return min(config.sliding_window + chunk - 1, context_length)


def _load_block(
    tensors: Mapping[str, QTensor], matrices: Callable[..., Matrices], layer: int
) -> Block:
    def name(part: str) -> str:
        return f"blk.{layer}.{part}.weight"

    return Block(
        attn_norm=_vector(tensors[name("attn_norm")]),
        attn_q_k_v=matrices(name("attn_q"), name("attn_k"), name("attn_v")),
        attn_output=matrices(name("attn_output")),
        ffn_norm=_vector(tensors[name("ffn_norm")]),
        ffn_gate_up=matrices(name("ffn_gate"), name("ffn_up")),
        ffn_down=matrices(name("ffn_down")),
    )


def _kind(tensor: QTensor) -> tuple[GGMLType, str]:
    """Neighbours of one kind are packed together; without a kernel each is a kind of its own."""
    return tensor.qtype, "" if has_kernel(tensor.qtype) else tensor.name


def _vector(tensor: QTensor) -> Floats:
    return dequantize(tensor.data, tensor.qtype).reshape(-1).copy()
