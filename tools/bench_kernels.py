"""Time each kernel alone, in cache and from memory; or look at the machine code of its hot loop.

Matrix products by type and rows in a step, and what else a layer is made of; GB/s of what is read
(for what works on activations alone, read and written) and GMAC/s, against the roofs of the
machine.  With --asm, the innermost loop of a tile; with --cpu and --mca, its cycles on an ARM CPU,
which need not be there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import hot_loop
import numpy as np
from random_model import random_rows

from cpuinfer import machine
from quant.ggml_types import GGMLType

ROWS = (1, 2, 4, 8, 12, 16)
TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")
COLS = 4096
SMALL, LARGE = 256 << 10, 256 << 20  # bytes: stays in a core's cache, goes through all of them

ARM = "aarch64-linux-gnu"
ARM_CPUS = ("cortex-a76", "neoverse-n1")
PIECE = 8 * 32  # weights: 8 rows of a block of 32, 144 bytes of Q4_0
#: Cycles that each of a Raspberry Pi 5's cores has for a byte: 4 cores of 2.4 GHz read 12 GB/s.
PI_CYCLES = 4 * 2.4 / 12


def seconds(work: Callable[[], Any], kernel: str) -> float:
    """The median of what a kernel (by the beginning of its name) takes of `work`."""
    from cpuinfer.measure import kernel_clock

    found: list[float] = []
    with kernel_clock() as spent:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end or len(found) < 3:
            spent.clear()
            work()
            found.append(sum(s for name, s in spent.items() if name.startswith(kernel)))
    return float(np.median(found))


def products(qtype: GGMLType, threads: int) -> Iterator[str]:
    """A type's matrix product with more and more rows, in cache and from memory."""
    from cpuinfer import measure, ops
    from cpuinfer.gguf import QTensor
    from cpuinfer.weights import pack

    rng = np.random.default_rng(0)
    row_bytes = qtype.row_bytes(COLS)
    some = random_rows(rng, qtype, 256, COLS, 1.0)
    for place, nbytes in (("cache", SMALL * threads), ("memory", LARGE)):
        rows = max(1, nbytes // row_bytes // 256) * 256 if nbytes == LARGE else nbytes // row_bytes
        rows = max(16, rows // 16 * 16)
        data = np.resize(some, (rows, row_bytes))
        tensor = QTensor(qtype.name, qtype, (rows, COLS), data)
        weight = pack(tensor)
        compute = measure.compute_roof(tensor, threads)
        for tokens in ROWS:
            x = rng.standard_normal((tokens, COLS), np.float32)
            bandwidth = machine.read_bandwidth(threads)
            took = seconds(partial(ops.linear, x, weight), "matmul")
            gmacs = rows * COLS * tokens / took / 1e9
            yield line(f"{qtype.name} x {tokens}", place, took, data.nbytes, bandwidth) + (
                f"{gmacs:>9.1f} {100 * gmacs / compute:>5.0f}%"
            )


def others(threads: int) -> Iterator[str]:
    """Attention over 4096 positions, and what works on activations, in shapes of Mistral 7B."""
    from cpuinfer import ops
    from cpuinfer.cache import KVCache

    rng = np.random.default_rng(0)
    bandwidth = machine.read_bandwidth(threads)
    for place, depth, layers in (("cache", 256, 1), ("memory", 4096, 16)):
        cache = KVCache(layers, 8, 128, depth + 1)
        cache.take_memory()
        cache.offset = depth
        q, k = (rng.standard_normal((1, heads, 128), np.float32) for heads in (32, 8))

        took = seconds(partial(_attend, cache, q, k), "attend")
        yield line(f"attend {depth}", place, took, cache.nbytes, bandwidth)
    for tokens in (1, 256):
        x, up = rng.standard_normal((2, tokens, 14336), np.float32)
        norm, heads = x[:, :COLS].copy(), x[:, :COLS].reshape(tokens, 32, 128).copy()
        angles = [np.full((tokens, 64), number, np.float32) for number in (1.0, 0.0)]
        weight = np.ones(COLS, np.float32)
        matrix = _small_matrix()
        for name, work, nbytes in (
            ("rms_norm", partial(ops.rms_norm, norm, weight, 1e-5), 2 * norm.nbytes),
            ("rope", partial(ops.rope, heads, *angles), 2 * heads.nbytes),
            ("silu_mul", partial(_silu_mul, x, up), 3 * x.nbytes),
            ("quantize", partial(ops.linear, norm, matrix), norm.nbytes * 5 // 4),
        ):
            yield line(f"{name} {tokens}", "cache", seconds(work, name), nbytes, bandwidth)


def _attend(cache: Any, q: Any, k: Any) -> None:
    from cpuinfer import ops

    for layer in range(len(cache.keys)):
        ops.attend(q, k, k, cache, layer, None)


def _silu_mul(gate: Any, up: Any) -> None:
    from cpuinfer import ops

    ops.silu_mul(gate.copy(), up)  # in place, and again and again it would come to nothing


def _small_matrix() -> Any:
    from cpuinfer.gguf import QTensor
    from cpuinfer.weights import pack

    rows = random_rows(np.random.default_rng(0), GGMLType.Q4_0, 16, COLS, 1.0)
    return pack(QTensor("", GGMLType.Q4_0, (16, COLS), rows))


def line(name: str, place: str, took: float, nbytes: int, bandwidth: float) -> str:
    """A row of the table: microseconds, GB/s and their part of the bandwidth."""
    gbps = nbytes / took / 1e9
    share = f"{100 * gbps / bandwidth:.0f}%" if place == "memory" else ""
    return f"{name:<14}{place:<8}{1e6 * took:>10.1f}{gbps:>8.1f} {share:>5}"


def timings(types: Sequence[GGMLType], threads: int) -> Iterator[str]:
    """The whole table."""
    from cpuinfer.kernels.jit import ISA
    from cpuinfer.team import computing

    bandwidth = machine.read_bandwidth(threads)
    yield f"{machine.cpu_model()}, {ISA}, {threads} threads, {bandwidth:.1f} GB/s"
    yield f"{'':<14}{'':<8}{'us':>10}{'GB/s':>8} {'roof':>5}{'GMAC/s':>9} {'roof':>6}"
    with computing(threads):
        for qtype in types:
            yield from products(qtype, threads)
        yield from others(threads)


def loops(types: Sequence[GGMLType], triple: str, cpu: str, features: str) -> Iterator[Any]:
    """(type, tokens, hot loop) of the tiles for 1 and 4 tokens."""
    from cpuinfer.kernels import integer
    from cpuinfer.weights import INTEGER

    for qtype in types:
        if qtype in INTEGER:
            for tokens in (1, 4):
                tile = integer._tile(INTEGER[qtype][0], tokens)
                text = hot_loop.assembly(tile, triple, cpu, features)
                yield qtype, tokens, hot_loop.hot_loop(text)


def listings(types: Sequence[GGMLType], triple: str, cpu: str, features: str) -> Iterator[str]:
    """The instructions of each hot loop, and how many there are for 8 rows of 32 weights."""
    for qtype, tokens, loop in loops(types, triple, cpu, features):
        pieces = loop.products / tokens / PIECE
        each = f", {len(loop.lines) / pieces:.1f} for 8 x 32 weights" if pieces else ""
        yield f"{qtype.name}, {tokens} tokens, {loop.label}: {len(loop.lines)} instructions{each}"
        yield from loop.lines
        yield ""


def cycle_table(types: Sequence[GGMLType], cpus: Sequence[str], program: str) -> Iterator[str]:
    """Cycles for 8 rows of 32 weights by llvm-mca, and what a Raspberry Pi 5 has for them."""
    if shutil.which(program) is None:
        raise ValueError(f"there is no {program}: apt install llvm")
    heads = "".join(f"{cpu:>14}" for cpu in cpus)
    yield f"for 8 rows x 32 weights: bytes, instructions, cycles by {program}"
    yield f"{'':<8}{'tokens':>6}{'bytes':>8}{'instr.':>8}{heads}{'Pi 5 has':>10}"
    for qtype, tokens, loop in loops(types, ARM, cpus[0], ""):
        pieces = loop.products / tokens / PIECE
        nbytes = PIECE * qtype.block_bytes / qtype.block_size
        counts = [hot_loop.cycles(loop, ARM, cpu, program) / pieces for cpu in cpus]
        yield (
            f"{qtype.name:<8}{tokens:>6}{nbytes:>8.0f}{len(loop.lines) / pieces:>8.1f}"
            + "".join(f"{count:>14.1f}" for count in counts)
            + f"{PI_CYCLES * nbytes:>10.0f}"
        )


def _this_cpu() -> tuple[str, str, str]:
    """Triple, CPU and features that kernels are compiled for."""
    from llvmlite import binding

    from cpuinfer.kernels.jit import config

    triple = binding.get_process_triple()
    if config.CPU_NAME is not None:
        return triple, config.CPU_NAME, config.CPU_FEATURES
    return triple, binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


def _write_for_arm() -> None:
    """Have the kernels of this process written for ARM, before their rooms are imported.

    They cannot be run then.
    """
    machine.supported_instruction_sets = lambda root=machine.ROOT: ["neon"]
    os.environ["CPUINFER_ISA"] = "neon"


def _again(isa: str, options: argparse.Namespace) -> int:
    """This program with another instruction set, which a process cannot change."""
    command = [sys.executable, __file__, "--type", *options.type, f"--threads={options.threads}"]
    command += ["--asm"] * options.asm
    return subprocess.run(command, env={**os.environ, "CPUINFER_ISA": isa}).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--isa", nargs="+", help="instruction sets, as CPUINFER_ISA names them")
    parser.add_argument("--threads", type=int, default=machine.threads()[0])
    parser.add_argument("--asm", action="store_true", help="list the hot loops instead")
    parser.add_argument(
        "--cpu", nargs="+", choices=ARM_CPUS, help="list the hot loops that this ARM CPU would run"
    )
    parser.add_argument(
        "--mca",
        nargs="?",
        const="llvm-mca",
        metavar="PROGRAM",
        help="with --cpu, their cycles instead, by this program (default: llvm-mca)",
    )
    options = parser.parse_args(argv)
    if options.mca and not options.cpu:
        parser.error("--mca wants --cpu")
    types = [GGMLType[name] for name in options.type]
    try:
        if options.cpu:
            _write_for_arm()
            if options.mca:
                lines = cycle_table(types, options.cpu, options.mca)
            else:
                lines = listings(types, ARM, options.cpu[0], "")
        elif options.isa:
            return max(_again(isa, options) for isa in options.isa)
        elif options.asm:
            lines = listings(types, *_this_cpu())
        else:
            lines = timings(types, options.threads)
        for one in lines:
            print(one, flush=True)
    except ValueError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
