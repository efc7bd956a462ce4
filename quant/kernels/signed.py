"""x = scale * (q - half): the searches of ggml-quants.c for a scale alone."""

import numpy as np

from quant.fit import EPSILON
from quant.kernels import lanes
from quant.kernels.jit import GROUPS, INT, LEVELS, SCALES, inner, kernel
from quant.kernels.lanes import STRIP

f4, i4 = np.float32, np.int32


@inner
def _furthest(x, furthest):
    """The value of each lane that is furthest from zero, the first of equals."""
    for j in range(STRIP):
        furthest[j] = f4(0)
    for i in range(len(x)):
        for j in range(STRIP):
            v = x[i, j]
            furthest[j] = v if abs(v) > abs(furthest[j]) else furthest[j]


@inner
def _sums(x, w, factor, half, level, sum_lx, sum_l2):
    """Integers -half..half - 1 for a factor, and what the best scale for them needs."""
    for j in range(STRIP):
        sum_lx[j] = sum_l2[j] = f4(0)
    for i in range(len(x)):
        for j in range(STRIP):
            n = f4(lanes.level(factor[j] * x[i, j], i4(-half), i4(half - i4(1))))
            level[i, j] = n
            sum_lx[j] += w[i, j] * x[i, j] * n
            sum_l2[j] += w[i, j] * n * n


@inner
def _end(found, start, half, furthest, s, scale, q):
    """The scales and integers of a strip; 0 for all of a group that counts as zero."""
    lanes.store(found, start, half, q)
    for j in range(min(STRIP, len(q) - start)):
        scale[start + j] = s[j]
        if abs(furthest[j]) < EPSILON:
            scale[start + j] = f4(0)
            q[start + j] = 0


@kernel(GROUPS, GROUPS, INT, SCALES, LEVELS)
def signed(x, weights, half, scale, q):
    """x = scale * (q - half), q 0..2 * half - 1: make_qx_quants"""
    strips = np.empty((4, x.shape[1], STRIP), f4)
    v, w, level, found = strips[0], strips[1], strips[2], strips[3]
    rows = np.empty((6, STRIP), f4)
    furthest, factor, s, best = rows[0], rows[1], rows[2], rows[3]
    sum_lx, sum_l2 = rows[4], rows[5]
    better = np.empty(STRIP, np.bool_)
    for start in range(0, len(x), STRIP):
        lanes.load(x, start, v)
        lanes.load(weights, start, w)
        _furthest(v, furthest)
        for j in range(STRIP):
            factor[j] = f4(-half) / furthest[j]
        _sums(v, w, factor, half, found, sum_lx, sum_l2)
        for j in range(STRIP):
            s[j] = sum_lx[j] / sum_l2[j] if sum_l2[j] != f4(0) else f4(0)
            best[j] = s[j] * sum_lx[j]
        for t in range(-9, 10):
            if t == 0:
                continue
            for j in range(STRIP):
                factor[j] = -(f4(half) + f4(0.1) * f4(t)) / furthest[j]
            _sums(v, w, factor, half, level, sum_lx, sum_l2)
            for j in range(STRIP):
                lx, l2 = sum_lx[j], sum_l2[j]
                better[j] = (l2 > f4(0)) & (lx * lx > best[j] * l2)
                s[j] = lx / l2 if better[j] else s[j]
                best[j] = s[j] * lx if better[j] else best[j]
            lanes.take(level, better, found)
        _end(found, start, half, furthest, s, scale, q)


@inner
def _improve(x, w, level, lowest, highest, sum_lx, sum_l2, moved):
    """Move single integers of each lane where that makes its fit better; where any moved."""
    for j in range(STRIP):
        moved[j] = False
    for i in range(len(x)):
        for j in range(STRIP):
            v, n = x[i, j], level[i, j]
            lx = sum_lx[j] - w[i, j] * v * n
            l2 = sum_l2[j] - w[i, j] * n * n
            new = f4(lanes.level(v * l2 / lx, lowest, highest))
            possible = (lx > f4(0)) & (new != n)
            lx += w[i, j] * v * new
            l2 += w[i, j] * new * new
            better = lx * lx * sum_l2[j] > sum_lx[j] * sum_lx[j] * l2
            better = better & possible & (l2 > f4(0))
            level[i, j] = new if better else n
            sum_lx[j] = lx if better else sum_lx[j]
            sum_l2[j] = l2 if better else sum_l2[j]
            moved[j] = moved[j] | better


@kernel(GROUPS, GROUPS, INT, SCALES, LEVELS)
def refined(x, weights, half, scale, q):
    """x = scale * (q - half), q 0..2 * half - 1: make_q3_quants"""
    strips = np.empty((3, x.shape[1], STRIP), f4)
    v, w, found = strips[0], strips[1], strips[2]
    rows = np.empty((5, STRIP), f4)
    furthest, factor, s, sum_lx, sum_l2 = rows[0], rows[1], rows[2], rows[3], rows[4]
    moved = np.empty(STRIP, np.bool_)
    for start in range(0, len(x), STRIP):
        lanes.load(x, start, v)
        lanes.load(weights, start, w)
        _furthest(v, furthest)
        for j in range(STRIP):
            factor[j] = f4(-half) / furthest[j]
        _sums(v, w, factor, half, found, sum_lx, sum_l2)
        for _ in range(5):
            _improve(v, w, found, i4(-half), i4(half - i4(1)), sum_lx, sum_l2, moved)
            if not moved.any():
                break
        for j in range(STRIP):
            s[j] = sum_lx[j] / sum_l2[j] if sum_l2[j] > f4(0) else f4(0)
        _end(found, start, half, furthest, s, scale, q)
