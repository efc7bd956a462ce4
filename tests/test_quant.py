"""quant: every format against gguf-py and llama.cpp, bit for bit, and its limits."""

import ctypes
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import start_python
from numpy.typing import NDArray

from quant import FORMATS, WEIGHTED, dequantize, fit, quantize, quantize_weighted
from quant.ggml_types import GGMLType

LEGACY = [t for t in FORMATS if t.block_size == 32]
K_TYPES = [t for t in FORMATS if t.block_size == 256]
BLOCKS = [t for t in FORMATS if t.block_size > 1]

every_format = pytest.mark.parametrize("qtype", FORMATS, ids=lambda t: t.name)
every_legacy = pytest.mark.parametrize("qtype", LEGACY, ids=lambda t: t.name)
every_block = pytest.mark.parametrize("qtype", BLOCKS, ids=lambda t: t.name)
every_weighted = pytest.mark.parametrize("qtype", WEIGHTED, ids=lambda t: t.name)


def theirs(qtype: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(qtype)


def random_bytes(qtype: GGMLType, rows: int, blocks: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(rows * 1000 + blocks)
    return rng.integers(0, 256, (rows, blocks * qtype.block_bytes), dtype=np.uint8)


def ordinary_blocks(qtype: GGMLType, rows: int, blocks: int) -> NDArray[np.uint8]:
    """Random integers under finite scales of the size that weights have."""
    rng = np.random.default_rng(7)
    layout = FORMATS[qtype].LAYOUT
    if layout.names is None:
        values = rng.standard_normal((rows, blocks)).astype(np.float32)
        return gguf.quants.quantize(values, theirs(qtype)).view(np.uint8)
    packed = random_bytes(qtype, rows, blocks).reshape(-1).view(layout)
    for field in {"d", "m", "dmin"} & set(layout.names):
        packed[field] = rng.normal(0, 0.05, len(packed))
    return packed.view(np.uint8).reshape(rows, -1)


def zero_blocks(qtype: GGMLType, rows: int, blocks: int) -> NDArray[np.uint8]:
    return np.zeros((rows, blocks * qtype.block_bytes), np.uint8)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bit for bit; a NaN only has to be some NaN."""
    assert got.dtype == np.float32
    assert got.shape == want.shape
    different = (got.view(np.uint32) != want.view(np.uint32)) & ~(np.isnan(got) & np.isnan(want))
    assert not different.any(), np.argwhere(different)[:5]


@every_format
def test_sizes_are_those_of_gguf(qtype: GGMLType) -> None:
    sizes = gguf.GGML_QUANT_SIZES[theirs(qtype)]
    assert (qtype.block_size, qtype.block_bytes) == sizes
    assert (FORMATS[qtype].BLOCK_SIZE, FORMATS[qtype].LAYOUT.itemsize) == sizes
    assert qtype.name == theirs(qtype).name


def test_every_type_has_a_format() -> None:
    assert set(FORMATS) == set(GGMLType)


@every_format
@pytest.mark.parametrize("make", [ordinary_blocks, zero_blocks, random_bytes])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3), (1, 300)])
def test_dequantize_equals_gguf(qtype: GGMLType, make, rows: int, blocks: int) -> None:
    packed = make(qtype, rows, blocks)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(packed, theirs(qtype))
    packed.flags.writeable = False
    assert_same_bits(dequantize(packed, qtype), want)


@every_format
def test_dequantize_keeps_leading_axes(qtype: GGMLType) -> None:
    packed = ordinary_blocks(qtype, 6, 2)
    flat = dequantize(packed, qtype)
    assert flat.shape == (6, 2 * qtype.block_size)
    np.testing.assert_array_equal(
        dequantize(packed.reshape(2, 3, -1), qtype), flat.reshape(2, 3, -1)
    )
    np.testing.assert_array_equal(dequantize(packed[::2], qtype), flat[::2])
    np.testing.assert_array_equal(dequantize(packed[1], qtype), flat[1])
    assert dequantize(packed[:0], qtype).shape == (0, 2 * qtype.block_size)


@every_format
def test_long_arrays_are_worked_in_steps(qtype: GGMLType) -> None:
    """More values than one step, and not a multiple of it."""
    blocks = 150_000 // qtype.block_size + 1
    packed = ordinary_blocks(qtype, 1, blocks)
    assert_same_bits(dequantize(packed, qtype), gguf.quants.dequantize(packed, theirs(qtype)))


def weights(kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(11)
    x = rng.standard_normal((7, 192)).astype(np.float32)
    if kind == "halves":  # with a scale of 1 / 8: exact ties of every rounding
        x = rng.integers(-16, 17, x.shape).astype(np.float32) / np.float32(16)
        x[:, ::32] = -1
    elif kind == "spike":
        x = np.where(rng.random(x.shape) < 0.02, np.float32(300), x * np.float32(1e-3))
    elif kind == "constant":
        x[:] = np.float32(-0.37)
    elif kind == "positive":
        x = np.abs(x)
    else:
        x = x * np.float32(kind) + np.float32(0)  # no -0.0, where gguf-py is not like llama.cpp
    return x


@pytest.mark.parametrize("qtype", sorted(set(FORMATS) - set(K_TYPES)), ids=lambda t: t.name)
@pytest.mark.parametrize(
    "kind", ["1", "0", "0.02", "2e4", "1e-6", "1e-30", "halves", "spike", "constant", "positive"]
)
def test_quantize_equals_gguf(qtype: GGMLType, kind: str) -> None:
    x = weights(kind)
    if kind == "2e4" and qtype is GGMLType.F16:
        x /= 2
    with np.errstate(all="ignore"):
        want = gguf.quants.quantize(x, theirs(qtype)).view(np.uint8)
    got = quantize(x, qtype)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)


@every_format
def test_quantize_keeps_leading_axes(qtype: GGMLType) -> None:
    x = np.random.default_rng(3).standard_normal((4, 2, 1024)).astype(np.float32)
    packed = quantize(x, qtype)
    assert packed.shape == (4, 2, qtype.row_bytes(1024))
    np.testing.assert_array_equal(quantize(x[:, 1], qtype), packed[:, 1])
    long = np.tile(x.ravel(), 20)  # longer than one step
    np.testing.assert_array_equal(quantize(long, qtype), np.tile(packed.ravel(), 20))


def test_roundings_by_hand() -> None:
    """Q8_0 rounds halves away from zero, Q4_0 up, and each block's extreme is exact."""
    x = np.zeros(32, np.float32)
    x[:6] = 127, 0.5, 1.5, 2.5, -0.5, -2.5
    assert quantize(x, GGMLType.Q8_0)[2:8].view(np.int8).tolist() == [127, 1, 2, 3, -1, -3]
    x[:6] = -8, 0.5, 1.5, -0.5, -1.5, 7.9  # scale 1, integers are value + 8
    q4_0 = quantize(x, GGMLType.Q4_0)
    assert q4_0[:2].view(np.float16)[0] == 1
    assert (q4_0[2:8] & 15).tolist() == [0, 9, 10, 8, 7, 15]
    assert (q4_0[2:] >> 4).tolist() == [8] * 16


# The largest error of a value, as a share of its block's largest: half a step, or for Q4_0 and
# Q5_0 a whole one at the end that the scale does not reach; and what the half scale rounds off.
# The smallest halves are 2**-24 apart.
ERROR_BOUNDS = {
    GGMLType.F32: 0,
    GGMLType.F16: 2**-11,
    GGMLType.BF16: 2**-8,
    GGMLType.Q4_0: 1 / 8 + 2**-11,
    GGMLType.Q4_1: 1 / 15 + 2**-10,
    GGMLType.Q5_0: 1 / 16 + 2**-11,
    GGMLType.Q5_1: 1 / 31 + 2**-10,
    GGMLType.Q8_0: 0.5 / 127 + 2**-11,
    # K types weigh errors, so a small value may be far off; a whole step and what scales lose.
    GGMLType.Q2_K: 2 / 3,
    GGMLType.Q3_K: 1 / 2,
    GGMLType.Q4_K: 2 / 15,
    GGMLType.Q5_K: 2 / 31,
    GGMLType.Q6_K: 2 / 32,
}


@every_format
def test_round_trip_error(qtype: GGMLType) -> None:
    x = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)
    error = np.abs(dequantize(quantize(x, qtype), qtype) - x).reshape(-1, qtype.block_size)
    largest = np.abs(x).reshape(-1, qtype.block_size).max(axis=1)
    assert (error.max(axis=1) <= ERROR_BOUNDS[qtype] * largest + 2**-25).all()


@every_legacy
@pytest.mark.parametrize("size", [1e-42, 1e-38])
def test_values_below_any_scale_become_zero(qtype: GGMLType, size: float) -> None:
    x = np.full((2, 64), size, np.float32)
    x[1, ::3] *= -1
    np.testing.assert_array_equal(dequantize(quantize(x, qtype), qtype), 0)


@every_legacy
@pytest.mark.parametrize("bad", [3e7, np.inf, -np.inf, np.nan])
def test_quantize_refuses_what_no_scale_holds(qtype: GGMLType, bad: float) -> None:
    x = np.ones((3, 64), np.float32)
    x[2, 40] = bad
    with pytest.raises(ValueError, match=f"{qtype.name} cannot hold"):
        quantize(x, qtype)


def test_halves_refuse_overflow_and_keep_infinity() -> None:
    with pytest.raises(ValueError, match="F16 cannot hold"):
        quantize(np.array([1, -70000], np.float32), GGMLType.F16)
    special = np.array([np.inf, -np.inf, np.nan], np.float32)
    for qtype in (GGMLType.F16, GGMLType.BF16, GGMLType.F32):
        np.testing.assert_array_equal(dequantize(quantize(special, qtype), qtype), special)


# llama.cpp's own quantizer, where it is installed


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """ggml-base of llama-cpp-python, which has not to be imported for it."""
    for place in map(Path, sys.path):
        for name in ("libggml-base.so", "libggml-base.dylib"):
            if (place / "llama_cpp/lib" / name).exists():
                library = ctypes.CDLL(str(place / "llama_cpp/lib" / name))
                library.ggml_quantize_chunk.restype = ctypes.c_size_t
                pointer, count = ctypes.c_void_p, ctypes.c_int64
                library.ggml_quantize_chunk.argtypes = (
                    [ctypes.c_int, pointer, pointer, count, count, count, pointer]
                )  # fmt: skip
                return library
    pytest.skip("llama-cpp-python is not installed")


def by_ggml(
    ggml: ctypes.CDLL,
    x: NDArray[np.float32],
    qtype: GGMLType,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    out = np.zeros((len(x), qtype.row_bytes(x.shape[1])), np.uint8)
    importance = None if weights is None else weights.ctypes.data
    written = ggml.ggml_quantize_chunk(
        qtype, x.ctypes.data, out.ctypes.data, 0, *x.shape, importance
    )
    assert written == out.nbytes
    return out


def rows(kind: str) -> NDArray[np.float32]:
    """(9, 512) ordinary or odd weights; more blocks than strips of lanes divide."""
    rng = np.random.default_rng(17)
    x = rng.standard_normal((9, 512)).astype(np.float32)
    odd = {
        "outlier": lambda: np.where(rng.random(x.shape) < 0.005, 50, x * 0.01),
        "one": lambda: np.where(np.arange(512) % 256 == 5, -3, 0 * x),
        "constant": lambda: np.full_like(x, -0.37),
        "positive constant": lambda: np.full_like(x, 0.37),
        "negative": lambda: -np.abs(x),
        "far from zero": lambda: 5 + np.abs(x) * 1e-3,
        "halves": lambda: x.astype(np.float16),
        "integers": lambda: rng.integers(-8, 8, x.shape),
        "ternary": lambda: rng.integers(-1, 2, x.shape),
        "half zero": lambda: np.where(np.arange(512) < 256, 0, x),
        "heavy tails": lambda: np.clip(rng.standard_cauchy(x.shape), -1e4, 1e4),
        "all sizes": lambda: x * 10.0 ** rng.integers(-12, 3, x.shape),
    }
    make = odd.get(kind, lambda: x * np.float64(kind))
    return np.ascontiguousarray(make().astype(np.float32))


KINDS = [
    *("1", "0", "-0.0", "0.02", "1e4", "1e-6", "1e-10", "1e-15", "1e-20", "1e-30", "1e-36"),
    *("1e-38", "1e-40", "1e-45", "outlier", "one", "constant", "positive constant", "negative"),
    *("far from zero", "halves", "integers", "ternary", "half zero", "heavy tails", "all sizes"),
]


@every_block
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_equals_ggml(ggml: ctypes.CDLL, qtype: GGMLType, kind: str) -> None:
    x = rows(kind)
    np.testing.assert_array_equal(quantize(x, qtype), by_ggml(ggml, x, qtype))


@pytest.mark.parametrize("qtype", K_TYPES, ids=lambda t: t.name)
def test_many_blocks_equal_ggml(ggml: ctypes.CDLL, qtype: GGMLType) -> None:
    """So many that the searches come to what they seldom do."""
    x = np.random.default_rng(19).standard_normal((128, 4096)).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, qtype), by_ggml(ggml, x, qtype))
    weights = np.random.default_rng(29).exponential(size=4096).astype(np.float32)
    got = quantize_weighted(x, weights, qtype)
    np.testing.assert_array_equal(got, by_ggml(ggml, x, qtype, weights))


