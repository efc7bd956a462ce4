"""Work shared among threads: regions whose items are taken by whoever is there.

A region is a loop over independent items, opened by the thread that computes (the leader).  Each
seat at the table has its slice of the items; a thread takes its own slice piece by piece, then
helps with what is left of the others'.  So a thread that is late, asleep or slower than the others
costs nothing but its help, and the same thread meets the same weights in every pass.  Which thread
computes an item changes no bit of it.

All that leader and followers know of each other lies in one table of 64-bit words, which `team.py`
allocates and whose address every kernel gets.  The leader writes a region's words while none is
inside, then makes the epoch odd; a follower counts itself in, looks at the epoch again, works, and
counts itself out; the leader makes the epoch even and waits until none is inside.  Each side writes
its own word before it reads the other's (sequential consistency), so no follower works on words
that change.  Opening and closing takes about a microsecond.
"""

import platform
import sys
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from cpuinfer.kernels.jit import config, inner, kernel

LINE = 16  # words apart, 128 bytes: no two share a cache line, neighbours fetched together included
EPOCH = 0  # odd while a region is open
INSIDE = 8 * LINE  # followers that may be at work
PASS = 16 * LINE  # 1 while regions follow each other closely, -1 when there will be no more
THREADS = 24 * LINE  # seats taken; what follows in this line is written before a region opens
ITEMS = THREADS + 8
PIECE = THREADS + 16  # items taken at once
FUNCTION = THREADS + 24  # of (arguments, begin, end, seat)
ARGUMENTS = THREADS + 32
TAKEN = 32 * LINE  # for each seat, in a line of its own: items of its slice that are taken

#: Looks at the epoch, about 30 microseconds of them, before a thread lets others have its core.
SPINS = 1000
#: Times it does so, some milliseconds at most, before it stops when no pass is under way.
YIELDS = 2000
#: The same while a pass is under way: some tenths of a second.
PASS_YIELDS = 1 << 20
#: Numba's bounds checks raise, which only the thread that called a kernel can.
_ALONE = bool(config.BOUNDSCHECK)


def table_words(threads: int) -> int:
    """64-bit words of a table with so many seats."""
    return TAKEN // 8 + LINE * threads


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _read(typing_context, address):  # type: ignore[no-untyped-def]
    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.load_atomic(_word(b, arguments[0]), "seq_cst", 8)

    return types.intp(types.intp), codegen


