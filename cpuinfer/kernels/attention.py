"""Causal attention of new tokens over a ring of keys and values (cache.py), window included.

The mask is two loop bounds: a query at position p sees positions max(0, p - window + 1) to p, which
lie in at most two runs of slots.  How rows lie in the ring is `ring.py`'s; arithmetic is float32,
but for the products of 8-bit keys.  A score is 16 lane sums added in a fixed tree; the softmax and
the weighted sum of values take positions in order, counted from the first one seen.  So what a
query gets depends on its position and what it sees, not on the chunk it came in.
"""

from typing import Any

import numpy as np
from llvmlite import ir

from cpuinfer.kernels.jit import ISA, Kernel, inner, kernel
from cpuinfer.kernels.parallel import shared
from cpuinfer.kernels.ring import NUMBERS, Numbers, prepare_query
from cpuinfer.kernels.simd import F32, I64, LANES, Emitter, Value, emitted

#: Query heads that share a key or a value once it is in registers.
HEADS = (4, 2, 1)
#: Vectors of sums kept in registers.
SUMS = 8 if ISA in ("avxvnni", "avx2") else 16
#: Keys whose values are summed before the next ones are read: they stay in the L1 cache.
VALUE_BLOCK = 64
#: Bytes between the key that is fetched and the key that is multiplied.
AHEAD = 8192


def _scores(numbers: Numbers) -> Any:
    @emitted
    def scores(
        e: Emitter,
        heads: Value,
        q: Value,
        query_bytes: Value,
        keys: Value,
        row: Value,
        count: Value,
        head_size: Value,
        scale: float,
        out: Value,
        out_stride: Value,
    ) -> None:
        """out[head][i] = scale * q[head] . key[i] for `count` keys that lie together."""
        for n in HEADS:
            with e.case(heads, n):
                queries = [e.at(q, query_bytes, head) for head in range(n)]
                outs = [e.at(out, out_stride, 4 * head) for head in range(n)]
                together = SUMS // n
                tiles = e.b.udiv(count, I64(together))
                with e.loop(tiles) as tile:
                    first = e.at(ir.Constant(I64, 0), tile, together)
                    key = e.b.add(keys, e.b.mul(first, row))
                    with e.loop(e.b.udiv(row, I64(64))) as line:
                        for i in range(together):
                            e.prefetch(e.at(e.at(e.at(key, AHEAD), row, i), line, 64))
                    rows = [e.at(key, row, i) for i in range(together)]
                    sums = _lane_sums(e, numbers, queries, rows, head_size)
                    totals = [e.b.fmul(v, e.splat(scale)) for v in e.sum_each(sums)]
                    for head in range(n):
                        _store_some(
                            e, totals, head * together, together, e.at(outs[head], first, 4)
                        )
                done = e.at(ir.Constant(I64, 0), tiles, together)
                with e.loop(e.b.sub(count, done)) as rest:
                    i = e.b.add(done, rest)
                    key = e.b.add(keys, e.b.mul(i, row))
                    sums = _lane_sums(e, numbers, queries, [key], head_size)
                    for lanes, place in zip(sums, outs, strict=True):
                        e.store(e.b.fmul(e.sum_lanes(lanes), scale), e.at(place, i, 4))

    return scores


def _lane_sums(
    e: Emitter, numbers: Numbers, queries: list[Value], keys: list[Value], head_size: Value
) -> list[list[Value]]:
    """The 16 lane sums, as parts, of each query with each key, all of a query's together."""
    sums: list[list[Value]] = [[] for _ in range(len(queries) * len(keys))]
    for part in range(e.parts):
        slots = [e.variable(e.zeros()) for _ in sums]
        with e.loop(e.b.udiv(head_size, I64(numbers.chunk))) as chunk:
            xs = [numbers.query(e, query, head_size, chunk, part) for query in queries]
            for i, row in enumerate(keys):
                key = numbers.key(e, row, head_size, chunk, part)
                for head, x in enumerate(xs):
                    slot = slots[head * len(keys) + i]
                    e.set(slot, numbers.score(e, x, key, e.get(slot)))
        for lanes, slot in zip(sums, slots, strict=True):
            lanes.append(e.get(slot))
    return sums


def _store_some(e: Emitter, vectors: list[Value], first: int, count: int, address: Value) -> None:
    """Store `count` of the numbers in `vectors`, which lie in one vector or fill several."""
    size = min(count, e.width)
    for i in range(0, count, size):
        vector, lane = divmod(first + i, e.width)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), size), [lane + j for j in range(size)])
        some = e.b.shuffle_vector(vectors[vector], vectors[vector], lanes)
        e.store(some, e.at(address, i, 4))


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