@every_weighted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["even", "usual", "wide", "holes"])
def test_weighted_equals_ggml(
    ggml: ctypes.CDLL, qtype: GGMLType, kind: str, importance: str
) -> None:
    x, rng = rows(kind), np.random.default_rng(23)
    weights = {
        "even": np.ones(512),
        "usual": rng.exponential(size=512),
        "wide": 10 ** rng.uniform(-6, 6, 512),
        "holes": rng.random(512) < 0.5,
    }[importance].astype(np.float32)
    got = quantize_weighted(x, weights, qtype)
    np.testing.assert_array_equal(got, by_ggml(ggml, x, qtype, weights))


@pytest.mark.parametrize("qtype", [GGMLType.F16, GGMLType.BF16], ids=lambda t: t.name)
def test_floats_of_16_bits_equal_ggml(ggml: ctypes.CDLL, qtype: GGMLType) -> None:
    """Every exponent and sign, with fractions on, below and above the middle between two."""
    fractions = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF])
    bits = np.arange(512, dtype=np.uint32)[:, None] << 23 | fractions.astype(np.uint32)
    x = bits.view(np.float32).reshape(1, -1)
    x = np.ascontiguousarray(x[np.abs(x) < 65519][None])  # below what a half rounds to infinity
    np.testing.assert_array_equal(quantize(x, qtype), by_ggml(ggml, x, qtype))


