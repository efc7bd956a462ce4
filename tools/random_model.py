"""Write a GGUF of a model's shape whose weights are random valid blocks.

It says nothing sensible, but takes the time and the memory of the real one: for benchmarks and for
tests of speed, memory and long runs where published weights are not at hand.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quant import FORMATS, dequantize, quantize
from quant.ggml_types import GGMLType
from quant.gguf_writer import Tensor, write_gguf

#: dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, window, context
SHAPES = {
    "mistral-7b": (4096, 14336, 32, 32, 8, 128, 32000, 4096, 32768),
    "small": (512, 1536, 4, 8, 2, 64, 2048, 256, 2048),
}


def random_rows(
    rng: np.random.Generator, qtype: GGMLType, rows: int, cols: int, spread: float
) -> npt.NDArray[np.uint8]:
    """Packed rows (rows, row_bytes) of random weights whose root mean square is about `spread`.

    In block formats all bits are random but those of the scales, which are of either sign.
    """
    if qtype.block_size == 1:
        return quantize(rng.standard_normal((rows, cols), np.float32) * np.float32(spread), qtype)
    layout = FORMATS[qtype].LAYOUT
    blocks = rng.integers(0, 256, rows * qtype.row_bytes(cols), np.uint8).view(layout)
    scales = [name for name in ("d", "m", "dmin") if name in layout.names]
    for name in scales:
        blocks[name] = 1.0
    sample = dequantize(blocks[:256].view(np.uint8).reshape(1, -1), qtype)
    scale = spread / float(np.sqrt(np.mean(sample.astype(np.float64) ** 2)))
    for name in scales:
        blocks[name] = scale * rng.standard_normal(len(blocks), np.float32)
    packed: npt.NDArray[np.uint8] = blocks.view(np.uint8).reshape(rows, -1)
    return packed


def vocabulary(size: int) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: special tokens, bytes, and made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"\u2581w{i}" for i in range(size - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(size, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(
            [2, 3, 3] + [6] * 256 + [1] * (size - 259), dtype=np.int32
        ),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_random_model(
    path: Path, shape: str, qtype: GGMLType, layers: int | None = None, seed: int = 0
) -> None:
    """A file as people download them: matrices in `qtype`, output in Q6_K where that is smaller
    than F16 and not already larger, norms in F32; `layers` instead of the shape's own."""
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab, window, context = SHAPES[shape]
    n_layers = layers or n_layers
    rng = np.random.default_rng(seed)
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": f"random {shape} {qtype.name}",
        "llama.context_length": context,
        "llama.embedding_length": dim,
        "llama.block_count": n_layers,
        "llama.feed_forward_length": hidden_dim,
        "llama.attention.head_count": n_heads,
        "llama.attention.head_count_kv": n_kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.sliding_window": window,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": vocab,
        **vocabulary(vocab),
    }

    def matrix(name: str, rows: int, cols: int, kind: GGMLType = qtype) -> Tensor:
        return Tensor(
            name, kind, (rows, cols), lambda: random_rows(rng, kind, rows, cols, cols**-0.5)
        )

    def norm(name: str) -> Tensor:
        return Tensor(name, GGMLType.F32, (dim,), lambda: np.ones(dim, np.float32))

    output = qtype if qtype.block_size == 1 or qtype is GGMLType.Q8_0 else GGMLType.Q6_K
    tensors = [matrix("token_embd.weight", vocab, dim)]
    for i in range(n_layers):
        blk = f"blk.{i}."
        tensors += [
            norm(blk + "attn_norm.weight"),
            matrix(blk + "attn_q.weight", n_heads * head_dim, dim),
            matrix(blk + "attn_k.weight", n_kv_heads * head_dim, dim),
            matrix(blk + "attn_v.weight", n_kv_heads * head_dim, dim),
            matrix(blk + "attn_output.weight", dim, n_heads * head_dim),
            norm(blk + "ffn_norm.weight"),
            matrix(blk + "ffn_gate.weight", hidden_dim, dim),
            matrix(blk + "ffn_up.weight", hidden_dim, dim),
            matrix(blk + "ffn_down.weight", dim, hidden_dim),
        ]
    tensors += [norm("output_norm.weight"), matrix("output.weight", vocab, dim, output)]
    write_gguf(path, metadata, tensors)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--type", choices=[t.name for t in GGMLType], default="Q4_0")
    parser.add_argument("--layers", type=int, help="how many (default: those of the shape)")
    arguments = parser.parse_args(argv)
    qtype = GGMLType[arguments.type]
    write_random_model(arguments.out, arguments.shape, qtype, arguments.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
