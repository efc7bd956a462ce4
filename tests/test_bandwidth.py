"""The bandwidth is measured once and kept."""

import os
import stat
from pathlib import Path

import pytest

from cpuinfer import bandwidth, directories, machine


class Memory:
    """Counts the measurements; every one finds 1 GB/s more than the last."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, threads: int) -> float:
        self.asked.append(threads)
        return 40.0 + len(self.asked)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Memory:
    memory = Memory()
    monkeypatch.setattr(machine, "read_bandwidth", memory)
    monkeypatch.setattr(machine, "cpu_model", lambda: "Some CPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return memory


def kept(tmp_path: Path) -> Path:
    return tmp_path / "cpuinfer/bandwidth.json"


def test_it_is_measured_once(memory: Memory) -> None:
    assert [bandwidth.known(2), bandwidth.known(2)] == [41, 41]
    assert memory.asked == [2]


def test_it_is_another_one_for_other_threads_and_cpus(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [bandwidth.known(1), bandwidth.known(2)] == [41, 42]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(machine, "cpu_model", lambda: "Other CPU")
        assert bandwidth.known(1) == 43
    assert [bandwidth.known(1), bandwidth.known(2)] == [41, 42]


def test_a_new_measurement_takes_the_place_of_the_old(memory: Memory) -> None:
    assert [bandwidth.known(2), bandwidth.measured(2), bandwidth.known(2)] == [41, 42, 42]


def test_the_file_is_the_users_alone(memory: Memory, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        bandwidth.known(2)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(kept(tmp_path).stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "cpuinfer") == ["bandwidth.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[1]",
        b"{",
        b"[" * 100_000,
        b'{"Some CPU": 3}',
        b'{"Some CPU": {"2": "fast"}}',
        b'{"Some CPU": {"2": NaN}}',
        b'{"Some CPU": {"2": -4}}',
        b'{"Some CPU": {"2": 1e300}}',
    ],
    ids=lambda content: str(content[:30]),
)
def test_a_damaged_file_is_measured_again(memory: Memory, tmp_path: Path, content: bytes) -> None:
    bandwidth.known(1)
    kept(tmp_path).write_bytes(content)
    assert [bandwidth.known(2), bandwidth.known(2)] == [42, 42]


def test_without_a_place_it_is_measured_each_time(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path).mkdir(parents=True)  # in the way of the file
    assert [bandwidth.known(2), bandwidth.known(2)] == [41, 42]
    nowhere = directories.CacheDirectory(None, "no room")
    monkeypatch.setattr(directories, "cache_directory", lambda: nowhere)
    assert [bandwidth.known(2), bandwidth.known(2)] == [43, 44]
