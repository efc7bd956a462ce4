"""Where compiled kernels are kept, and where not (R05, R06)."""

import os
import stat
import sys
from pathlib import Path

import pytest

from cpuinfer import directories


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


def refused(words: str) -> None:
    found = directories.cache_directory()
    assert found.path is None
    assert words in (found.warning or "")


@pytest.mark.skipif(sys.platform != "linux", reason="the path is another one elsewhere")
def test_cache_directory_is_made_for_us_alone(home: Path) -> None:
    previous = os.umask(0)
    try:
        found = directories.cache_directory()
    finally:
        os.umask(previous)
    assert found == directories.CacheDirectory(home / ".cache/cpuinfer", None)
    assert stat.S_IMODE((home / ".cache/cpuinfer").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / ".cache").stat().st_mode) == 0o700
    assert directories.cache_directory() == found


def test_cache_directory_by_xdg(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert directories.cache_directory().path == home / "elsewhere/cpuinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert directories.cache_directory().path != Path("relative/cpuinfer")


def test_r05_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # not even root makes a directory there
    refused("/proc/cpuinfer")
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    refused(str(home / "file"))


def test_r05_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused("cannot be written")


def test_r05_no_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    refused("home directory")


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_r06_directory_that_others_write_to(
    monkeypatch: pytest.MonkeyPatch, home: Path, mode: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    (home / "cpuinfer").mkdir()
    (home / "cpuinfer").chmod(mode)
    refused(f"mode {mode:o}")


def test_r06_directory_of_another_user(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    (home / "cpuinfer").mkdir()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(f"another user ({owner})")
