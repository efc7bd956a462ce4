"""What `doctor` says of this computer."""

import json
import platform
import re

import numba
import pytest
from command import run

from cpuinfer import machine
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
}


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


def test_a_cache_that_is_not_used_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = machine.CacheDirectory(None, "compiled kernels cannot be kept: no room")
    monkeypatch.setattr(machine, "cache_directory", lambda: kept)
    monkeypatch.setattr(jit, "CACHE", None)
    found = json.loads(run(capsys, "doctor", "--json").out)
    assert found["cache_directory"] is None and found["warnings"] == [kept.warning]
    assert "kernels       kept nowhere" in run(capsys, "doctor").out
