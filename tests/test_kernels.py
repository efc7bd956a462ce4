"""kernels, through ops: every product, attention and row operation against NumPy in float64.

Run once for each instruction set by test_instruction_sets.py.
"""

import functools
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import dequantized, random_rows
from numpy.typing import NDArray

from cpuinfer import ops, team, weights
from cpuinfer.cache import KVCache
from cpuinfer.gguf import QTensor
from cpuinfer.kernels.jit import kernel
from quant import FORMATS, quantize
from quant.ggml_types import GGMLType

Floats = NDArray[np.float32]

INTEGER = [
    GGMLType[f"Q{name}"] for name in ("4_0", "4_1", "5_0", "5_1", "8_0", "3_K", "4_K", "5_K", "6_K")
]
FLOAT = [GGMLType.F32, GGMLType.F16, GGMLType.BF16]
PLAIN = [GGMLType.Q2_K]
COUNTS = [*range(1, 14), 16, 31, 32, 33, 36, 47, 57]

every_type = pytest.mark.parametrize("qtype", INTEGER + FLOAT, ids=lambda t: t.name)
every_integer = pytest.mark.parametrize("qtype", INTEGER, ids=lambda t: t.name)
every_kv_type = pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
every_count_of_threads = pytest.mark.parametrize("threads", [1, 2, 3])


def weight(packed: NDArray[np.uint8], qtype: GGMLType) -> weights.Weight:
    """Packed rows, read-only as those of a file, made ready for `linear`."""
    packed = packed.view()
    packed.flags.writeable = False
    cols = packed.shape[1] // qtype.block_bytes * qtype.block_size
    return weights.pack(QTensor("test", qtype, (len(packed), cols), packed))


