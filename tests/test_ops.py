"""ops.py: what is checked before a kernel runs, shapes of results, which kernels a model needs.

The arithmetic is in test_kernels.py.
"""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, dequantized, llama_tensors, load_llama, random_rows, run_python
from numpy.typing import NDArray

from cpuinfer import ops, weights
from cpuinfer.cache import KVCache
from cpuinfer.gguf import QTensor
from quant.ggml_types import GGMLType


def tensor(qtype: GGMLType, rows: int, cols: int, seed: int = 0) -> QTensor:
    packed = random_rows(qtype, rows, cols, seed=seed)
    packed.flags.writeable = False
    return QTensor("test.weight", qtype, (rows, cols), packed)


def activations(tokens: int, cols: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((tokens, cols)).astype(np.float32)


@pytest.mark.parametrize("cols", [224, 288])
@pytest.mark.parametrize("qtype", GGMLType, ids=lambda t: t.name)
def test_linear_wants_as_many_activations_as_columns(qtype: GGMLType, cols: int) -> None:
    weight = weights.pack(tensor(qtype, 16, 256))
    with pytest.raises(ValueError, match=rf"test\.weight has 256 columns, got {cols} activ"):
        ops.linear(activations(2, cols), weight)


def test_linear_with_several_weights_is_linear_with_each() -> None:
    """Whatever the types: they want different forms of the activations."""
    x = activations(3, 256)
    packed = [weights.pack(tensor(t, 24, 256, seed=t)) for t in GGMLType for _ in range(2)]
    before = x.copy()
    for got, weight in zip(ops.linear(x, *packed), packed, strict=True):
        np.testing.assert_array_equal(got, ops.linear(x, weight)[0])
        assert got.dtype == np.float32
        assert got.shape == (3, 24)
        assert got.flags.c_contiguous
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("qtype", GGMLType, ids=lambda t: t.name)
def test_embed_is_the_rows_of_the_table(qtype: GGMLType) -> None:
    table = tensor(qtype, 20, 256)
    tokens = np.array([19, 0, 7, 7], np.int32)
    got = ops.embed(tokens, table)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, dequantized(table.data, qtype)[tokens])


@pytest.mark.parametrize("token", [-1, -20, 20, 2**31 - 1])
def test_embed_refuses_ids_that_are_none(token: int) -> None:
    with pytest.raises(ValueError, match=rf"0 to 19, got \[3, {token}\]"):
        ops.embed(np.array([3, token], np.int32), tensor(GGMLType.Q4_0, 20, 32))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 16), (2, 24), (5, 172)])
def test_silu_mul_takes_any_shape(shape: tuple[int, int]) -> None:
    gate, up = activations(*shape), activations(*shape) + 1
    want = gate / (1 + np.exp(-gate)) * up
    got = ops.silu_mul(gate, up)
    assert got.shape == shape
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("head_dim", [2, 15, 17, 40])
def test_heads_of_any_size_fit_the_cache(head_dim: int) -> None:
    v = activations(6, head_dim).reshape(6, 1, head_dim)
    cache = KVCache(1, 1, head_dim, 6, "f32")
    out = ops.attend(np.zeros_like(v), v, v, cache, 0, None)  # every key weighs the same
    counts = np.arange(1, 7)[:, None, None]
    np.testing.assert_allclose(out, v.cumsum(axis=0) / counts, rtol=0, atol=1e-6)


UNPREPARED_KERNELS = """
import sys
from pathlib import Path
from conftest import *
from cpuinfer import ops
from cpuinfer.kernels.jit import Kernel
from cpuinfer.models.llama import Span

path, kv_type, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
for kernel in ops.kernels_for({GGMLType[name] for name in names}, kv_type):
    kernel.prepare()
late, prepare = [], Kernel.prepare
Kernel.prepare = lambda self: late.append(self.name) or prepare(self)
file = open_gguf(path)
model = Llama(file, ModelConfig.from_gguf(file), kv_type)
model.forward([Span(np.arange(20, dtype=np.int32), model.make_cache(), 1)])
print(*late)
"""


@pytest.mark.parametrize(
    ("qtype", "output", "kv_type"),
    [
        (GGMLType.Q4_0, GGMLType.Q8_0, "f16"),
        (GGMLType.Q4_1, GGMLType.BF16, "f32"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_kernels_for_names_all_that_a_model_runs(
    qtype: GGMLType, output: GGMLType, kv_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    load_llama(path, TINY, llama_tensors(TINY, qtype, output), kv_type)
    late = run_python(UNPREPARED_KERNELS, path, kv_type, qtype.name, output.name)
    assert late.split() == []


@pytest.mark.parametrize("qtype", [GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.F16, GGMLType.F32])
@pytest.mark.parametrize("tokens", [1, 3, 14])
def test_matrices_packed_together_give_what_each_gives_alone(qtype: GGMLType, tokens: int) -> None:
    alike = [tensor(qtype, rows, 256, seed=rows) for rows in (32, 5, 17)]
    x = activations(tokens, 256)
    outs = ops.linear(x, weights.pack(*alike))
    assert [out.shape for out in outs] == [(tokens, 32), (tokens, 5), (tokens, 17)]
    for out, one in zip(outs, alike, strict=True):
        np.testing.assert_array_equal(out, ops.linear(x, weights.pack(one))[0])
