"""What speed is expected of a model, and the line before it is loaded."""

from pathlib import Path

import mistral_shape
import pytest
from command import DEMO, run
from mistral_shape import POSITION

from cpuinfer import bandwidth, estimate, machine
from quant.ggml_types import GGMLType

#: All matrices of a layer, 18 bytes for 32 weights, the output with 210 for 256, and the norms.
LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
TOKEN = 32 * LAYER * 18 // 32 + 32000 * 4096 * 210 // 256 + 65 * 4096 * 4


@pytest.fixture
def gbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A computer of 40 GB/s."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CPUINFER_ISA", machine.supported_instruction_sets()[0])
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 40.0)


@pytest.fixture
def large_demo(monkeypatch: pytest.MonkeyPatch, gbs: None) -> None:
    """The bundled model passes for one that loads for long and whose weights no cache holds."""
    monkeypatch.setattr(estimate, "LARGE", 1_000_000)
    monkeypatch.setattr(estimate, "FROM_MEMORY", 1_000_000)


needs_vectors = pytest.mark.skipif(
    machine.supported_instruction_sets()[0] == "plain", reason="the cores are the limit here"
)


@needs_vectors
@pytest.mark.parametrize(
    ("window", "context_length", "positions"),
    [(None, 32768, 32768), (4096, 32768, 4096), (4096, 1000, 1000), (None, 1000, 1000)],
)
def test_speed_is_bytes_in_the_bandwidth(
    gbs: None, window: int | None, context_length: int, positions: int
) -> None:
    found = estimate.speed(
        mistral_shape.file(), mistral_shape.config(window), "f16", context_length, 2
    )
    assert found is not None
    assert (found.positions, found.bandwidth, found.threads) == (positions, 40.0, 2)
    assert found.tokens_per_second == pytest.approx(36e9 / (TOKEN + POSITION), rel=1e-9)
    full = TOKEN + positions * POSITION
    assert found.tokens_per_second_full == pytest.approx(36e9 / full, rel=1e-9)


@needs_vectors
def test_speed_for_people() -> None:
    found = estimate.Speed(8.9234, 0.456, 32768, 40.0, 2)
    assert str(found) == "about 8.9 tok/s, 0.5 with 32768 positions in the cache"
    assert str(estimate.Speed(123.4, 99.6, 512, 40.0, 2)).startswith("about 123 tok/s, 100 with")


def test_nothing_is_said_where_the_memory_is_not_the_limit(
    gbs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speed(qtype: GGMLType) -> estimate.Speed | None:
        file, config = mistral_shape.file(qtype), mistral_shape.config(None)
        return estimate.speed(file, config, "f16", 4096, 2)

    assert speed(GGMLType.Q2_K) is None  # no kernel
    monkeypatch.setenv("CPUINFER_ISA", "plain")
    assert speed(GGMLType.Q4_0) is None


def test_a_small_model_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bandwidth, "known", None)
    result = run(capsys, "generate", "-p", "x", "-n", "1", "--stats")
    assert result.code == 0 and "GiB" not in result.err.splitlines()[0]
    assert '"speed": null' in run(capsys, "inspect", "--json", DEMO).out


@needs_vectors
def test_the_line_before_a_large_model(
    large_demo: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 5 << 30)
    argv = ("generate", "-p", "x", "-n", "1", "--threads", "1", "--kv-type", "q8_0")
    first, *_ = run(capsys, *argv, "--stats").err.splitlines()
    # 4 layers, 2 heads of 32 numbers padded to 64 in 68 bytes, twice; 128 + 255 positions
    cache = 4 * 2 * 68 * 2 * (128 + 255) / 1024
    assert first.startswith(
        f"cpuinfer: 3.6 MiB of weights, {cache:.1f} KiB of cache, "
        "156.5 MiB to compute in, of 5.0 GiB free; expect about "
    )
    assert first.endswith(" with 128 positions in the cache")
    assert run(capsys, *argv).err == ""  # into a pipe, unasked


def test_a_large_model_that_is_refused_is_not_announced(
    large_demo: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 2 << 20)
    result = run(capsys, "generate", "-p", "x", "-n", "1", "--stats")
    assert result.code == 75 and result.err.count("\n") == 1
    for wrong in (["--threads", "0"], ["--context-length", "1"]):
        result = run(capsys, "generate", "-p", "x", *wrong, "--stats", "--force")
        assert result.code == 2 and wrong[0][2:].replace("-", "_") in result.err


def test_forced_it_runs_and_says_that_it_may_swap(
    large_demo: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("generate", "-p", "x", "-n", "2", "--seed", "1")
    wanted = run(capsys, *argv).out
    monkeypatch.setattr(machine, "memory_available", lambda: 2 << 20)
    assert run(capsys, *argv).code == 75
    result = run(capsys, *argv, "--force", "--stats")
    assert (result.code, result.out) == (0, wanted)
    before, warning, *_ = result.err.splitlines()
    assert before.endswith("156.5 MiB to compute in, of 2.0 MiB free")
    assert warning == (
        "cpuinfer: warning: the model takes 158.5 MiB more memory than is free: it may swap"
    )
