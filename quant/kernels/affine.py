"""x = scale * q - low: the searches of ggml-quants.c for a scale and a min."""

import numpy as np

from quant.fit import EPSILON
from quant.kernels import lanes
from quant.kernels.jit import FLAG, FLOAT, GROUPS, INT, LEVELS, SCALES, inner, kernel
from quant.kernels.lanes import STRIP

LOWEST = np.int32(-(2**31))  # no limit
f4, i4 = np.float32, np.int32


@inner
def _start(x, w, low, high, sum_w, sum_x):
    """The range of each lane, zero included below, and its weighted sums."""
    for j in range(STRIP):
        low[j] = high[j] = x[0, j]
        sum_w[j] = w[0, j]
        sum_x[j] = w[0, j] * x[0, j]
    for i in range(1, len(x)):
        for j in range(STRIP):
            v = x[i, j]
            low[j] = v if v < low[j] else low[j]
            high[j] = v if v > high[j] else high[j]
            sum_w[j] += w[i, j]
            sum_x[j] += w[i, j] * v
    for j in range(STRIP):
        low[j] = f4(0) if low[j] > f4(0) else low[j]


@inner
def _sums(x, w, factor, low, highest, level, sum_l, sum_l2, sum_xl):
    """Integers for a factor and a min, and what a least squares fit to them needs."""
    for j in range(STRIP):
        sum_l[j] = sum_l2[j] = sum_xl[j] = f4(0)
    for i in range(len(x)):
        for j in range(STRIP):
            n = f4(lanes.level(factor[j] * (x[i, j] - low[j]), i4(0), highest))
            level[i, j] = n
            weighted = w[i, j] * n
            sum_l[j] += weighted
            sum_l2[j] += weighted * n
            sum_xl[j] += weighted * x[i, j]


@inner
def _error(x, w, level, scale, low, absolute, error):
    """The weighted error of each lane, added to `error`."""
    for i in range(len(x)):
        for j in range(STRIP):
            d = scale[j] * level[i, j] + low[j] - x[i, j]
            d = abs(d) if absolute else d * d
            error[j] += w[i, j] * d


@inner
def _fit(sum_w, sum_x, sum_l, sum_l2, sum_xl, error):
    """Least squares: scale and min into sum_l and sum_l2; error 0, infinite where there is none."""
    for j in range(STRIP):
        d = sum_w[j] * sum_l2[j] - sum_l[j] * sum_l[j]
        scale = (sum_w[j] * sum_xl[j] - sum_x[j] * sum_l[j]) / d
        low = (sum_l2[j] * sum_x[j] - sum_l[j] * sum_xl[j]) / d
        above = low > f4(0)
        sum_l[j] = sum_xl[j] / sum_l2[j] if above else scale
        sum_l2[j] = f4(0) if above else low
        error[j] = f4(0) if d > f4(0) else f4(np.inf)


@kernel(GROUPS, GROUPS, INT, FLOAT, FLOAT, INT, FLAG, SCALES, SCALES, LEVELS)
def affine(x, weights, highest, first, step, tries, absolute, scale, low, q):
    """x = scale * q - low, q 0..highest: make_qkx2_quants, make_qkx3_quants

    Tries the factors (first + step * t + highest) / range for t 0..tries - 1; `absolute` weighs
    absolute errors instead of squares.
    """
    strips = np.empty((4, x.shape[1], STRIP), f4)
    v, w, level, found = strips[0], strips[1], strips[2], strips[3]
    rows = np.empty((11, STRIP), f4)
    floor, high, sum_w, sum_x, factor = rows[0], rows[1], rows[2], rows[3], rows[4]
    s, a, b, c, error, best = rows[5], rows[6], rows[7], rows[8], rows[9], rows[10]
    better = np.empty(STRIP, np.bool_)
    for start in range(0, len(x), STRIP):
        lanes.load(x, start, v)
        lanes.load(weights, start, w)
        _start(v, w, floor, high, sum_w, sum_x)
        for j in range(STRIP):
            factor[j] = f4(highest) / (high[j] - floor[j])
            s[j] = f4(1) / factor[j]
            best[j] = f4(0)
        _sums(v, w, factor, floor, highest, found, a, b, c)
        _error(v, w, found, s, floor, absolute, best)
        for t in range(tries):
            for j in range(STRIP):
                factor[j] = (first + step * f4(t) + f4(highest)) / (high[j] - floor[j])
            _sums(v, w, factor, floor, highest, level, a, b, c)
            _fit(sum_w, sum_x, a, b, c, error)
            _error(v, w, level, a, b, absolute, error)
            for j in range(STRIP):
                better[j] = error[j] < best[j]
                s[j] = a[j] if better[j] else s[j]
                floor[j] = b[j] if better[j] else floor[j]
                best[j] = error[j] if better[j] else best[j]
            lanes.take(level, better, found)
        lanes.store(found, start, i4(0), q)
        for j in range(min(STRIP, len(x) - start)):
            scale[start + j] = s[j]
            low[start + j] = -floor[j]


@inner
def _group_error(x, w, factor, highest):
    """The weighted squared error of a group at a factor."""
    scale = f4(1) / factor
    error = f4(0)
    for i in range(len(x)):
        d = x[i] - scale * f4(lanes.level(factor * x[i], LOWEST, highest))
        error += w[i] * d * d
    return error


@inner
def _refine(x, w, highest, sum_lx, sum_l2, q):
    """Moves single integers of a group while that makes its fit better; the best scale."""
    for _ in range(5):
        moved = False
        for i in range(len(x)):
            n = f4(q[i])
            lx = sum_lx - w[i] * x[i] * n
            l2 = sum_l2 - w[i] * n * n
            if lx > f4(0) and l2 > f4(0):
                new = lanes.level(x[i] * l2 / lx, LOWEST, highest)
                if new != q[i]:
                    lx += w[i] * x[i] * f4(new)
                    l2 += w[i] * f4(new) * f4(new)
                    if lx * lx * sum_l2 > sum_lx * sum_lx * l2:
                        q[i] = np.uint8(new)
                        sum_lx, sum_l2 = lx, l2
                        moved = True
        if not moved:
            break
    return sum_lx / sum_l2 if sum_l2 > f4(0) else f4(0)


@kernel(GROUPS, GROUPS, INT, SCALES, LEVELS)
def positive(x, weights, highest, scale, q):
    """x = scale * q, q 0..highest, for x from 0 on: make_qp_quants"""
    for j in range(len(x)):
        v, w, levels = x[j], weights[j], q[j]
        largest = f4(0)
        for i in range(len(v)):
            largest = v[i] if v[i] > largest else largest
        if largest < EPSILON:
            scale[j] = f4(0)
            levels[:] = 0
            continue
        factor = f4(highest) / largest
        best = _group_error(v, w, factor, highest)
        for t in range(-4, 5):
            if t != 0:
                other = (f4(0.1) * f4(t) + f4(highest)) / largest
                error = _group_error(v, w, other, highest)
                if error < best:
                    best, factor = error, other
        sum_lx = sum_l2 = f4(0)
        for i in range(len(v)):
            n = lanes.level(factor * v[i], LOWEST, highest)
            levels[i] = np.uint8(n)
            sum_lx += w[i] * v[i] * f4(n)
            sum_l2 += w[i] * f4(n) * f4(n)
        scale[j] = _refine(v, w, highest, sum_lx, sum_l2, levels)
