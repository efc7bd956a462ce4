"""Mistral 7B without its bytes: a file of its shape that takes no memory, and published sizes."""

from pathlib import Path

import numpy as np

from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile, QTensor
from quant.ggml_types import GGMLType

#: Bytes of the published files of Mistral-7B-v0.1 by type.
PUBLISHED = {
    "Q8_0": 7_695_857_952,
    "Q6_K": 5_942_065_440,
    "Q5_K_M": 5_131_409_696,
    "Q4_K_M": 4_368_439_584,
    "Q4_0": 4_108_917_024,
    "Q3_K_M": 3_518_986_528,
}

#: Bytes of keys and values of a position, in half precision: 32 layers, 8 heads of 128, twice.
POSITION = 32 * 8 * 128 * 2 * 2


def config(window: int | None) -> ModelConfig:
    return ModelConfig(
        dim=4096,
        hidden_dim=14336,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_dim=128,
        sliding_window=window,
        context_length=32768,
    )


def file(qtype: GGMLType = GGMLType.Q4_0, output: GGMLType = GGMLType.Q6_K) -> GGUFFile:
    """All matrices of one type but the output; of the size published for Q4_0, if that is it."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (32000, 4096),
        "output_norm": (4096,),
        "output": (32000, 4096),
    }
    for layer in range(32):
        for name, shape in {
            "attn_norm": (4096,),
            "attn_q": (4096, 4096),
            "attn_k": (1024, 4096),
            "attn_v": (1024, 4096),
            "attn_output": (4096, 4096),
            "ffn_norm": (4096,),
            "ffn_gate": (14336, 4096),
            "ffn_up": (14336, 4096),
            "ffn_down": (4096, 14336),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    tensors = {}
    for stem, shape in shapes.items():
        kind = GGMLType.F32 if len(shape) == 1 else output if stem == "output" else qtype
        rows = shape[0] if len(shape) == 2 else 1
        data = np.broadcast_to(np.uint8(0), (rows, kind.row_bytes(shape[-1])))
        tensors[f"{stem}.weight"] = QTensor(f"{stem}.weight", kind, shape, data)
    header = 735_520  # of the published files, most of it the vocabulary
    nbytes = header + sum(tensor.data.nbytes for tensor in tensors.values())
    return GGUFFile(Path("7b.gguf"), 3, {}, tensors, nbytes, (), {})