# What holds without it


@every_weighted
def test_importance_moves_the_error(qtype: GGMLType) -> None:
    """Columns that count have less error than without weights, the others more."""
    x = np.random.default_rng(31).standard_normal((64, 512)).astype(np.float32)
    weights = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)
    plain = (dequantize(quantize(x, qtype), qtype) - x) ** 2
    weighted = (dequantize(quantize_weighted(x, weights, qtype), qtype) - x) ** 2
    assert weighted[:, ::4].mean() < 0.97 * plain[:, ::4].mean()
    assert weighted[:, 1::4].mean() > plain[:, 1::4].mean()


K_ERRORS = {  # root mean square of the error of normal weights of spread 1, as a share of it
    GGMLType.Q2_K: 0.30,
    GGMLType.Q3_K: 0.155,
    GGMLType.Q4_K: 0.077,
    GGMLType.Q5_K: 0.038,
    GGMLType.Q6_K: 0.0195,
}


@pytest.mark.parametrize("qtype", K_TYPES, ids=lambda t: t.name)
def test_mean_error_of_k_types(qtype: GGMLType) -> None:
    x = np.random.default_rng(37).standard_normal((64, 1024)).astype(np.float32)
    error = np.sqrt(np.mean((dequantize(quantize(x, qtype), qtype) - x) ** 2))
    assert 0.8 * K_ERRORS[qtype] < error < K_ERRORS[qtype]


