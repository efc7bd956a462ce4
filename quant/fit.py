"""The searches and roundings of ggml-quants.c over arrays of groups.

Groups are rows, (n, size) float32, contiguous; scales and mins are (n,) float32, integers (n, size)
uint8. The loops are in quant/kernels; Numba is imported, and compiles, with the first that is used.
"""

import threading
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]

_importing = threading.Lock()

EPSILON = np.float32(1e-15)  # GROUP_MAX_EPS of ggml-quants.c: scales below count as zero


def affine(
    x: Floats, weights: Floats, highest: int, first: float, step: float, tries: int
) -> tuple[Floats, Floats, Levels]:
    """Scale, low and q of x = scale * q - low, q 0..highest, by the weighted squared error."""
    return _affine(x, weights, highest, first, step, tries, absolute=False)


def affine_weighted(x: Floats, weights: Floats, highest: int) -> tuple[Floats, Floats, Levels]:
    """The same with what ggml-quants.c tries where importances are given."""
    return affine(x, weights, highest, first=-0.9, step=0.05, tries=37)


def affine_absolute(
    x: Floats, weights: Floats, highest: int, first: float, step: float, tries: int
) -> tuple[Floats, Floats, Levels]:
    """As `affine`, by the weighted absolute error."""
    return _affine(x, weights, highest, first, step, tries, absolute=True)


def _affine(
    x: Floats,
    weights: Floats,
    highest: int,
    first: float,
    step: float,
    tries: int,
    absolute: bool,
) -> tuple[Floats, Floats, Levels]:
    kernels = _compiled("affine")
    scale, low, q = _scales(x), _scales(x), np.empty(x.shape, np.uint8)
    kernels.affine(x, weights, highest, first, step, tries, absolute, scale, low, q)
    return scale, low, q


def positive(x: Floats, weights: Floats, highest: int) -> tuple[Floats, Levels]:
    """Scale and q of x = scale * q, q 0..highest, for x that is not negative."""
    kernels = _compiled("affine")
    scale, q = _scales(x), np.empty(x.shape, np.uint8)
    kernels.positive(x, weights, highest, scale, q)
    return scale, q


def signed(x: Floats, weights: Floats, half: int) -> tuple[Floats, Levels]:
    """Scale and q of x = scale * (q - half), q 0..2 * half - 1; both are 0 where x is."""
    kernels = _compiled("signed")
    scale, q = _scales(x), np.empty(x.shape, np.uint8)
    kernels.signed(x, weights, half, scale, q)
    return scale, q


def refined(x: Floats, weights: Floats, half: int) -> tuple[Floats, Levels]:
    """As `signed`, found integer by integer."""
    kernels = _compiled("signed")
    scale, q = _scales(x), np.empty(x.shape, np.uint8)
    kernels.refined(x, weights, half, scale, q)
    return scale, q


def round_to(x: Floats, scale: Floats, low: Floats, lowest: int, highest: int, q: Levels) -> Levels:
    """q of x = scale * (q + lowest) - low, 0..highest - lowest, into q; it stays where scale is 0.

    `scale` and `low` have one value a group, in any shape.
    """
    kernels = _compiled("blocks")
    kernels.nearest(x, scale.reshape(-1), low.reshape(-1), lowest, highest, q)
    return q


def from_furthest(x: Floats, half: int) -> tuple[Floats, Levels]:
    """Scale and q of x = scale * (q - half): the value furthest from zero becomes 0."""
    kernels = _compiled("blocks")
    scale, q = _scales(x), np.empty(x.shape, np.uint8)
    kernels.from_furthest(x, half, scale, q)
    return scale, q


def from_range(x: Floats, highest: int) -> tuple[Floats, Floats, Levels]:
    """Scale, low and q of x = scale * q + low: the smallest becomes 0, the largest `highest`."""
    kernels = _compiled("blocks")
    scale, low, q = _scales(x), _scales(x), np.empty(x.shape, np.uint8)
    kernels.from_range(x, highest, scale, low, q)
    return scale, low, q


def to_127(x: Floats) -> tuple[Floats, NDArray[np.int8]]:
    """Scale and q of x = scale * q: the value furthest from zero becomes -127 or 127."""
    kernels = _compiled("blocks")
    scale, q = _scales(x), np.empty(x.shape, np.int8)
    kernels.to_127(x, scale, q)
    return scale, q


def pack_planes(values: NDArray[Any], bits: int) -> Levels:
    """(n, 8 // bits * width) -> (n, width), 4 dividing width: packing.unpack_planes undone."""
    kernels = _compiled("blocks")
    packed = np.empty((len(values), values.shape[1] * bits // 8), np.uint8)
    values = np.ascontiguousarray(values, np.uint8)
    kernels.pack(values.view(np.uint32), bits, packed.view(np.uint32))
    return packed


def to_f16(x: Floats) -> NDArray[np.uint16]:
    """(n,) -> the bits of IEEE halves, to the nearest, ties to even."""
    kernels = _compiled("halves")
    out = np.empty(len(x), np.uint16)
    kernels.to_f16(x, out)
    return out


def from_f16(bits: NDArray[np.uint16]) -> Floats:
    """(n,) bits of IEEE halves -> their values."""
    kernels = _compiled("halves")
    out = np.empty(len(bits), np.float32)
    kernels.from_f16(bits, out)
    return out


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """(n,) -> the upper 16 bits, to the nearest, ties to even; NaN stays NaN."""
    kernels = _compiled("halves")
    out = np.empty(len(x), np.uint16)
    kernels.to_bf16(x, out)
    return out


def sums(x: Floats) -> Floats:
    """The sum of each row, in order."""
    kernels = _compiled("blocks")
    out = _scales(x)
    kernels.sums(x, out)
    return out


def importance(x: Floats, weights: Floats, part: int, factor: int) -> Floats:
    """weights * sqrt(factor * mean + x**2), mean the mean square of each `part` values of x.

    x (n, size) and the result are alike; weights too, or one row for all.
    """
    squares = x * x
    mean = np.float32(factor) * sums(squares.reshape(-1, part)) / np.float32(part)
    spread = np.sqrt(mean[:, None] + squares.reshape(-1, part)).reshape(x.shape)
    spread *= weights
    return spread


def nearest_int(x: Floats) -> NDArray[np.int32]:
    """nearest_int of ggml-quants.c: halves to even, and its answers for what is no such integer."""
    bits: NDArray[np.int32] = (x + np.float32(12582912)).view(np.int32)
    return (bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


def furthest(x: Floats) -> Floats:
    """The value of each row that is furthest from zero, the first of equals."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)[:, 0]


def share(x: Floats, highest: int) -> tuple[Floats, Levels]:
    """x (n, groups) that is not negative as a scale (n,) times integers 0..highest: the largest
    of each row becomes `highest`."""
    largest: Floats = np.fmax.reduce(x, axis=1)
    largest[~(largest > 0)] = 0  # not -0.0, which has other bits
    factor = np.where(largest > 0, np.float32(highest) / largest, np.float32(0))
    q = nearest_int(factor[:, None] * x).astype(np.uint8)  # wraps around, as in C
    return largest / np.float32(highest), np.minimum(q, np.uint8(highest))


def _compiled(name: str) -> Any:
    """A module of quant.kernels; modules that import each other are not safe in several threads."""
    with _importing:
        return import_module(f"quant.kernels.{name}")


def _scales(x: Floats) -> Floats:
    return np.empty(len(x), np.float32)
