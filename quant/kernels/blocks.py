"""Values to the nearest integers of a block format, and what that is done with.

All sums run in the order of the values.
"""

import numpy as np
from numba import int8, uint32

from quant.kernels import lanes
from quant.kernels.jit import FLOAT, GROUPS, INT, LEVELS, SCALES, inner, inputs, kernel, results

f4, i4, u4 = np.float32, np.int32, np.uint32


@kernel(GROUPS, SCALES)
def sums(x, out):
    """out[n]: the sum of row n"""
    for j in range(len(x)):
        total = f4(0)
        for v in x[j]:
            total += v
        out[j] = total


@kernel(GROUPS, inputs(FLOAT, 1), inputs(FLOAT, 1), INT, INT, LEVELS)
def nearest(x, scale, low, lowest, highest, q):
    """x = scale * (q + lowest) - low, q 0..highest - lowest, nearest; q stays where scale is 0"""
    for j in range(len(x)):
        row, levels, s, m = x[j], q[j], scale[j], low[j]
        if s != f4(0):
            for i in range(len(row)):
                levels[i] = np.uint8(lanes.level((row[i] + m) / s, lowest, highest) - lowest)


@kernel(inputs(uint32, 2), uint32, results(uint32, 2))
def pack(values, bits, out):
    """(n, 8 // bits * width) -> (n, width): four bytes at a time, see packing.pack_planes"""
    width = out.shape[1]
    for j in range(len(out)):
        for i in range(width):
            packed = values[j, i]
            for plane in range(1, 8 // bits):
                packed |= values[j, plane * width + i] << u4(plane * bits)
            out[j, i] = packed


@inner
def _ranges(x, low, high):
    """The smallest and the largest value of each row; of equal ones, the first."""
    for j in range(len(x)):
        least = most = x[j, 0]
        for i in range(1, x.shape[1]):
            v = x[j, i]
            least = v if v < least else least
            most = v if v > most else most
        low[j], high[j] = least, most


@inner
def _inverse(scale):
    """1 / scale; 0 for 0, and where it is infinite: such a scale is stored as 0."""
    factor = f4(1) / scale
    return factor if np.isfinite(factor) else f4(0)


# Ranges are found in a loop of their own: so compilers make vectors of the other.


@kernel(GROUPS, INT, SCALES, LEVELS)
def from_furthest(x, half, scale, q):
    """x = scale * (q - half), the value furthest from zero at q = 0; else to the nearest, up"""
    low, high = np.empty_like(scale), np.empty_like(scale)
    _ranges(x, low, high)
    for j in range(len(x)):
        row, levels = x[j], q[j]
        furthest = high[j] if high[j] > -low[j] else low[j]
        if high[j] == -low[j]:
            for i in range(len(row) - 1, -1, -1):
                furthest = row[i] if abs(row[i]) == high[j] else furthest
        furthest += f4(0)  # -0.0 would give a scale of other bits
        scale[j] = furthest / f4(-half)
        factor = _inverse(scale[j])
        # Integers are 0 where a scale is too small, and `half` where it is 0: x86's casts in C
        shift = f4(0) if factor == f4(0) and scale[j] != f4(0) else f4(half) + f4(0.5)
        for i in range(len(row)):
            levels[i] = min(i4(row[i] * factor + shift), i4(2 * half - 1))


@kernel(GROUPS, INT, SCALES, SCALES, LEVELS)
def from_range(x, highest, scale, low, q):
    """x = scale * q + low, from the smallest value at 0 to the largest at `highest`"""
    high = np.empty_like(scale)
    _ranges(x, low, high)
    for j in range(len(x)):
        row, levels, least = x[j], q[j], low[j]
        scale[j] = (high[j] - least) / f4(highest)
        factor = _inverse(scale[j])
        for i in range(len(row)):
            levels[i] = min(i4((row[i] - least) * factor + f4(0.5)), highest)


@kernel(GROUPS, SCALES, results(int8, 2))
def to_127(x, scale, q):
    """x = scale * q, the value furthest from zero at -127 or 127; halves go away from zero"""
    low, high = np.empty_like(scale), np.empty_like(scale)
    _ranges(x, low, high)
    for j in range(len(x)):
        row, levels = x[j], q[j]
        scale[j] = max(abs(low[j]), abs(high[j])) / f4(127)
        factor = _inverse(scale[j])
        for i in range(len(row)):
            v = row[i] * factor
            whole = np.trunc(v)
            levels[i] = np.int8(i4(whole + np.trunc(f4(2) * (v - whole))))
