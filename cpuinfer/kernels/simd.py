"""SIMD for kernels: Python functions that write LLVM vector code for one instruction set.

A function decorated with `@emitted` runs once, when Numba compiles its caller: it gets an `Emitter`
and the values of its arguments and writes instructions by calling the emitter.  Python loops and
lists in it are unrolled code; `e.loop` is a loop at run time.  Vectors have the width of the
machine (16 lanes of 32 bits with AVX512, 8 with AVX2, 4 with NEON).  Work that must give the same
bits everywhere is done on `e.parts` vectors that make `LANES` = 16 logical lanes together, with an
explicit fma and without fastmath: only the number of instructions depends on the machine.

Nothing here checks a bound.
"""

import inspect
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from cpuinfer.kernels.jit import ISA

LANES = 16
SIGNED = 128  # the `largest` of a dot product whose weights are signed bytes
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
WIDTH = {"avx512vnni": 16, "avxvnni": 8, "avx2": 8, "neon": 4, "plain": 4}

Value = Any  # an llvmlite value: llvmlite has no types for a checker
Vectors = list[Any]  # `parts` values: 16 logical lanes


def emitted(write: Callable[..., None]) -> Any:
    """Make `write(e, *arguments)` callable from a jitted function; it returns nothing.

    Arguments are 64-bit integers (addresses and counts), or float32 where annotated `float`.
    """
    parameters = list(inspect.signature(write).parameters.values())[1:]
    numba_types = [types.float32 if p.annotation is float else types.intp for p in parameters]

    def define(typing_context: Any, *arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            write(Emitter(builder), *values)
            return context.get_dummy_value()

        return types.void(*numba_types), codegen

    # Numba reads the signature and wants plain names in it, not *arguments.
    first = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    define.__signature__ = inspect.Signature([first, *plain])  # type: ignore[attr-defined]
    return intrinsic(define)


class Emitter:
    """Writes vector instructions of the chosen instruction set into one function."""

    def __init__(self, builder: Any) -> None:
        self.b = builder
        self.width = WIDTH[ISA]
        self.parts = LANES // self.width
        self.i32v = ir.VectorType(I32, self.width)
        self.f32v = ir.VectorType(F32, self.width)

    # --- constants, memory ---

    def zeros(self) -> Value:
        return ir.Constant(self.f32v, [0.0] * self.width)

    def floats(self, number: float) -> Value:
        """A float constant in every lane, rounded to float32 as LLVM wants it."""
        (rounded,) = struct.unpack("<f", struct.pack("<f", number))
        return ir.Constant(self.f32v, [rounded] * self.width)

    def ints(self, number: int) -> Value:
        """An int32 constant in every lane."""
        return ir.Constant(self.i32v, [number] * self.width)

    def at(self, address: Value, offset: Value | int = 0, scale: int = 1) -> Value:
        """The address `address + offset * scale`; integers may be constants."""
        if isinstance(offset, int):
            return self.b.add(address, ir.Constant(I64, offset * scale))
        return self.b.add(address, self.b.mul(offset, ir.Constant(I64, scale)))

    def load(self, address: Value, kind: Any, align: int) -> Value:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Value, address: Value, align: int = 4) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = align

    def prefetch(self, address: Value) -> None:
        """Have the cache line at `address`, which may be anywhere, brought near."""
        place = self.b.inttoptr(address, I8.as_pointer())
        hints = [ir.Constant(I32, n) for n in (0, 3, 1)]  # to read, into the first cache, data
        self.call("llvm.prefetch.p0", ir.VoidType(), place, *hints)

    def load_ints(self, address: Value) -> Value:
        return self.load(address, self.i32v, 4)

    def load_floats(self, address: Value) -> Value:
        return self.load(address, self.f32v, 4)

    def load_halves(self, address: Value) -> Value:
        """Half-precision numbers as a float32 vector."""
        halves = self.load(address, ir.VectorType(I16, self.width), 2)
        return self.half_to_float(self.b.zext(halves, self.i32v))

    def repeat_float(self, address: Value) -> Value:
        """One float from memory in every lane."""
        return self.splat(self.load(address, F32, 4))

    def repeat_int(self, address: Value) -> Value:
        """One 32-bit word from memory in every lane."""
        return self.splat(self.load(address, I32, 4))

    def repeat_half(self, address: Value) -> Value:
        """One half-precision number from memory in every lane, as float32."""
        bits = self.b.zext(self.load(address, I16, 2), I32)
        return self.half_to_float(self.splat(bits))

    def splat(self, scalar: Value) -> Value:
        vector = ir.VectorType(scalar.type, self.width)
        nothing = ir.Constant(vector, ir.Undefined)
        # Inserting into an undefined vector is safe here: the shuffle reads lane 0 alone.
        first = self.b.insert_element(nothing, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, nothing, ir.Constant(self.i32v, [0] * self.width))

    # --- arithmetic ---

    def call(self, name: str, result: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z with one rounding."""
        return self.call(f"llvm.fma.v{self.width}f32", self.f32v, x, y, z)

    def maximum(self, x: Value, y: Value) -> Value:
        """The larger of two floats that are not NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def to_float(self, integers: Value) -> Value:
        return self.b.sitofp(integers, self.f32v)

    def magnitude(self, x: Value) -> Value:
        bits = self.b.and_(self.b.bitcast(x, self.i32v), self.ints(0x7FFFFFFF))
        return self.b.bitcast(bits, self.f32v)

    def round(self, x: Value) -> Value:
        """Floats to the nearest integers (still floats), halves to even."""
        # Adding and subtracting 1.5 * 2^23 rounds any |x| < 2^22 on every machine alike.
        magic = self.floats(12582912.0)
        return self.b.fsub(self.b.fadd(x, magic), magic)

    def and_(self, x: Value, mask: int) -> Value:
        return self.b.and_(x, self.ints(mask))

    def shift_right(self, x: Value, count: int) -> Value:
        return self.b.lshr(x, self.ints(count)) if count else x

    def shift_left(self, x: Value, count: int) -> Value:
        return self.b.shl(x, self.ints(count)) if count else x

    def exp(self, x: Value) -> Value:
        """e**x within 2 ulp, 0 below -87.3, that of 88.3 above: the same bits on every machine.

        Cody-Waite reduction to |r| <= ln(2) / 2 and the polynomial of Cephes' expf; NaN stays NaN.
        """
        b = self.b
        low, high = self.floats(-87.3), self.floats(88.3)
        clipped = b.select(b.fcmp_ordered("<", x, low), low, x)
        clipped = b.select(b.fcmp_ordered(">", clipped, high), high, clipped)
        n = self.round(b.fmul(clipped, self.floats(1.44269504)))
        r = self.fma(n, self.floats(-0.693359375), clipped)
        r = self.fma(n, self.floats(2.12194440e-4), r)
        p = self.floats(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
            p = self.fma(p, r, self.floats(c))
        p = b.fadd(self.fma(p, b.fmul(r, r), r), self.floats(1.0))
        exponent = b.shl(b.add(b.fptosi(n, self.i32v), self.ints(127)), self.ints(23))
        result = b.fmul(p, b.bitcast(exponent, self.f32v))
        return b.select(b.fcmp_ordered("<", x, low), self.zeros(), result)

    def half_to_float(self, bits: Value) -> Value:
        """16-bit patterns in 32-bit lanes, read as half precision."""
        if ISA == "plain":  # no conversion instruction: exponent moved by a multiplication
            magnitude = self.b.shl(self.and_(bits, 0x7FFF), self.ints(13))
            scaled = self.b.fmul(self.b.bitcast(magnitude, self.f32v), self.floats(2.0**112))
            special = self.b.icmp_unsigned(">=", magnitude, self.ints(0x0F800000))
            infinite = self.b.or_(magnitude, self.ints(0x7F800000))
            value = self.b.select(special, infinite, self.b.bitcast(scaled, self.i32v))
            sign = self.b.shl(self.and_(bits, 0x8000), self.ints(16))
            return self.b.bitcast(self.b.or_(value, sign), self.f32v)
        halves = self.b.trunc(bits, ir.VectorType(I16, self.width))
        return self.b.fpext(
            self.b.bitcast(halves, ir.VectorType(ir.HalfType(), self.width)), self.f32v
        )

    def store_halves(self, x: Value, address: Value) -> None:
        """Write floats as half precision, rounded to nearest even."""
        if ISA == "plain":
            bits = self.float_to_half_bits(x)
            self.store(self.b.trunc(bits, ir.VectorType(I16, self.width)), address, 2)
        else:
            self.store(self.b.fptrunc(x, ir.VectorType(ir.HalfType(), self.width)), address, 2)

    def store_half(self, x: Value, address: Value) -> None:
        """Write one float as half precision, rounded to nearest even."""
        if ISA == "plain":
            bits = self.b.extract_element(self.float_to_half_bits(self.splat(x)), I32(0))
            self.store(self.b.trunc(bits, I16), address, 2)
        else:
            self.store(self.b.fptrunc(x, ir.HalfType()), address, 2)

    def float_to_half_bits(self, x: Value) -> Value:
        """Rounding to half precision in integer arithmetic; NaN stays NaN."""
        b = self.b
        bits = b.bitcast(x, self.i32v)
        magnitude = self.and_(bits, 0x7FFFFFFF)
        odd = self.and_(self.shift_right(magnitude, 13), 1)
        normal = b.sub(b.add(b.add(magnitude, self.ints(0xFFF)), odd), self.ints(112 << 23))
        normal = self.shift_right(normal, 13)
        # Below 2^-14 the float adder rounds to the spacing of half's subnormals, 2^-24.
        tiny = b.fadd(b.bitcast(magnitude, self.f32v), self.floats(0.5))
        tiny = b.sub(b.bitcast(tiny, self.i32v), self.ints(126 << 23))
        small = b.icmp_unsigned("<", magnitude, self.ints(113 << 23))
        large = b.icmp_unsigned(">=", magnitude, self.ints(0x477FF000))
        nan = b.icmp_unsigned(">", magnitude, self.ints(0x7F800000))
        special = b.select(nan, self.ints(0x7E00), self.ints(0x7C00))
        half = b.select(large, special, b.select(small, tiny, normal))
        return b.or_(half, self.and_(self.shift_right(bits, 16), 0x8000))

    def repeat_words(self, address: Value) -> Vectors:
        """Eight 32-bit words from memory, each in every lane of a vector of its own."""
        if ISA != "neon":
            return [self.repeat_int(self.at(address, i, 4)) for i in range(8)]
        # sdot takes a lane of a register: two loads serve eight words.
        halves = [self.load_ints(self.at(address, i, 16)) for i in range(2)]
        lanes = [ir.Constant(self.i32v, [i] * 4) for i in range(4)]
        return [self.b.shuffle_vector(h, h, lane) for h in halves for lane in lanes]

    def dot(self, acc: Value, weights: Vectors, activations: Vectors, largest: int) -> Value:
        """acc[i] += products of the bytes of all words, exact.

        Weights are unsigned bytes up to `largest`, or signed ones where it is `SIGNED`;
        activations are signed, -127..127.
        """
        if ISA == "avx2":
            return self._dot_avx2(acc, weights, activations, largest)
        for w, a in zip(weights, activations, strict=True):
            acc = self._dot4(acc, w, a)
        return acc

    def _dot4(self, acc: Value, weights: Value, activations: Value) -> Value:
        i8v = ir.VectorType(I8, 4 * self.width)
        w, a = self.b.bitcast(weights, i8v), self.b.bitcast(activations, i8v)
        if ISA == "avx512vnni":
            return self.call("llvm.x86.avx512.vpdpbusd.512", self.i32v, acc, w, a)
        if ISA == "avxvnni":
            return self.call("llvm.x86.avx512.vpdpbusd.256", self.i32v, acc, w, a)
        if ISA == "neon":
            return self.call("llvm.aarch64.neon.sdot.v4i32.v16i8", self.i32v, acc, w, a)
        return self.b.add(acc, self._dot4_plain(weights, activations))

    def _dot_avx2(self, acc: Value, weights: Vectors, activations: Vectors, largest: int) -> Value:
        """Pairs are multiplied into 16 bits, added there while they fit, then widened."""
        i8v, i16v = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
        ones = ir.Constant(i16v, [1] * 16)
        fit = 32767 // (2 * 127 * largest)
        for start in range(0, len(weights), fit):
            sums = None
            for word in range(start, min(start + fit, len(weights))):
                w, a = self.b.bitcast(weights[word], i8v), self.b.bitcast(activations[word], i8v)
                if largest == SIGNED:  # |w| * (a with the sign of w)
                    a = self.call("llvm.x86.avx2.psign.b", i8v, a, w)
                    w = self.call("llvm.abs.v32i8", i8v, w, ir.Constant(ir.IntType(1), 0))
                pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", i16v, w, a)
                sums = pairs if sums is None else self.b.add(sums, pairs)
            acc = self.b.add(acc, self.call("llvm.x86.avx2.pmadd.wd", self.i32v, sums, ones))
        return acc

    def _dot4_plain(self, w: Value, a: Value) -> Value:
        def byte(x: Value, i: int) -> Value:
            return self.b.ashr(self.shift_left(x, 24 - 8 * i), self.ints(24))

        total = self.ints(0)
        for i in range(4):
            total = self.b.add(total, self.b.mul(byte(w, i), byte(a, i)))
        return total

    # --- 16 logical lanes ---

    def sum_lanes(self, vectors: Vectors) -> Value:
        """The 16 lanes added in a fixed tree: i + (i + 8), then 4, 2, 1 apart."""
        return self._fold(vectors, lambda x, y: self.b.fadd(x, y))

    def sum_each(self, sums: list[Vectors]) -> list[Value]:
        """`sum_lanes` of each, `width` results to a vector; as many sums as fill their vectors.

        Neighbours fold together: half the instructions of folding each to the end.
        """
        vectors = [self._fold_parts(parts, lambda x, y: self.b.fadd(x, y)) for parts in sums]
        lanes = self.width
        while lanes > 1:
            half = lanes // 2
            low = [start + i for start in range(0, 2 * self.width, lanes) for i in range(half)]
            places = [ir.Constant(self.i32v, [i + far for i in low]) for far in (0, half)]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                self.b.fadd(*(self.b.shuffle_vector(x, y, place) for place in places))
                for x, y in pairs
            ]
            lanes = half
        return vectors

    def max_lanes(self, vectors: Vectors) -> Value:
        return self._fold(vectors, self.maximum)

    def _fold(self, vectors: Vectors, combine: Callable[[Value, Value], Value]) -> Value:
        v = self._fold_parts(vectors, combine)
        lanes = self.width
        while lanes > 1:
            lanes //= 2
            low, high = (
                self.b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, lanes), list(indices)))
                for indices in (range(lanes), range(lanes, 2 * lanes))
            )
            v = combine(low, high)
        return self.b.extract_element(v, ir.Constant(I32, 0))

    def _fold_parts(self, vectors: Vectors, combine: Callable[[Value, Value], Value]) -> Value:
        """The parts of 16 lanes as one vector, far lanes onto near ones."""
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [combine(vectors[i], vectors[i + half]) for i in range(half)]
        return vectors[0]

    # --- control ---

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """A loop at run time; yields the index, a 64-bit integer."""
        with cgutils.for_range(self.b, count) as loop:
            yield loop.index

    @contextmanager
    def case(self, number: Value, constant: int) -> Iterator[None]:
        """What runs if the integer `number` is `constant`."""
        with self.b.if_then(self.b.icmp_signed("==", number, number.type(constant))):
            yield

    def variable(self, initial: Value) -> Value:
        """A slot that a loop may change (`get`, `set`); LLVM turns it into a register."""
        slot = cgutils.alloca_once(self.b, initial.type)  # in the function's entry block
        self.b.store(initial, slot)  # here, so anew in each round of a loop around
        return slot

    def get(self, slot: Value) -> Value:
        return self.b.load(slot)

    def set(self, slot: Value, value: Value) -> None:
        self.b.store(value, slot)