def _mix(numbers: Numbers) -> Any:
    @emitted
    def mix(
        e: Emitter,
        heads: Value,
        weights: Value,
        stride: Value,
        values: Value,
        row: Value,
        count: Value,
        head_size: Value,
        out: Value,
    ) -> None:
        """out[head] += sum over i of weight[head][i] * value[i], in order of i."""
        for n in HEADS:
            with e.case(heads, n):
                columns = e.b.udiv(head_size, I64(LANES))
                together = min(8, SUMS // (n * e.parts))
                tiles = e.b.udiv(columns, I64(together))
                done = e.at(ir.Constant(I64, 0), tiles, together)
                inputs = (weights, stride, values, row, count, head_size, out)
                with e.loop(tiles) as tile:
                    first = e.at(ir.Constant(I64, 0), tile, together)
                    _mix_columns(e, numbers, n, first, together, *inputs)
                if together > 1:
                    with e.loop(e.b.sub(columns, done)) as rest:
                        _mix_columns(e, numbers, n, e.b.add(done, rest), 1, *inputs)

    return mix


def _mix_columns(
    e: Emitter,
    numbers: Numbers,
    heads: int,
    first: Value,
    count: int,
    weights: Value,
    stride: Value,
    values: Value,
    row: Value,
    keys: Value,
    head_size: Value,
    out: Value,
) -> None:
    """`mix` for `count` columns of 16 numbers; meanwhile the same ones of the next block of keys
    are fetched."""
    columns = [e.at(first, i) for i in range(count)]
    places = [
        [
            e.at(e.at(e.at(e.at(out, head_size, 4 * head), column, 4 * LANES), part * e.width, 4))
            for column in columns
            for part in range(e.parts)
        ]
        for head in range(heads)
    ]
    sums = [[e.variable(e.load_floats(place)) for place in head] for head in places]
    with e.loop(keys) as i:
        value = e.b.add(values, e.b.mul(i, row))
        fetched = e.b.mul(first, e.b.udiv(row, e.b.udiv(head_size, I64(LANES))))
        for line in range(max(1, count // 2)):
            e.prefetch(e.at(e.b.add(e.at(value, row, VALUE_BLOCK), fetched), line, 64))
        repeated = [
            e.repeat_float(e.at(e.at(weights, stride, 4 * head), i, 4)) for head in range(heads)
        ]
        for j, column in enumerate(columns):
            for part in range(e.parts):
                v = numbers.value(e, value, head_size, column, part)
                for head in range(heads):
                    slot = sums[head][j * e.parts + part]
                    e.set(slot, e.fma(repeated[head], v, e.get(slot)))
    for slots, head_places in zip(sums, places, strict=True):
        for slot, place in zip(slots, head_places, strict=True):
            e.store(e.get(slot), place)


def _attention(numbers: Numbers) -> Kernel:
    """The kernel for a ring of these numbers."""
    name, prepared = numbers.name, numbers.prepared
    score, mix = _scores(numbers), _mix(numbers)
    prepare = emitted(prepare_query)
    ring = f"{numbers.stored}[:,:,::1]"

    @inner(f"attend_{name}_weigh")
    def weigh(heads, weights, stride, values, row, count, size, out):  # type: ignore[no-untyped-def]
        for i in range(0, count, VALUE_BLOCK):
            some = min(VALUE_BLOCK, count - i)
            mix(heads, weights + 4 * i, stride, values + i * row, row, some, size, out)

    @shared(f"attend_{name}_items")
    def some_items(begin, end, seat, q, keys, values, start, window, scale, scratch, scores, out):  # type: ignore[no-untyped-def]
        tokens, n_heads, size = q.shape
        n_kv_heads, capacity, _ = keys.shape
        group = n_heads // n_kv_heads
        stride = scores.shape[2]
        row = keys[0, 0].nbytes
        query_bytes = prepared * size if prepared else 4 * size
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
                if prepared:
                    for i in range(n):
                        prepare(x + 4 * i * size, size, scratch[seat, i].ctypes.data)
                    x = scratch[seat].ctypes.data
                s = scores.ctypes.data + (seat * group + head) * stride * 4
                k, v = keys.ctypes.data, values.ctypes.data
                score(n, x, query_bytes, k + oldest, row, run, size, scale, s, stride)
                later = s + 4 * run
                score(n, x, query_bytes, k + ring, row, count - run, size, scale, later, stride)
                for i in range(head, head + n):
                    scores[seat, i, count : (count + 15) // 16 * 16] = -np.inf
                    _softmax(s + 4 * (i - head) * stride, (count + 15) // 16)
                weigh(n, s, stride, v + oldest, row, run, size, o)
                weigh(n, later, stride, v + ring, row, count - run, size, o)
                head += n

    @kernel(
        f"attend_{name}",
        f"void(f4[:,:,::1],{ring},{ring},i8,i8,f4,i1[:,:,::1],f4[:,:,::1],f4[:,:,::1],i8)",
    )
    def attend(q, keys, values, start, window, scale, scratch, scores, out, table):  # type: ignore[no-untyped-def]
        """out[t, h] = softmax(scale * q[t, h] . keys) . values over what position start + t sees.

        q, out (T, H, S) float32; keys, values (K, capacity, row) of one layer, the new tokens' own
        included; for each thread, scratch (threads, 4, prepared * S) int8 for queries as `ring.py`
        prepares them, and scores (threads, H / K, window or more, a multiple of 16).
        """
        items = q.shape[0] * keys.shape[0]
        arguments = (q, keys, values, start, window, scale, scratch, scores, out)
        some_items(table, items, 1, arguments)

    return attend


ATTEND = {name: _attention(numbers) for name, numbers in NUMBERS.items()}
