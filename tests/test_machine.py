"""machine.py on made-up computers: trees of /proc, /sys and control groups (R01, R03-R06)."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpuinfer import machine
from cpuinfer.machine import MemoryPlan, NotEnoughMemory

GIB = 1 << 30
UNLIMITED_V1 = "9223372036854771712\n"

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
V1_IN_CONTAINER = V1_MOUNTS.replace(" / /sys/fs/cgroup/", " /docker/abc /sys/fs/cgroup/")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(path: str) -> dict[str, str]:
    return {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": V2_MOUNT}


def v1(path: str, mounts: str = V1_MOUNTS) -> dict[str, str]:
    lines = f"12:pids:/\n4:memory:{path}\n2:cpu,cpuacct:{path}\n1:name=systemd:/init\n"
    return {"proc/self/cgroup": lines, "proc/self/mountinfo": mounts}


def use_cpus(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus), raising=False)


# Instruction sets

AVX2 = "fpu sse2 ssse3 fma f16c avx avx2"
AVX512 = "avx512f avx512bw avx512vl avx512dq"
X86 = [
    ("fpu sse2", ["plain"]),
    ("sse2 avx avx2 fma", ["plain"]),
    (AVX2, ["avx2", "plain"]),
    (f"{AVX2} avx_vnni", ["avxvnni", "avx2", "plain"]),
    (f"{AVX2} {AVX512}", ["avx2", "plain"]),
    (f"{AVX2} avx512f avx512_vnni", ["avx2", "plain"]),
    (f"{AVX2} {AVX512} avx512_vnni", ["avx512vnni", "avxvnni", "avx2", "plain"]),
]


def x86(monkeypatch: pytest.MonkeyPatch, root: Path, flags: str) -> Path:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    info = f"processor\t: 0\nmodel\t\t: 17\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: {flags}\n"
    return tree(root, {"proc/cpuinfo": info + "\n" + info.replace("Some", "Other")})


@pytest.mark.parametrize(("flags", "sets"), X86)
def test_x86_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, sets: list[str]
) -> None:
    monkeypatch.delenv("CPUINFER_ISA", raising=False)
    root = x86(monkeypatch, tmp_path, flags)
    assert machine.supported_instruction_sets(root) == sets
    assert machine.instruction_set(root) == sets[0]


@pytest.mark.parametrize(("dot", "sets"), [(True, ["neon", "plain"]), (False, ["plain"])])
@pytest.mark.parametrize("name", ["aarch64", "arm64"])
def test_arm_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, dot: bool, sets: list[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    monkeypatch.setattr(machine, "_has_dot_products", lambda: dot)
    assert machine.supported_instruction_sets(tmp_path) == sets


def test_other_machines_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert machine.supported_instruction_sets() == ["plain"]


def test_llvm_tells_the_same_as_the_kernel(tmp_path: Path) -> None:
    # tmp_path has no /proc/cpuinfo.
    sets = machine.supported_instruction_sets()
    assert machine.supported_instruction_sets(tmp_path) == sets


def test_set_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = x86(monkeypatch, tmp_path, f"{AVX2} {AVX512} avx512_vnni")
    for name in ("avx512vnni", "avxvnni", "avx2", "plain"):
        monkeypatch.setenv("CPUINFER_ISA", name)
        assert machine.instruction_set(root) == name
    monkeypatch.setenv("CPUINFER_ISA", "neon")
    with pytest.raises(ValueError, match=r"CPUINFER_ISA.*neon.*: avx512vnni, avxvnni, avx2, plain"):
        machine.instruction_set(root)


def test_cpu_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.cpu_model(x86(monkeypatch, tmp_path, AVX2)) == "Some CPU @ 3 GHz"
    board = "processor\t: 0\nCPU part\t: 0xd0b\n\nRevision\t: d04170\nModel\t\t: Some Board 5\n"
    assert machine.cpu_model(tree(tmp_path, {"proc/cpuinfo": board})) == "Some Board 5"
    assert machine.cpu_model(tmp_path / "nothing") != ""


# Threads (R03)


def test_threads_follow_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cpus(monkeypatch, 1, 5, 6)
    assert machine.threads(tmp_path) == (3, "CPUs this process may run on: 3")


@pytest.mark.parametrize(
    ("quota", "count", "reason"),
    [
        ("50000 100000", 1, "control group allows: 0.5"),
        ("200000 100000", 2, "control group allows: 2"),
        ("765000 100000", 7, "control group allows: 7.65"),
        ("max 100000", 16, "may run on: 16"),
        ("6400000 100000", 16, "may run on: 16"),
    ],
)
def test_threads_follow_the_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, count: int, reason: str
) -> None:
    use_cpus(monkeypatch, *range(16))
    root = tree(tmp_path / "2", v2("/app") | {"sys/fs/cgroup/app/cpu.max": f"{quota}\n"})
    assert machine.threads(root)[0] == count
    assert reason in machine.threads(root)[1]
    limit, period = quota.replace("max", "-1").split()
    files = {
        "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": f"{limit}\n",
        "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": f"{period}\n",
    }
    assert machine.threads(tree(tmp_path / "1", v1("/app") | files)) == machine.threads(root)


def test_quota_of_a_group_around_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cpus(monkeypatch, *range(8))
    files = {
        "sys/fs/cgroup/pod/app/inner/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/app/cpu.max": "300000 50000\n",
        "sys/fs/cgroup/pod/cpu.max": "350000 100000\n",
    }
    assert machine.threads(tree(tmp_path, v2("/pod/app/inner") | files))[0] == 3


def test_quota_in_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The group is named as the host sees it and mounted where a top group would be.
    use_cpus(monkeypatch, *range(8))
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    for number, path in enumerate(["/docker/abc", "/", "/../other"]):
        root = tree(tmp_path / str(number), v1(path, V1_IN_CONTAINER) | files)
        assert machine.threads(root) == (2, "CPUs the control group allows: 2.5")
    inner = {name.replace("/cpu.", "/inner/cpu."): text for name, text in files.items()}
    root = tree(tmp_path / "inner", v1("/docker/abc/inner", V1_IN_CONTAINER) | inner)
    assert machine.threads(root)[0] == 2


@pytest.mark.parametrize(("cores", "count"), [(1, 1), (4, 4), (32, 32), (33, 32), (192, 32)])
def test_decoding_takes_no_more_threads_than_memory_feeds(cores: int, count: int) -> None:
    assert machine.decode_threads(cores)[0] == count


def test_threads_are_no_more_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    topology = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}"
        for cpu in range(8)
    }
    root = tree(tmp_path, topology)
    use_cpus(monkeypatch, *range(8))
    assert machine.threads(root) == (4, "physical cores: 4, with 8 CPUs")
    use_cpus(monkeypatch, 0, 4, 5)
    assert machine.threads(root)[0] == 2
    use_cpus(monkeypatch, 1, 2, 3)
    assert machine.threads(root)[0] == 3


def test_the_least_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_cpus(monkeypatch, 0, 1, 2)
    root = tree(tmp_path, v2("/") | {"sys/fs/cgroup/cpu.max": "765000 100000\n"})
    assert machine.threads(root)[0] == 3


# Memory (R01, R04)

MEMINFO = {"proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 50331648 kB\n"}


def test_memory_of_the_host(tmp_path: Path) -> None:
    assert machine.memory_available(tree(tmp_path, MEMINFO)) == 48 * GIB


def group_v2(place: str, limit: str, used: int, active: int, inactive: int) -> dict[str, str]:
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": f"anon 5\nactive_file {active}\ninactive_file {inactive}\n",
    }


@pytest.mark.parametrize(
    ("limit", "used", "active", "inactive", "available"),
    [
        (str(8 * GIB), 2 * GIB, 0, 0, 6 * GIB),
        (str(8 * GIB), 8 * GIB, 4 * GIB, 3 * GIB, 7 * GIB),  # full of pages of files
        (str(8 * GIB), 9 * GIB, 0, GIB // 2, 0),
        ("max", 60 * GIB, 0, 0, 48 * GIB),
        (str(500 * GIB), GIB, 0, 0, 48 * GIB),
    ],
)
def test_memory_of_the_group(
    tmp_path: Path, limit: str, used: int, active: int, inactive: int, available: int
) -> None:
    files = group_v2("sys/fs/cgroup/app", limit, used, active, inactive)
    root = tree(tmp_path / "2", MEMINFO | v2("/app") | files)
    assert machine.memory_available(root) == available
    place = "sys/fs/cgroup/memory/app"
    files = {
        f"{place}/memory.limit_in_bytes": UNLIMITED_V1 if limit == "max" else limit,
        f"{place}/memory.usage_in_bytes": f"{used}\n",
        # Without the pages of the groups inside, "active_file" would say too little.
        f"{place}/memory.stat": f"active_file 0\ninactive_file 0\ntotal_active_file {active}\n"
        f"total_inactive_file {inactive}\n",
    }
    root = tree(tmp_path / "1", MEMINFO | v1("/app") | files)
    assert machine.memory_available(root) == available


def test_memory_of_a_group_around_ours(tmp_path: Path) -> None:
    inner = group_v2("sys/fs/cgroup/pod/app", "max", GIB, 0, 0)
    outer = group_v2("sys/fs/cgroup/pod", str(4 * GIB), 3 * GIB, GIB, 0)
    root = tree(tmp_path, MEMINFO | v2("/pod/app") | inner | outer)
    assert machine.memory_available(root) == 2 * GIB


@pytest.mark.parametrize(("limit", "total"), [("max", 64), (8 * GIB, 8), (500 * GIB, 64)])
def test_all_memory_that_is_allowed(tmp_path: Path, limit: int | str, total: int) -> None:
    group = {"sys/fs/cgroup/app/memory.max": f"{limit}\n"}
    root = tree(tmp_path / "2", MEMINFO | v2("/app") | group)
    assert machine.memory_total(root) == total * GIB
    place = "sys/fs/cgroup/memory/app/memory.limit_in_bytes"
    group = {place: UNLIMITED_V1 if limit == "max" else f"{limit}\n"}
    assert machine.memory_total(tree(tmp_path / "1", MEMINFO | v1("/app") | group)) == total * GIB


def test_memory_of_this_computer() -> None:
    assert 0 < machine.memory_available() < 1 << 50


def test_a_plan_that_fits_passes() -> None:
    machine.check(MemoryPlan(weights=4 * GIB, cache=GIB, scratch=GIB), 6 * GIB)


def test_r01_more_than_there_is(tmp_path: Path) -> None:
    files = group_v2("sys/fs/cgroup/app", str(6 * GIB), GIB, 0, GIB // 2)
    available = machine.memory_available(tree(tmp_path, MEMINFO | v2("/app") | files))
    plan = MemoryPlan(weights=4 * GIB, cache=2 * GIB, scratch=512 << 20)
    with pytest.raises(NotEnoughMemory) as caught:
        machine.check(plan, available)
    assert (caught.value.needed, caught.value.available) == (plan.total, available)
    assert str(caught.value) == (
        "not enough memory: 6.5 GiB needed (weights 4.0 GiB, cache 2.0 GiB, scratch 512.0 MiB), "
        "5.5 GiB available; ask for less at once, or free some memory"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (4 * GIB, "4.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert machine.format_bytes(count) == text


def test_resident_memory_sees_what_is_taken() -> None:
    before = machine.resident_memory()
    taken = np.ones(64 << 20, np.uint8)
    assert machine.resident_memory() - before > 0.9 * taken.nbytes


def test_bandwidth_is_a_number() -> None:
    assert 0.01 < machine.read_bandwidth(2) < 10_000


def test_importing_it_loads_no_compiler() -> None:
    code = "import sys, cpuinfer.machine; print({'numba', 'llvmlite'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