@intrinsic
def _write(typing_context, address, value):  # type: ignore[no-untyped-def]
    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        b.store_atomic(arguments[1], _word(b, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _add(typing_context, address, value):  # type: ignore[no-untyped-def]
    """What was there before."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", _word(b, arguments[0]), arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


def _call_out(builder: Any, name: str, result: Any, *arguments: Any) -> None:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def _pause(typing_context):  # type: ignore[no-untyped-def]
    """Tell the core that this is a loop that waits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call_out(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif platform.machine() in ("aarch64", "arm64"):
            _call_out(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(ir.IntType(32), 1))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _give_way(typing_context):  # type: ignore[no-untyped-def]
    """Let another thread have this core, if one wants it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        _call_out(builder, name, ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typing_context, function, arguments, begin, end, seat):  # type: ignore[no-untyped-def]
    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [v.type for v in values[1:]])
        b.call(b.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@njit(error_model="numpy")
def _work(table, seat):  # type: ignore[no-untyped-def]
    """Take pieces of the open region until none is left."""
    threads, items, piece = _read(table + THREADS), _read(table + ITEMS), _read(table + PIECE)
    function, arguments = _read(table + FUNCTION), _read(table + ARGUMENTS)
    for step in range(threads):
        whose = (seat + step) % threads
        start, end = whose * items // threads, (whose + 1) * items // threads
        while True:
            begin = start + _add(table + TAKEN + 8 * LINE * whose, piece)
            if begin >= end:
                break
            _call(function, arguments, begin, min(begin + piece, end), seat)


@njit(error_model="numpy")
def _lead(table, items, piece, function, arguments):  # type: ignore[no-untyped-def]
    """Open a region, work in it, close it."""
    _write(table + ITEMS, items)
    _write(table + PIECE, piece)
    _write(table + FUNCTION, function)
    _write(table + ARGUMENTS, arguments)
    for seat in range(_read(table + THREADS)):
        _write(table + TAKEN + 8 * LINE * seat, 0)
    epoch = _read(table + EPOCH) + 1
    _write(table + EPOCH, epoch)
    _work(table, 0)
    _write(table + EPOCH, epoch + 1)
    spins = 0
    while _read(table + INSIDE) != 0:
        spins += 1
        if spins < SPINS:
            _pause()
        else:
            _give_way()


@kernel("follow", "void(i8,i8)")
def FOLLOW(table, seat):  # type: ignore[no-untyped-def]
    """Work in regions as they open; return when none has been for a while."""
    seen = waits = 0
    while True:
        passing = _read(table + PASS)
        if passing < 0 or waits > SPINS + (PASS_YIELDS if passing else YIELDS):
            return
        epoch = _read(table + EPOCH)
        if epoch % 2 == 1 and epoch != seen:
            seen = epoch
            waits = 0
            _add(table + INSIDE, 1)
            if _read(table + EPOCH) == epoch and seat < _read(table + THREADS):
                _work(table, seat)
            _add(table + INSIDE, -1)
        else:
            waits += 1
            if waits < SPINS:
                _pause()
            else:
                _give_way()


def shared(name: str) -> Callable[[Callable[..., None]], Any]:
    """Make a function (begin, end, seat, *arguments) a loop for all threads.

    The result, run(table, items, piece, arguments), calls it for pieces of `items` that lie
    together; `seat` is a number below the table's threads that no other piece has at the same time.
    At most `piece` items, or a table with one thread, are done at once by the caller.
    """

    def wrap(function: Callable[..., None]) -> Any:
        return _region(name, inner(name)(function))

    return wrap


def _region(name: str, part: Any) -> Any:
    @intrinsic(prefer_literal=False)
    def describe(typing_context, arguments):  # type: ignore[no-untyped-def]
        """Addresses of a function that unpacks `arguments` and calls `part`, and of these."""
        parameters = (types.intp, types.intp, types.intp, *arguments.types)
        signature = typing_context.resolve_function_type(types.Dispatcher(part), parameters, {})
        compiled = part.overloads[signature.args]

        def codegen(context: Any, builder: Any, own: Any, values: Any) -> Any:
            context.active_code_library.add_linking_library(compiled.library)
            packed = cgutils.alloca_once_value(builder, values[0])
            unpack = _unpacker(context, builder.module, compiled.fndesc, signature, values[0].type)
            places = [builder.ptrtoint(p, ir.IntType(64)) for p in (unpack, packed)]
            return context.make_tuple(builder, own.return_type, places)

        return types.UniTuple(types.intp, 2)(arguments), codegen

    @inner(f"share_{name}")
    def run(table, items, piece, arguments):  # type: ignore[no-untyped-def]
        if _ALONE or items <= piece or _read(table + THREADS) == 1:
            part(0, items, 0, *arguments)
        else:
            function, packed = describe(arguments)
            _lead(table, items, piece, function, packed)

    return run


def _unpacker(context: Any, module: Any, fndesc: Any, signature: Any, packed: Any) -> Any:
    """void(arguments, begin, end, seat) in LLVM, for `_call`."""
    word = ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [word] * 4)
    function = ir.Function(module, kind, f"unpack.{fndesc.mangled_name}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    address, *place = function.args
    values = builder.load(builder.inttoptr(address, packed.as_pointer()))
    arguments = [builder.extract_value(values, i) for i in range(len(packed.elements))]
    context.call_internal_no_propagate(builder, fndesc, signature, [*place, *arguments])
    builder.ret_void()
    return function
