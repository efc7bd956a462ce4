"""Causal attention of new tokens over a ring of keys and values (cache.py), window included.

The mask is two loop bounds: a query at position p sees positions max(0, p - window + 1) to p, which
lie in at most two runs of slots.  Keys and values are half or single precision; arithmetic is
float32.  A score is 16 lane sums added in a fixed tree; the softmax and the weighted sum of values
take positions in order, counted from the first one seen.  So what a query gets depends on its
position and what it sees, not on the chunk it came in.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from cpuinfer.kernels.jit import Kernel, inner, kernel
from cpuinfer.kernels.parallel import shared
from cpuinfer.kernels.simd import F32, I64, LANES, Emitter, Value, emitted

Load = Callable[[Emitter, Value], Value]

#: Keys whose values are summed before the next ones are read: they stay in the L1 cache.
VALUE_BLOCK = 64


def _scores(size: int, load: Load, heads: int) -> Any:
    def scores(
        e: Emitter,
        q: Value,
        keys: Value,
        count: Value,
        head_size: Value,
        scale: float,
        out: Value,
        out_stride: Value,
    ) -> None:
        """out[head][i] = scale * q[head] . key[i] for `count` keys that lie together."""
        zero = ir.Constant(I64, 0)
        chunks = e.b.udiv(head_size, ir.Constant(I64, LANES))
        with e.loop(count) as i:
            key = e.b.add(keys, e.b.mul(i, e.at(zero, head_size, size)))
            sums = [[e.variable(e.zeros()) for _ in range(e.parts)] for _ in range(heads)]
            with e.loop(chunks) as chunk:
                for part in range(e.parts):
                    lane = part * e.width
                    k = load(e, e.at(e.at(key, lane, size), chunk, LANES * size))
                    for head in range(heads):
                        row = e.at(e.at(q, head_size, 4 * head), lane, 4)
                        x = e.load_floats(e.at(row, chunk, LANES * 4))
                        e.set(sums[head][part], e.fma(x, k, e.get(sums[head][part])))
            for head in range(heads):
                dot = e.sum_lanes([e.get(part) for part in sums[head]])
                row = e.at(out, out_stride, 4 * head)
                e.store(e.b.fmul(dot, scale), e.at(row, i, 4))

    return emitted(scores)


@emitted
def _softmax(e: Emitter, scores: Value, chunks: Value) -> None:
    """In place, over chunks of 16 scores; -inf, as beyond the last one, becomes 0."""
    lanes = [e.width * part for part in range(e.parts)]
    largest = [e.variable(e.floats(-np.inf)) for _ in lanes]
    sums = [e.variable(e.zeros()) for _ in lanes]
    with e.loop(chunks) as chunk:
        for i, lane in enumerate(lanes):
            x = e.load_floats(e.at(e.at(scores, lane, 4), chunk, 4 * LANES))
            e.set(largest[i], e.maximum(e.get(largest[i]), x))
    top = e.splat(e.max_lanes([e.get(m) for m in largest]))
    with e.loop(chunks) as chunk:
        for i, lane in enumerate(lanes):
            address = e.at(e.at(scores, lane, 4), chunk, 4 * LANES)
            weight = e.exp(e.b.fsub(e.load_floats(address), top))
            e.store(weight, address)
            e.set(sums[i], e.b.fadd(e.get(sums[i]), weight))
    total = e.sum_lanes([e.get(s) for s in sums])
    inverse = e.splat(e.b.fdiv(ir.Constant(F32, 1.0), total))
    with e.loop(chunks) as chunk:
        for lane in lanes:
            address = e.at(e.at(scores, lane, 4), chunk, 4 * LANES)
            e.store(e.b.fmul(e.load_floats(address), inverse), address)


def _mix(size: int, load: Load, heads: int) -> Any:
    def mix(
        e: Emitter,
        weights: Value,
        stride: Value,
        values: Value,
        count: Value,
        head_size: Value,
        out: Value,
    ) -> None:
        """out[head] += sum over i of weight[head][i] * value[i], in order of i."""
        chunks = e.b.udiv(head_size, ir.Constant(I64, LANES))
        with e.loop(chunks) as chunk:
            column = e.at(values, chunk, LANES * size)
            places = []
            for head in range(heads):
                row = e.at(e.at(out, head_size, 4 * head), chunk, LANES * 4)
                places.append([e.at(row, part * e.width, 4) for part in range(e.parts)])
            sums = [[e.variable(e.zeros()) for _ in head] for head in places]
            for slots, row in zip(sums, places, strict=True):
                for slot, place in zip(slots, row, strict=True):
                    e.set(slot, e.load_floats(place))
            with e.loop(count) as i:
                value = e.b.add(column, e.b.mul(i, e.at(ir.Constant(I64, 0), head_size, size)))
                repeated = [
                    e.repeat_float(e.at(e.at(weights, stride, 4 * head), i, 4))
                    for head in range(heads)
                ]
                for part in range(e.parts):
                    v = load(e, e.at(value, part * e.width, size))
                    for head in range(heads):
                        slot = sums[head][part]
                        e.set(slot, e.fma(repeated[head], v, e.get(slot)))
            for slots, row in zip(sums, places, strict=True):
                for slot, place in zip(slots, row, strict=True):
                    e.store(e.get(slot), place)

    return emitted(mix)


def _attention(name: str, number: str, size: int, load: Load) -> Kernel:
    """The kernel for a ring whose numbers have `size` bytes and are read by `load`."""
    score_1, score_2, score_4 = (_scores(size, load, n) for n in (1, 2, 4))
    mix_1, mix_2, mix_4 = (_mix(size, load, n) for n in (1, 2, 4))
    ring = f"{number}[:,:,::1]"

    @inner(f"attend_{name}_score")
    def score(n, x, keys, count, size, scale, out, stride):  # type: ignore[no-untyped-def]
        if n == 4:
            score_4(x, keys, count, size, scale, out, stride)
        elif n == 2:
            score_2(x, keys, count, size, scale, out, stride)
        else:
            score_1(x, keys, count, size, scale, out, stride)

    @inner(f"attend_{name}_weigh")
    def weigh(n, weights, stride, values, count, size, row, out):  # type: ignore[no-untyped-def]
        for i in range(0, count, VALUE_BLOCK):
            some = min(VALUE_BLOCK, count - i)
            if n == 4:
                mix_4(weights + 4 * i, stride, values + i * row, some, size, out)
            elif n == 2:
                mix_2(weights + 4 * i, stride, values + i * row, some, size, out)
            else:
                mix_1(weights + 4 * i, stride, values + i * row, some, size, out)

    @shared(f"attend_{name}_items")
    def some_items(begin, end, seat, q, keys, values, start, window, scale, scores, out):  # type: ignore[no-untyped-def]
        tokens, n_heads, size = q.shape
        n_kv_heads, capacity, _ = keys.shape
        group = n_heads // n_kv_heads
        stride = scores.shape[2]
        row = size * keys.itemsize
        for item in range(begin, end):
            kv, t = item // tokens, item % tokens
            first = max(0, start + t - window + 1)
            count = start + t + 1 - first
            run = min(count, capacity - first % capacity)  # slots before the ring's end
            ring = kv * capacity * row
            oldest = ring + first % capacity * row
            out[t, kv * group : (kv + 1) * group] = 0.0
            head = 0
            while head < group:
                n = 4 if group - head >= 4 else 2 if group - head >= 2 else 1
                here = (t * n_heads + kv * group + head) * size * 4
                x, o = q.ctypes.data + here, out.ctypes.data + here
                s = scores.ctypes.data + (seat * group + head) * stride * 4
                k, v = keys.ctypes.data, values.ctypes.data
                score(n, x, k + oldest, run, size, scale, s, stride)
                score(n, x, k + ring, count - run, size, scale, s + 4 * run, stride)
                for i in range(head, head + n):
                    scores[seat, i, count : (count + 15) // 16 * 16] = -np.inf
                    _softmax(s + 4 * (i - head) * stride, (count + 15) // 16)
                weigh(n, s, stride, v + oldest, run, size, row, o)
                weigh(n, s + 4 * run, stride, v + ring, count - run, size, row, o)
                head += n

    @kernel(
        f"attend_{name}", f"void(f4[:,:,::1],{ring},{ring},i8,i8,f4,f4[:,:,::1],f4[:,:,::1],i8)"
    )
    def attend(q, keys, values, start, window, scale, scores, out, table):  # type: ignore[no-untyped-def]
        """out[t, h] = softmax(scale * q[t, h] . keys) . values over what position start + t sees.

        q, out (T, H, S) float32, S a multiple of 16; keys, values (K, capacity, S) of one layer,
        the new tokens' own included; scores (threads, H / K, window or more, a multiple of 16).
        """
        items = q.shape[0] * keys.shape[0]
        some_items(table, items, 1, (q, keys, values, start, window, scale, scores, out))

    return attend


def _copy(size: int, store: Callable[[Emitter, Value, Value], None]) -> Any:
    def copy(e: Emitter, source: Value, target: Value, chunks: Value) -> None:
        with e.loop(chunks) as chunk:
            for part in range(e.parts):
                x = e.load_floats(e.at(e.at(source, part * e.width, 4), chunk, 4 * LANES))
                store(e, x, e.at(e.at(target, part * e.width, size), chunk, size * LANES))

    return emitted(copy)


def _appender(name: str, number: str, copy: Any) -> Kernel:
    @kernel(f"append_{name}", f"void({number}[:,:,::1],f4[:,:,::1],i8)")
    def append(ring, new, start):  # type: ignore[no-untyped-def]
        """Write new (T, K, S) float32 to ring (K, capacity, S) from position start on."""
        n_kv_heads, capacity, size = ring.shape
        for t in range(new.shape[0]):
            slot = (start + t) % capacity
            for head in range(n_kv_heads):
                target = ring.ctypes.data + (head * capacity + slot) * size * ring.itemsize
                source = new.ctypes.data + (t * n_kv_heads + head) * size * 4
                copy(source, target, size // 16)

    return append


#: By the name of the cache's number type.
ATTEND = {
    "f16": _attention("f16", "u2", 2, lambda e, address: e.load_halves(address)),
    "f32": _attention("f32", "f4", 4, lambda e, address: e.load_floats(address)),
}
APPEND = {
    "f16": _appender("f16", "u2", _copy(2, lambda e, x, address: e.store_halves(x, address))),
    "f32": _appender("f32", "f4", _copy(4, lambda e, x, address: e.store(x, address))),
}