@every_block
def test_zeros_stay_zeros(qtype: GGMLType) -> None:
    zeros = np.zeros((2, 512), np.float32)
    np.testing.assert_array_equal(dequantize(quantize(zeros, qtype), qtype), 0)


def test_halves_to_floats() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    assert_same_bits(fit.from_f16(bits), bits.view(np.float16).astype(np.float32))


def test_read_only_and_strided_rows(tmp_path: Path) -> None:
    x = np.random.default_rng(41).standard_normal((6, 512)).astype(np.float32)
    want = quantize(x[::2].copy(), GGMLType.Q4_K)
    x.flags.writeable = False
    np.testing.assert_array_equal(quantize(x[::2], GGMLType.Q4_K), want)


def test_wrong_weights_are_refused() -> None:
    x = np.zeros((2, 256), np.float32)
    for weights in (np.ones(255, np.float32), np.ones(256), np.ones((2, 256), np.float32)):
        with pytest.raises(ValueError, match="wanted 256 float32 weights"):
            quantize_weighted(x, weights, GGMLType.Q4_K)


def test_quantizing_is_all_that_loads_numba() -> None:
    script = (
        "import sys, numpy as np, quant; from quant.ggml_types import GGMLType as T;"
        "quant.dequantize(np.zeros((1, 18), np.uint8), T.Q4_0); print('numba' in sys.modules);"
        "quant.quantize(np.zeros((1, 32), np.float32), T.Q4_0); print('numba' in sys.modules)"
    )
    with start_python("-c", script) as child:
        assert child.communicate(timeout=300)[0].split() == ["False", "True"]


@pytest.mark.parametrize("damage", ["cut", "noise", "read-only"])
def test_a_cache_that_cannot_be_used(damage: str, tmp_path: Path) -> None:
    """Kernels are compiled again, whatever lies in their directory, and work without one."""
    script = (
        "import numpy as np, quant; from quant.ggml_types import GGMLType as T;"
        "print(quant.quantize(np.ones((1, 32), np.float32), T.Q8_0)[0, :3].tolist())"
    )

    def run() -> str:
        with start_python("-c", script, NUMBA_CACHE_DIR=str(tmp_path)) as child:
            return str(child.communicate(timeout=300)[0]).strip()

    want = run()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"noise")
    if damage == "read-only":
        subprocess.run(["chmod", "-R", "a-w", tmp_path], check=True)
    assert run() == want


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 33"):
        quantize(np.zeros((2, 33), np.float32), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="float32 arrays, got float64"):
        quantize(np.zeros((2, 32)), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="multiples of 18 bytes, got 17"):
        dequantize(np.zeros((2, 17), np.uint8), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="uint8 arrays, got int8"):
        dequantize(np.zeros((2, 18), np.int8), GGMLType.Q4_0)
