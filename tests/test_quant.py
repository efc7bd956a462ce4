"""quant: every format against gguf-py, bit for bit, and its limits."""

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from quant import FORMATS, QUANTIZABLE, dequantize, quantize
from quant.ggml_types import GGMLType

LEGACY = [t for t in QUANTIZABLE if t.block_size == 32]
K_TYPES = [t for t in FORMATS if t.block_size == 256]

every_format = pytest.mark.parametrize("qtype", FORMATS, ids=lambda t: t.name)
every_quantizer = pytest.mark.parametrize("qtype", QUANTIZABLE, ids=lambda t: t.name)
every_legacy = pytest.mark.parametrize("qtype", LEGACY, ids=lambda t: t.name)


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
        x *= np.float32(kind)
    return x


@every_quantizer
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


@every_quantizer
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
}


@every_quantizer
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


@pytest.mark.parametrize("qtype", K_TYPES, ids=lambda t: t.name)
def test_k_types_have_no_quantizer_yet(qtype: GGMLType) -> None:
    with pytest.raises(ValueError, match=f"no quantizer for {qtype.name}"):
        quantize(np.zeros(256, np.float32), qtype)


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 33"):
        quantize(np.zeros((2, 33), np.float32), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="float32 arrays, got float64"):
        quantize(np.zeros((2, 32)), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="multiples of 18 bytes, got 17"):
        dequantize(np.zeros((2, 17), np.uint8), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="uint8 arrays, got int8"):
        dequantize(np.zeros((2, 18), np.int8), GGMLType.Q4_0)
