"""What `cpuinfer doctor` says of this computer: what decides how fast a model runs here."""

import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cpuinfer import __version__, bandwidth, directories, estimate, machine
from cpuinfer.kernels import jit

Report = dict[str, Any]

#: Bytes of the files whose speed is told.
_SIZES = (4_000_000_000, 8_000_000_000)

_PACKAGES = ("numba", "llvmlite", "numpy", "sentencepiece")


def examine() -> Report:
    """The facts, and `warnings` about what could be better; measures for about a second."""
    threads, reason = machine.threads()
    decode_threads, decode_reason = machine.decode_threads(threads)
    kept = directories.cache_directory()
    warnings = [] if kept.warning is None else [kept.warning]
    return {
        "cpuinfer": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": machine.cpu_model(),
        "instruction_set": machine.instruction_set(),
        "supported_instruction_sets": machine.supported_instruction_sets(),
        "threads": threads,
        "threads_reason": reason,
        "decode_threads": decode_threads,
        "decode_threads_reason": decode_reason,
        "memory_available": machine.memory_available(),
        "bandwidth": round(bandwidth.measured(decode_threads), 2),
        "cache_directory": None if jit.CACHE is None else str(jit.CACHE),
        "cached_kernels": 0 if jit.CACHE is None else _compiled(jit.CACHE),
        "warnings": warnings,
    }


def text(report: Report, more: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    """The report for people, a line for each fact, and `more` facts under their names."""
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    supported = ", ".join(report["supported_instruction_sets"])
    cache = report["cache_directory"]
    gbs = report["bandwidth"]
    small, large = (estimate.tokens_per_second(nbytes, gbs) for nbytes in _SIZES)
    facts = {
        "cpuinfer": f"{report['cpuinfer']}, Python {report['python']}, {packages}",
        "system": report["system"],
        "cpu": report["cpu"],
        "instructions": f"{report['instruction_set']} (this CPU runs: {supported})",
        "threads": f"{report['threads']} ({report['threads_reason']})",
        "decoding": f"{report['decode_threads']} threads ({report['decode_threads_reason']})",
        "memory": f"{machine.format_bytes(report['memory_available'])} available",
        "bandwidth": f"{gbs:.1f} GB/s read by {report['decode_threads']} threads",
        "speed": f"about {small:.1f} tok/s with a file of 4 GB (7B, Q4_0), {large:.1f} with 8 GB",
        "kernels": "kept nowhere"
        if cache is None
        else f"{report['cached_kernels']} compiled ones kept in {cache}",
    }
    for name, fact in facts.items():
        yield f"{name:<14}{fact}"
    for warning in report["warnings"]:
        yield f"{'warning':<14}{warning}"
    for name, fact in more:
        yield f"{name:<14}{fact}"


def _compiled(directory: Path) -> int:
    """Kernels in the cache; it may hold them for this program at several places."""
    return len({file.name for file in directory.rglob("*.nbc")})
