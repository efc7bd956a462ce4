"""What this computer is: its instruction set, the cores and the memory allowed to this process,
the bandwidth of its memory, and where compiled kernels may be kept.

Limits of a container (Linux control groups, versions 1 and 2) count as limits of the machine. Files
are looked up under `root`, "/" but for tests. Nothing here is remembered between calls.
"""

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path("/")

# What a kernel for x86-64 needs of the CPU, best first, by the names of /proc/cpuinfo: one of the
# sets beside those in _X86_BASE. The instructions of AVX-VNNI are in AVX512-VNNI too.
_X86_BASE = {"avx2", "fma", "f16c"}
_X86_SETS: dict[str, tuple[set[str], ...]] = {
    "avx512vnni": ({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"},),
    "avxvnni": ({"avx_vnni"}, {"avx512vl", "avx512_vnni"}),
    "avx2": (set(),),
}
_LLVM_NAMES = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni"}

# getauxval(AT_HWCAP) on Linux for aarch64 (asm/hwcap.h).
_AT_HWCAP = 16
_HWCAP_ASIMDDP = 1 << 20


def _read(path: Path) -> str | None:
    """The text of a file the kernel makes, or None where there is none to read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


# CPU


def cpu_model(root: Path = ROOT) -> str:
    """The CPU's name for people, on small boards the board's."""
    info = _read(root / "proc/cpuinfo") or ""
    for key in ("model name", "Model"):
        if found := re.search(rf"^{key}\s*:\s*(\S.*)$", info, re.MULTILINE):
            return found[1].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def supported_instruction_sets(root: Path = ROOT) -> list[str]:
    """Those of "avx512vnni", "avxvnni", "avx2", "neon", "plain" that run here, best first."""
    machine = platform.machine().lower()
    found = []
    if machine in ("x86_64", "amd64"):
        flags = _x86_flags(root)
        for name, alternatives in _X86_SETS.items():
            if any(_X86_BASE | needed <= flags for needed in alternatives):
                found.append(name)
    if machine in ("aarch64", "arm64") and _has_dot_products():
        found.append("neon")
    return [*found, "plain"]


def instruction_set(root: Path = ROOT) -> str:
    """The set kernels are compiled for: the best here, or the one CPUINFER_ISA names.

    ValueError when CPUINFER_ISA names one that does not run here.
    """
    supported = supported_instruction_sets(root)
    wanted = os.environ.get("CPUINFER_ISA")
    if not wanted:
        return supported[0]
    if wanted not in supported:
        raise ValueError(f"CPUINFER_ISA is {wanted!r}, this CPU runs: {', '.join(supported)}")
    return wanted


def _x86_flags(root: Path) -> set[str]:
    info = _read(root / "proc/cpuinfo")
    if info is None:
        return {_LLVM_NAMES.get(name, name) for name in _llvm_features()}
    found = re.search(r"^flags\s*:(.*)$", info, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _has_dot_products() -> bool:
    """Whether an aarch64 CPU has SDOT; asked of the kernel, since an emulator answers there too."""
    if sys.platform == "darwin":
        return True  # every Apple CPU that runs macOS
    if sys.platform == "linux":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
        return bool(getauxval(_AT_HWCAP) & _HWCAP_ASIMDDP)
    return "dotprod" in _llvm_features()


def _llvm_features() -> set[str]:
    import llvmlite.binding

    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on this system
        return set()
    return {name for name, present in features.items() if present}


# Cores


def threads(root: Path = ROOT) -> tuple[int, str]:
    """How many threads to compute with, and why that many.

    The least of the CPUs this process may run on, their physical cores (two threads of one core
    share its arithmetic), and the CPU time of the control groups, rounded down.
    """
    allowed = _allowed_cpus()
    count, reason = len(allowed), f"CPUs this process may run on: {len(allowed)}"
    cores = {
        _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        for cpu in allowed
    }
    if len(cores) < count:
        count, reason = len(cores), f"physical cores: {len(cores)}, with {count} CPUs"
    quota, period = _cpu_quota(root)
    if quota // period < count:
        count = max(1, quota // period)
        reason = f"CPUs the control group allows: {quota / period:g}"
    return count, reason


#: Cores that keep the memory of any machine we know of busy; more only wait for each other.
_MEMORY_CORES = 32


def decode_threads(cores: int) -> tuple[int, str]:
    """How many of `cores` threads to decode with, which is to read the weights, and why."""
    if cores > _MEMORY_CORES:
        return _MEMORY_CORES, f"as many as keep the memory busy: {_MEMORY_CORES}"
    return cores, "as many as for the prompt: each reads its share of the weights"


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpu_quota(root: Path) -> tuple[int, int]:
    """Microseconds of CPU time in a period of so many microseconds, the least of all groups."""
    quotas = [(sys.maxsize, 1)]
    for group in _control_groups(root, "cpu"):
        text = _read(group / "cpu.max")
        if text is None:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            text = f"{quota or '-1'} {period or ''}"
        limit = text.split()
        if limit[0] not in ("max", "-1"):
            quotas.append((int(limit[0]), int(limit[1])))
    return min(quotas, key=lambda pair: pair[0] / pair[1])


def _control_groups(root: Path, controller: str) -> list[Path]:
    """The directories of this process's groups for a controller, of both versions, and of all
    groups around them that can be seen. Some may not exist: a container may see its group under
    another path than the one it is told."""
    own: dict[str, str] = {}  # paths by controller, "" for version 2
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        own.update(dict.fromkeys(names.split(","), path))
    found = []
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        place, _, kind = line.partition(" - ")
        mounted, mount_point = place.split()[3:5]
        fs_type, _, options = kind.split(maxsplit=2)
        if fs_type not in ("cgroup", "cgroup2"):
            continue
        name = "" if fs_type == "cgroup2" else controller
        if name not in own or (fs_type == "cgroup" and name not in options.split(",")):
            continue
        top = root / mount_point.lstrip("/")
        inner = Path(own[name])
        if inner.is_relative_to(mounted):
            inner = inner.relative_to(mounted)
        group = top / str(inner).lstrip("/")
        found.append(group)
        while group != top:
            group = group.parent
            found.append(group)
    return found


# Memory


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a model will take: the weights in the file, the cache, and room to compute in."""

    weights: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch


class NotEnoughMemory(MemoryError):
    """What is planned does not fit; the message has the numbers and `advice`, what to do."""

    def __init__(self, plan: MemoryPlan, available: int, advice: str) -> None:
        super().__init__(
            f"not enough memory: {format_bytes(plan.total)} needed "
            f"(weights {format_bytes(plan.weights)}, cache {format_bytes(plan.cache)}, "
            f"scratch {format_bytes(plan.scratch)}), {format_bytes(available)} available; {advice}"
        )
        self.needed = plan.total
        self.available = available


def check(plan: MemoryPlan, available: int) -> None:
    """NotEnoughMemory when `plan`, of one request, takes more than `available` bytes."""
    if plan.total > available:
        raise NotEnoughMemory(plan, available, "ask for less at once, or free some memory")


def format_bytes(count: int) -> str:
    """A number of bytes for people: "512 B", "1.5 KiB", "3.8 GiB"."""
    if count < 1024:
        return f"{count} B"
    size, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"


def memory_available(root: Path = ROOT) -> int:
    """Bytes this process can still take without swapping; pages of files count as free, since the
    kernel gives them up. On macOS all of the computer's memory, which tells no better."""
    free = [_host_memory(root, "MemAvailable")]
    for group in _control_groups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit is None or used is None or limit.strip() == "max":
            continue
        stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
        # Version 1 has the group's own pages under the plain name, those of groups inside added
        # under "total_"; version 2 adds them always.
        file_pages = sum(
            int(stat.get(f"total_{name}", stat.get(name, 0)))
            for name in ("active_file", "inactive_file")
        )
        free.append(int(limit) - max(0, int(used) - file_pages))
    return max(0, min(free))


def memory_total(root: Path = ROOT) -> int:
    """Bytes this process could have if nothing else ran here: the computer's, or those that its
    control groups allow."""
    sizes = [_host_memory(root, "MemTotal")]
    for group in _control_groups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        if limit is not None and limit.strip() != "max":
            sizes.append(int(limit))
    return min(sizes)


def _host_memory(root: Path, key: str) -> int:
    """What Linux calls MemTotal or MemAvailable."""
    if found := re.search(rf"^{key}:\s*(\d+) kB", _read(root / "proc/meminfo") or "", re.M):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        # MEMORYSTATUSEX: two 32-bit numbers, its own length first, then seven of 64 bits: all of
        # the memory, what of it is free, and more.
        status = (ctypes.c_uint64 * 8)(ctypes.sizeof(ctypes.c_uint64 * 8))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[2 if key == "MemAvailable" else 1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_memory() -> int:
    """Bytes of this process that are in memory now, mapped files included; on macOS, which does not
    tell a process this, the most there were so far."""
    if found := re.search(r"^VmRSS:\s*(\d+) kB", _read(ROOT / "proc/self/status") or "", re.M):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_memory(root: Path = ROOT) -> int | None:
    """The most bytes of this process there were in memory at once, mapped files included; None
    where the system does not tell."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", _read(root / "proc/self/status") or "", re.M)
    return int(found[1]) * 1024 if found else None


def read_bandwidth(threads: int) -> float:
    """GB/s that `threads` threads read from memory together, measured for about 0.3 s.

    NumPy's sum of integers is a plain stream of loads: as fast as a compiled loop, without
    compiling one.
    """
    nbytes = min(256 << 20, memory_available() // 4)
    parts = np.array_split(np.ones(nbytes // 8, np.int64), threads)
    fastest = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            fastest = min(fastest, time.perf_counter() - start)
    return nbytes / fastest / 1e9