def activations(tokens: int, cols: int, seed: int = 1) -> Floats:
    """Rows whose blocks of 32 differ a thousandfold in size; one block is all zeros."""
    rng = np.random.default_rng(seed)
    sizes = np.repeat(10.0 ** rng.uniform(-2, 1, (tokens, -(-cols // 32))), 32, axis=1)
    x = (rng.standard_normal((tokens, cols)) * sizes[:, :cols]).astype(np.float32)
    if cols > 32:
        x[tokens // 2, 32:64] = 0
    return x


def rounded(x: Floats) -> NDArray[np.float64]:
    """What is left of x after 8 bits for each block of 32 (kernels/activations.py)."""
    blocks = x.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q, scale = np.rint(blocks * inverse), largest / np.float32(127)
    assert q.dtype == scale.dtype == np.float32
    return (q.astype(np.float64) * scale).reshape(x.shape)


def assert_product(got: Floats, x: Floats, packed: NDArray[np.uint8], qtype: GGMLType) -> None:
    """`got` is x times the rows within 1e-5 of the sum of the products' magnitudes."""
    w = dequantized(packed, qtype)
    a = rounded(x) if qtype in INTEGER else x.astype(np.float64)
    assert got.dtype == np.float32
    assert got.shape == (len(a), len(w))
    error = np.abs(got - a @ w.T)
    assert (error <= 1e-5 * (np.abs(a) @ np.abs(w).T)).all(), error.max()


# --- matrices ---


@functools.cache
def product(qtype: GGMLType) -> tuple[Floats, NDArray[np.uint8], weights.Weight, Floats]:
    """57 rows of activations, 40 of weights, packed and not, and their product."""
    packed = random_rows(qtype, 40, 768 if qtype.block_size == 256 else 352)
    w = weight(packed, qtype)
    x = activations(57, w.cols)
    return x, packed, w, ops.linear(x, w)[0]


@every_type
def test_product(qtype: GGMLType) -> None:
    x, packed, _, out = product(qtype)
    assert_product(out, x, packed, qtype)


@every_type
@pytest.mark.parametrize("tokens", COUNTS)
def test_a_row_is_the_same_in_any_number_of_rows(qtype: GGMLType, tokens: int) -> None:
    x, _, w, out = product(qtype)
    np.testing.assert_array_equal(ops.linear(x[:tokens], w)[0], out[:tokens])
    np.testing.assert_array_equal(ops.linear(x[57 - tokens :].copy(), w)[0], out[57 - tokens :])


@every_type
@every_count_of_threads
def test_threads_change_nothing(qtype: GGMLType, threads: int) -> None:
    x, packed, _, out = product(qtype)
    with team.computing(threads):
        w = weight(packed, qtype)
        for tokens in (1, 2, 57):
            np.testing.assert_array_equal(ops.linear(x[:tokens], w)[0], out[:tokens])
        # Many rows, so that they are shared out when they are rounded to bytes too.
        many = np.tile(x, (3, 1))[:131]
        np.testing.assert_array_equal(ops.linear(many, w)[0], np.tile(out, (3, 1))[:131])


@every_type
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("units", [1, 2, 3, 5, 7])
def test_odd_sizes(qtype: GGMLType, rows: int, units: int) -> None:
    """Columns: single ones for floats, blocks of 32 or 256."""
    cols = units * qtype.block_size
    packed, x = random_rows(qtype, rows, cols), activations(5, cols)
    assert_product(ops.linear(x, weight(packed, qtype))[0], x, packed, qtype)


@every_integer
@pytest.mark.parametrize("byte", [0x00, 0x0F, 0x7F, 0x80, 0xFF])
def test_blocks_of_one_byte(qtype: GGMLType, byte: int) -> None:
    """All integers at an end of their range, against activations that are all +127 or -127: where
    sums of 16 bits would overflow."""
    layout = FORMATS[qtype].LAYOUT
    packed = np.full((17, 2 * qtype.block_bytes), byte, np.uint8)
    for name in {"d", "m", "dmin"} & set(layout.names):
        packed.view(layout)[name] = np.linspace(-2, 3, 17)[:, None]
    x = np.ones((3, 2 * qtype.block_size), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    assert_product(ops.linear(x, weight(packed, qtype))[0], x, packed, qtype)


@every_type
def test_zeros(qtype: GGMLType) -> None:
    cols = 2 * qtype.block_size
    nothing = np.zeros((17, qtype.row_bytes(cols)), np.uint8)
    zero = weight(nothing, qtype)
    np.testing.assert_array_equal(ops.linear(activations(3, cols), zero)[0], np.zeros((3, 17)))
    x = np.zeros((3, cols), np.float32)
    some = weight(random_rows(qtype, 17, cols), qtype)
    np.testing.assert_array_equal(ops.linear(x, some)[0], np.zeros((3, 17)))


@every_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_no_numbers(qtype: GGMLType, value: float) -> None:
    x, _, w, out = product(qtype)
    x = x.copy()
    x[3, 100] = value
    got = ops.linear(x, w)[0]
    assert not np.isfinite(got[3]).any()
    np.testing.assert_array_equal(np.delete(got, 3, axis=0), np.delete(out, 3, axis=0))


@every_integer
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers(qtype: GGMLType, scale: float) -> None:
    x, packed, _, out = product(qtype)
    layout = FORMATS[qtype].LAYOUT
    for name in {"d", "m", "dmin"} & set(layout.names):
        damaged = packed.copy()
        damaged.view(layout)[name][7, 1] = scale
        got = ops.linear(x, weight(damaged, qtype))[0]
        assert not np.isfinite(got[:, 7]).any()
        np.testing.assert_array_equal(np.delete(got, 7, axis=1), np.delete(out, 7, axis=1))


@every_integer
def test_all_half_precision_scales(qtype: GGMLType) -> None:
    """Subnormal, largest and negative ones too."""
    layout = FORMATS[qtype].LAYOUT
    scales = np.arange(0, 1 << 16, 37, dtype=np.uint16).view(np.float16)
    scales = scales[np.isfinite(scales)]
    packed = random_rows(qtype, len(scales), qtype.block_size)
    for name in {"d", "m", "dmin"} & set(layout.names):
        packed.view(layout)[name][:, 0] = scales
    x = activations(1, qtype.block_size)
    assert_product(ops.linear(x, weight(packed, qtype))[0], x, packed, qtype)


@pytest.mark.parametrize("qtype", [GGMLType.F16, GGMLType.BF16], ids=lambda t: t.name)
def test_every_16_bit_number(qtype: GGMLType) -> None:
    packed = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    (out,) = ops.linear(np.ones((1, 1), np.float32), weight(packed, qtype))
    np.testing.assert_array_equal(out[0], dequantized(packed, qtype)[:, 0])


@every_type
@pytest.mark.parametrize("start", [0, 1])
def test_weights_in_a_mapped_file(qtype: GGMLType, start: int, tmp_path: Path) -> None:
    """Read-only memory; from an odd address as well."""
    x, packed, _, out = product(qtype)
    path = tmp_path / "weights"
    path.write_bytes(bytes(start) + packed.tobytes())
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped = np.frombuffer(content, np.uint8, packed.size, start).reshape(packed.shape)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(ops.linear(x, weight(mapped, qtype))[0], out)


@pytest.mark.parametrize("qtype", PLAIN, ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_types_without_a_kernel(qtype: GGMLType, rows: int) -> None:
    packed = random_rows(qtype, rows, 2 * qtype.block_size)
    x, w = activations(5, 2 * qtype.block_size), weight(packed, qtype)
    (out,) = ops.linear(x, w)
    assert_product(out, x, packed, qtype)
    np.testing.assert_array_equal(ops.linear(x[:1], w)[0], out[:1])


# --- attention ---


def sequence(length: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Floats, ...]:
    rng = np.random.default_rng(head_dim)
    shapes = [(length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v


def attend(q: Floats, k: Floats, v: Floats, window: int | None, chunk: int, kv_type: str) -> Floats:
    """The whole sequence, `chunk` tokens at a time, through a ring no larger than it must be."""
    capacity = len(q) if window is None else window + chunk - 1
    cache = KVCache(1, k.shape[1], q.shape[2], capacity, kv_type)
    outs = []
    for start in range(0, len(q), chunk):
        rows = slice(start, start + chunk)
        outs.append(ops.attend(q[rows], k[rows], v[rows], cache, 0, window))
        cache.advance(len(outs[-1]))
    return np.concatenate(outs)


def in_8_bits(x: Floats, scale_type: type) -> NDArray[np.float64]:
    """(T, H, d) rounded as Q8_0 is (ggml's quantize_row_q8_0): blocks of 32, the last one short."""
    blocks = np.zeros((*x.shape[:2], -(-x.shape[2] // 32) * 32), np.float32)
    blocks[..., : x.shape[2]] = x
    blocks = blocks.reshape(*x.shape[:2], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    whole = np.rint(blocks.astype(np.float64) / np.where(scale == 0, 1, scale))
    rounded: NDArray[np.float64] = whole * scale.astype(scale_type)
    return rounded.reshape(*x.shape[:2], -1)[..., : x.shape[2]]


@every_kv_type
@pytest.mark.parametrize("window", [None, 70, 5])
@pytest.mark.parametrize(
    ("group", "head_dim"),
    [*((group, 16) for group in (1, 2, 3, 4, 5, 8)), *((3, size) for size in (8, 64, 80, 128))],
)
def test_attention(group: int, head_dim: int, window: int | None, kv_type: str) -> None:
    q, k, v = sequence(150, 2 * group, 2, head_dim)
    got = attend(q, k, v, window, 33, kv_type)
    if kv_type == "f16":
        k, v = k.astype(np.float16), v.astype(np.float16)
    if kv_type == "q8_0":
        q, k, v = in_8_bits(q, np.float32), in_8_bits(k, np.float16), in_8_bits(v, np.float16)
    exact = [x.astype(np.float64) for x in (q, k, v)]
    want = reference.attention(*exact, reference.visible(len(q), window))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@every_kv_type
@pytest.mark.parametrize("window", [None, 24, 70])
@every_count_of_threads
def test_attention_does_not_depend_on_chunks_or_threads(
    window: int | None, kv_type: str, threads: int
) -> None:
    q, k, v = sequence(150, 6, 2, 16)
    with team.computing(1):
        want = attend(q, k, v, window, 150, kv_type)
    with team.computing(threads):
        for chunk in (1, 7, 23, 24, 25):
            np.testing.assert_array_equal(attend(q, k, v, window, chunk, kv_type), want)


def test_attention_to_one_key_among_many() -> None:
    """Scores hundreds apart: their weights underflow to zero without harm."""
    q, k, v = sequence(40, 2, 1, 16)
    q *= 200
    exact = [x.astype(np.float64) for x in (q, k, v)]
    want = reference.attention(*exact, reference.visible(40, None))
    np.testing.assert_allclose(attend(q, k, v, None, 40, "f32"), want, rtol=0, atol=2e-3)


@every_kv_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_attention_to_what_is_no_number(which: str, value: float, kv_type: str) -> None:
    rows = dict(zip("qkv", sequence(40, 2, 1, 16), strict=True))
    rows["q"][20, 0, 3] = np.copysign(1, value)  # so that an infinite key has the largest score
    rows[which][20, 0, 3] = value
    got = attend(*rows.values(), None, 40, kv_type)
    assert not np.isfinite(got[20, 0]).all()
    assert np.isfinite(got[:20]).all()


def test_keys_and_values_are_rounded_to_half_precision_as_numpy_does() -> None:
    rng = np.random.default_rng(3)
    with np.errstate(invalid="ignore"):  # signalling NaNs among them
        halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = halves[np.isfinite(halves)]
    ties = (finite[1:] + finite[:-1]) / 2
    near = [np.nextafter(ties, np.float32(limit)) for limit in (0, np.inf)]
    edges = np.array([65519.996, 65520, 65536, 3e38, 1e-8, 2.9e-8, 1e-40, 0], np.float32)
    bits = rng.integers(0, 1 << 32, 4096, np.uint32).view(np.float32)
    numbers = np.concatenate([halves, ties, *near, edges, bits])
    numbers = np.concatenate([numbers, -numbers, np.zeros(-2 * len(numbers) % 16, np.float32)])
    k = numbers.reshape(-1, 1, 16)
    cache = KVCache(1, 1, 16, len(k), "f16")
    ops.attend(np.zeros_like(k), k, k, cache, 0, window=1)
    with np.errstate(over="ignore", invalid="ignore"):
        want = k.astype(np.float16)
    for stored in (cache.keys, cache.values):
        got = stored[0].reshape(k.shape).view(np.float16)
        np.testing.assert_array_equal(got, want)  # any NaN equals any other
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


# --- rows ---


@every_count_of_threads
def test_silu_and_its_exponential(threads: int) -> None:
    rng = np.random.default_rng(4)
    gate = np.concatenate([np.linspace(-86, 86, 60001), rng.standard_normal(9005), [1e30, -0.0]])
    gate = gate.astype(np.float32)
    up = rng.uniform(-2, 2, gate.size).astype(np.float32)
    want = reference.silu(gate.astype(np.float64)) * up
    with team.computing(threads):
        got = ops.silu_mul(gate.reshape(1, -1).copy(), up.reshape(1, -1))[0]
    np.testing.assert_allclose(got, want, rtol=6e-7, atol=0)


def test_silu_of_large_and_no_numbers() -> None:
    gate = np.array([[-90, -104, -1e4, -3e38, 90, 3e38, np.inf, np.nan]], np.float32)
    got = ops.silu_mul(gate.copy(), np.ones_like(gate))[0]
    np.testing.assert_allclose(got[:4], 0, atol=1.5)
    np.testing.assert_allclose(got[:2], 0, atol=1e-36)
    np.testing.assert_array_equal(got[4:], gate[0, 4:])


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 172])
@pytest.mark.parametrize("tokens", [1, 5, 307])  # the last is work enough for several threads
@every_count_of_threads
def test_rms_norm(dim: int, tokens: int, threads: int) -> None:
    rng = np.random.default_rng(dim)
    x = (rng.standard_normal((tokens, dim)) * 10.0 ** -(np.arange(tokens)[:, None] % 5)).astype(
        "f4"
    )
    w = rng.standard_normal(dim).astype(np.float32)
    with team.computing(threads):
        whole = ops.rms_norm(x, w, 1e-5)
    want = reference.rms_norm(x.astype(np.float64), w.astype(np.float64), 1e-5)
    np.testing.assert_allclose(whole, want, rtol=1e-6)
    np.testing.assert_array_equal(ops.rms_norm(x[-1:], w, 1e-5), whole[-1:])


def test_rms_norm_of_zeros_and_no_numbers() -> None:
    x = np.ones((4, 20), np.float32)
    x[0], x[1, 5], x[2, 18] = 0, np.nan, np.inf
    got = ops.rms_norm(x, np.ones(20, np.float32), 1e-5)
    np.testing.assert_array_equal(got[0], np.zeros(20))
    assert np.isnan(got[1]).all()
    assert np.isnan(got[2, 18])
    assert np.isfinite(got[3]).all()


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(16, 16), (16, 6), (10, 10), (7, 2)])
@every_count_of_threads
def test_rope(head_dim: int, rope_dim: int, threads: int) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((701, 7, head_dim)).astype(np.float32)
    turns = np.exp(1j * rng.uniform(-9, 9, (701, rope_dim // 2)))
    got = x.copy()
    with team.computing(threads):
        ops.rope(got, turns.real.astype(np.float32), turns.imag.astype(np.float32))
    want = reference.rope(x.astype(np.float64), turns)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[:, :, rope_dim:], x[:, :, rope_dim:])


@pytest.mark.parametrize("largest", [1e-38, 1e-31, 1e-29])
def test_tiny_activations_give_tiny_or_no_products(largest: float) -> None:
    x = np.full((1, 32), largest, np.float32)
    w = weight(quantize(np.ones((1, 32), np.float32), GGMLType.Q8_0), GGMLType.Q8_0)
    (out,) = ops.linear(x, w)
    assert out[0, 0] == pytest.approx(32 * largest if largest > 2**-100 else 0, rel=1e-3)


def test_two_threads_may_make_one_kernel_ready() -> None:
    @kernel("twice", "i8(i8)")
    def twice(x):  # type: ignore[no-untyped-def]
        return 2 * x

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(twice, range(8))) == [2 * x for x in range(8)]
