"""What several test files share: the shared test material, random blocks, tiny Llama models."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Before the libraries that read them are loaded: on cores that others use too, threads that spin
# while they wait make the tests ten times slower. Three threads even on a smaller machine: results
# must not depend on their number.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "3")
# No test may see or leave anything among the user's own models and conversations.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="cpuinfer-tests-")

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from cpuinfer.config import ModelConfig
from cpuinfer.gguf import open_gguf
from cpuinfer.models.llama import Llama
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf
from tools import random_model

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)

#: Test material made by others; it lies beside the repository, not in it.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

#: Tensors as `write_gguf` takes them: name, type, packed rows.
Tensors = list[tuple[str, GGMLType, NDArray[np.uint8]]]

TINY = ModelConfig(
    dim=64,
    hidden_dim=96,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    vocab_size=50,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_dim=16,
    sliding_window=None,
    context_length=128,
)


def shared(path: str) -> Path:
    """A file of the shared test material; the test is skipped where it is not there."""
    if not (SHARED / path).exists():
        pytest.skip(f"no {SHARED / path}")
    return SHARED / path


def dequantized(packed: NDArray[np.uint8], qtype: GGMLType) -> NDArray[np.float64]:
    """(..., row_bytes) -> (..., cols), by gguf-py."""
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(qtype))
        return values.astype(np.float64)


def random_rows(
    qtype: GGMLType, rows: int, cols: int, spread: float = 1.0, seed: int = 0
) -> NDArray[np.uint8]:
    """Packed rows of random weights about `spread` large."""
    return random_model.random_rows(np.random.default_rng(seed), qtype, rows, cols, spread)


def llama_metadata(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys of a file with this configuration and no vocabulary."""
    keys: dict[str, int | float] = {
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.rope_dim,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
    named = {f"llama.{name}": value for name, value in keys.items()}
    return {"general.architecture": "llama", **named}


def llama_tensors(
    config: ModelConfig, qtype: GGMLType = GGMLType.F32, output: GGMLType | None = None
) -> Tensors:
    """Random weights of this type, the output matrix of type `output` if there is one."""
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {"token_embd": (config.vocab_size, config.dim), "output_norm": (config.dim,)}
    if output is not None:
        shapes["output"] = (config.vocab_size, config.dim)
    for layer in range(config.n_layers):
        for name, shape in {
            "attn_norm": (config.dim,),
            "attn_q": (q_rows, config.dim),
            "attn_k": (kv_rows, config.dim),
            "attn_v": (kv_rows, config.dim),
            "attn_output": (config.dim, q_rows),
            "ffn_norm": (config.dim,),
            "ffn_gate": (config.hidden_dim, config.dim),
            "ffn_up": (config.hidden_dim, config.dim),
            "ffn_down": (config.dim, config.hidden_dim),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    tensors: Tensors = []
    for seed, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            norm = np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
            tensors.append((f"{name}.weight", GGMLType.F32, norm.view(np.uint8)))
            continue
        kind = output if name == "output" and output is not None else qtype
        spread = 1.0 if name == "token_embd" else 1.5 / np.sqrt(shape[1])
        tensors.append((f"{name}.weight", kind, random_rows(kind, *shape, spread, seed)))
    return tensors


def load_llama(
    path: Path,
    config: ModelConfig,
    tensors: Tensors,
    kv_type: str = "f32",
    threads: int = 1,
    chunk: int = 256,
) -> Llama:
    """The model that reads these tensors from a file at `path`."""
    write_gguf(path, llama_metadata(config), tensors)
    file = open_gguf(path)
    return Llama(file, ModelConfig.from_gguf(file), kv_type, threads, chunk=chunk)


def start_python(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A Python process that finds the package, the tools and the test files."""
    tests = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tests,
        env=os.environ | {"PYTHONPATH": str(tests.parent)} | environment,
    )


def run_python(script: str, *arguments: object, **environment: str) -> str:
    """What a script prints; it must succeed."""
    with start_python("-c", script, *arguments, **environment) as child:
        output, _ = child.communicate(timeout=300)
    assert child.returncode == 0, output
    return output
