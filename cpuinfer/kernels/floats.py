"""F32, F16 and BF16 rows times float32 activations.

Weights are packed (`pack.py`) as number[column][16 rows]; a vector holds one column of many rows,
so an output is one accumulator that takes its columns in order, one fma each.
"""

from collections.abc import Callable

from llvmlite import ir

from cpuinfer.kernels.matmul import AHEAD, matmul, store_sums
from cpuinfer.kernels.simd import I16, LANES, Emitter, Value


def _tile(size: int, load: Callable[[Emitter, Value], Value], tokens: int) -> Callable[..., None]:
    def tile(
        e: Emitter,
        words: Value,
        halves: Value,
        cols: Value,
        x: Value,
        d: Value,
        correction: Value,
        out: Value,
        stride: Value,
    ) -> None:
        """out[token, 16 rows]; x is [column][token]; halves, d, correction unused."""
        sums = [[e.variable(e.zeros()) for _ in range(e.parts)] for _ in range(tokens)]
        with e.loop(cols) as column:
            e.prefetch(e.at(e.at(words, AHEAD), column, LANES * size))
            for part in range(e.parts):
                weights = load(e, e.at(e.at(words, part * e.width, size), column, LANES * size))
                for t in range(tokens):
                    activation = e.repeat_float(e.at(e.at(x, t, 4), column, 4 * tokens))
                    total = e.fma(weights, activation, e.get(sums[t][part]))
                    e.set(sums[t][part], total)
        store_sums(e, sums, out, stride)

    return tile


def _load_bf16(e: Emitter, address: Value) -> Value:
    bits = e.b.zext(e.load(address, ir.VectorType(I16, e.width), 2), e.i32v)
    return e.b.bitcast(e.shift_left(bits, 16), e.f32v)


F32_MATMUL = matmul("f32", lambda n: _tile(4, lambda e, address: e.load_floats(address), n))
F16_MATMUL = matmul("f16", lambda n: _tile(2, lambda e, address: e.load_halves(address), n), "u2")
BF16_MATMUL = matmul("bf16", lambda n: _tile(2, _load_bf16, n), "u2")
