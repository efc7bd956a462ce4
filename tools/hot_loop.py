"""The innermost loop of a matmul tile, as machine code for this or another CPU.

A tile is compiled alone, with its arguments in registers, and nothing is run: so code for ARM can
be looked at, and timed by llvm-mca, on any machine.  Compiling is what Numba does: LLVM's
optimization level 3 for the CPU and its features.
"""

import inspect
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import binding, ir

_LABEL = re.compile(r"^([.\w$]+):")
_BRANCH = re.compile(r"^\s+(?:b|b\.\w+|j\w+|cbn?z|tbn?z)\s.*?([.\w$]+)$")

#: Products of two bytes in one instruction that adds them up in 32 bits, by the register's name.
_DOTS = {
    r"[su]dot\s+v\d+\.4s": 16,
    r"smmla\s+v\d+\.4s": 32,
    r"vpdpbusd\s.*%zmm": 64,
    r"vpdpbusd\s.*%ymm": 32,
    r"vpmaddubsw\s.*%ymm": 32,
}


@dataclass(frozen=True)
class Loop:
    """A loop's label, its instructions, and the products of bytes in one round of it."""

    label: str
    lines: tuple[str, ...]

    @property
    def products(self) -> int:
        return sum(_products(line) for line in self.lines)


def assembly(tile: Callable[..., None], triple: str, cpu: str, features: str) -> str:
    """What LLVM makes of the writer of a tile."""
    from cpuinfer.kernels.simd import I64, Emitter

    module = ir.Module("tile")
    module.triple = triple
    count = len(inspect.signature(tile).parameters) - 1
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * count), "tile")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    tile(Emitter(builder), *function.args)
    builder.ret_void()
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


def hot_loop(text: str) -> Loop:
    """The loop without loops inside that multiplies most; ValueError if there is none."""
    lines = [line for line in text.splitlines() if _LABEL.match(line) or _instruction(line)]
    places = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    spans = []
    for end, line in enumerate(lines):
        found = _BRANCH.match(line)
        if found and places.get(found[1], end) < end:
            spans.append((places[found[1]], end))
    inner = [
        (start, end)
        for start, end in spans
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans)
    ]
    loops = [
        Loop(lines[start].rstrip(":"), tuple(filter(_instruction, lines[start : end + 1])))
        for start, end in inner
    ]
    if not loops:
        raise ValueError("there is no loop in this code")
    return max(loops, key=lambda loop: (loop.products, len(loop.lines)))


def cycles(loop: Loop, triple: str, cpu: str, program: str = "llvm-mca") -> float:
    """Cycles of one round as llvm-mca reckons them."""
    command = [program, f"-mtriple={triple}", f"-mcpu={cpu}", "-iterations=100"]
    code = "\n".join(loop.lines)
    result = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
    found = re.search(r"^Total Cycles:\s+(\d+)", result.stdout, re.MULTILINE)
    assert found is not None, result.stdout
    return int(found[1]) / 100


def _instruction(line: str) -> bool:
    return re.match(r"\s+[a-z{]", line) is not None  # "{vex}" may stand before the name


def _products(line: str) -> int:
    return next(
        (n for pattern, n in _DOTS.items() if re.match(rf"\s+({{\w+}}\s+)?{pattern}", line)), 0
    )
