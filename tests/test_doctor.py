"""What `doctor` says of this computer."""

import json
import platform
import re
from pathlib import Path

import numba
import pytest
from command import DEMO, run, variant

from cpuinfer import directories, estimate, machine
from cpuinfer.kernels import jit

KEYS = {
    "cpuinfer",
    "python",
    "packages",
    "system",
    "cpu",
    "instruction_set",
    "supported_instruction_sets",
    "threads",
    "threads_reason",
    "memory_available",
    "decode_threads",
    "decode_threads_reason",
    "bandwidth",
    "cache_directory",
    "cached_kernels",
    "warnings",
    "model",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own for what is measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cpuinfer"


def test_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "doctor", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert set(found) == KEYS
    assert found["python"] == platform.python_version()
    assert found["packages"]["numba"] == numba.__version__
    assert found["instruction_set"] == jit.ISA in found["supported_instruction_sets"]
    assert (found["threads"], found["threads_reason"]) == machine.threads()
    decoding = (found["decode_threads"], found["decode_threads_reason"])
    assert decoding == machine.decode_threads(found["threads"])
    assert found["bandwidth"] > 0 and found["memory_available"] > 0
    if jit.CACHE is not None:
        assert found["cache_directory"] == str(jit.CACHE) and found["cached_kernels"] >= 1


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "doctor")
    assert result.code == 0
    assert re.search(rf"^instructions  {jit.ISA} \(this CPU runs: ", result.out, re.MULTILINE)
    assert re.search(r"^bandwidth     \d+\.\d GB/s read by \d+ threads$", result.out, re.MULTILINE)
    assert "model" not in result.out


def test_the_bandwidth_is_measured_afresh_and_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for gbs in (20.0, 40.0):
        monkeypatch.setattr(machine, "read_bandwidth", lambda threads, gbs=gbs: gbs)
        shown = run(capsys, "doctor").out
        assert f"bandwidth     {gbs} GB/s" in shown
        assert f"{gbs}" in (cache / "bandwidth.json").read_text()
    assert "speed         about 9.0 tok/s with a file of 4 GB (7B, Q4_0), 4.5 with 8 GB" in shown


def test_what_it_means_for_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "FROM_MEMORY", 1)
    monkeypatch.setattr(machine, "instruction_set", lambda: "avx2")
    options = ["--sliding-window", "off", "--context-length", "1024"]
    found = json.loads(run(capsys, "doctor", "--json", DEMO, *options).out)
    inspected = json.loads(run(capsys, "inspect", "--json", DEMO, *options).out)
    assert found["model"]["speed"] == inspected["speed"] is not None
    assert found["model"]["speed"]["bandwidth"] == found["bandwidth"]
    for name in ("weights", "cache", "scratch", "total", "type_bytes", "instead"):
        assert found["model"]["memory"][name] == inspected["memory"][name], name
    monkeypatch.setattr(machine, "memory_available", lambda: found["model"]["memory"]["total"] - 1)
    shown = run(capsys, "doctor", DEMO, *options).out
    for line in (
        f"model         {DEMO}",
        "runs here     yes",
        "memory        161.1 MiB for 1024 positions: weights 3.6 MiB, cache 1.0 MiB, ",
        "available     161.1 MiB, which is too little",
        "instead       a context of 768 positions fits",
        "speed         about ",
    ):
        assert f"\n{line}" in shown, line


def test_a_model_that_does_not_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = variant(tmp_path / "m.gguf", {"general.architecture": "rwkv"})
    result = run(capsys, "doctor", path)
    assert result.code == 0
    assert "\nruns here     no: general.architecture: rwkv is not supported" in result.out
    assert run(capsys, "doctor", tmp_path / "missing.gguf").code == 66
    assert run(capsys, "doctor", DEMO, "--context-length", "1").code == 2


def test_a_cache_that_is_not_used_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = directories.CacheDirectory(None, "compiled kernels cannot be kept: no room")
    monkeypatch.setattr(directories, "cache_directory", lambda: kept)
    monkeypatch.setattr(jit, "CACHE", None)
    found = json.loads(run(capsys, "doctor", "--json").out)
    assert found["cache_directory"] is None and found["warnings"] == [kept.warning]
    assert "kernels       kept nowhere" in run(capsys, "doctor").out
