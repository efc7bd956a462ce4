"""What the instruments reckon and print: bench, the comparison, the look at kernels."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import DEMO, child, run, warm
from conftest import TINY

from cpuinfer import LLM, bench, machine, measure
from cpuinfer.cost import Cost, Rows, bytes_per_token, pass_cost
from cpuinfer.gguf import QTensor
from cpuinfer.kernels.jit import Kernel
from cpuinfer.measure import Case, Sample
from quant.ggml_types import GGMLType
from tools import bench as bench_tool
from tools import compare, hot_loop

TOOLS = Path(bench_tool.__file__).parent
FEW = ["-p", "8", "-n", "4", "-r", "2", "--depth", "0", "--depth", "3000"]


# Cases and costs


def test_a_case_is_read_in_chunks_with_logits_at_its_end() -> None:
    case = Case("", depth=10, tokens=7, steps=2, n_logits=4)
    assert list(case.passes(3)) == [
        Rows(10, 3, 0),
        Rows(13, 3, 3),
        Rows(16, 1, 1),
        Rows(17, 3, 0),
        Rows(20, 3, 3),
        Rows(23, 1, 1),
    ]


def test_a_case_is_cut_to_the_context() -> None:
    prompt = Case("pp512", depth=4096, tokens=512)
    assert prompt.fit(8192) == prompt
    assert prompt.fit(1000) == Case("pp512", depth=488, tokens=512)
    assert prompt.fit(100) == Case("pp100", depth=0, tokens=100)
    assert Case("tg128", steps=128).fit(100) == Case("tg100", steps=100)
    assert Case("rows", tokens=16, steps=4, n_logits=16).fit(40).steps == 2


def test_what_is_cut_is_measured_once_and_noted() -> None:
    groups = [[Case("pp8", depth, tokens=8)] for depth in (0, 50, 90)]
    found, notes = bench.fitting(groups, 40)
    assert found == [[Case("pp8", 0, tokens=8)], [Case("pp8", 32, tokens=8)]]
    assert notes == [
        "pp8 at 50 is pp8 at 32: the context is 40 positions",
        "pp8 at 90 is pp8 at 32: the context is 40 positions",
    ]


def file_of(**shapes: tuple[int, ...]) -> Any:
    """A file of float32 tensors with these shapes."""
    tensors = {}
    for name, shape in shapes.items():
        full = f"{name.replace('__', '.')}.weight"
        data = np.zeros((int(np.prod(shape[:-1])), 4 * shape[-1]), np.uint8)
        tensors[full] = QTensor(full, GGMLType.F32, shape, data)
    return SimpleNamespace(tensors=tensors)


def test_the_cost_of_a_pass() -> None:
    # TINY: 2 layers, 4 heads of 16 for 2 of keys and values, no window
    file = file_of(token_embd=(50, 64), output=(50, 64), blk__0__ffn_up=(96, 64), output_norm=(64,))
    layers, output = 4 * (96 * 64 + 64), 4 * 50 * 64
    assert bytes_per_token(file) == layers + output
    # three tokens behind five positions see 6, 7 and 8; a position has 2 x 2 x 2 x 16 halves
    two = pass_cost(file, TINY, "f16", [Rows(5, 3, 0)])
    assert two == Cost(layers + 8 * 256, 3 * 96 * 64 + 2 * 2 * 4 * 16 * (6 + 7 + 8))
    with_logits = pass_cost(file, TINY, "f16", [Rows(5, 3, 2), Rows(0, 1, 1)])
    more = Cost(output + 256, 3 * 50 * 64 + 96 * 64 + 2 * 2 * 4 * 16)
    assert with_logits == two + more


def test_a_window_and_a_tied_output_cost_less() -> None:
    file = file_of(token_embd=(50, 64), blk__0__ffn_up=(96, 64))
    assert bytes_per_token(file) == 4 * (96 * 64 + 50 * 64)
    config = replace(TINY, sliding_window=4)
    # two tokens under a window of four read five positions and see four each
    found = pass_cost(file, config, "f32", [Rows(20, 2, 1)])
    assert found.nbytes == 4 * (96 * 64 + 50 * 64) + 5 * 512
    assert found.macs == 2 * 96 * 64 + 50 * 64 + 2 * 2 * 4 * 16 * 8


# Figures


def test_figures_of_a_case() -> None:
    case = Case("tg3", sequences=2, tokens=1, steps=3)  # 6 tokens
    samples = [Sample(2.0, 25.0), Sample(1.0, 40.0), Sample(4.0, 10.0)]
    found = bench.entry(case, Cost(int(30e9), int(60e9)), samples, 120.0)
    assert found["toks"] == {"median": 3.0, "lowest": 1.5, "highest": 6.0}
    assert found["step_seconds"]["median"] == pytest.approx(2 / 3)
    assert found["bytes_per_token"] == 5e9 and found["macs_per_token"] == 10e9
    assert found["gbps"] == 15.0 and found["bandwidth"] == 25.0
    assert found["bandwidth_percent"] == 75.0  # of 15 by 25, 30 by 40, 7.5 by 10
    assert found["gmacs"] == 30.0 and found["compute_percent"] == 25.0


def test_ratios_are_taken_in_each_round() -> None:
    def samples(*seconds: float) -> list[Sample]:
        return [Sample(s, 1.0) for s in seconds]

    one, eight = ({"tokens": n, "sequences": 1, "steps": 2} for n in (1, 8))
    found = bench.ratios(eight, samples(4, 12, 10), one, samples(2, 4, 10))
    assert found["step_ratio"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert found["toks_ratio"] == pytest.approx({"median": 4, "lowest": 8 / 3, "highest": 8})


def test_a_measurement_has_the_bandwidth_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([10.0, 20.0, 40.0])
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: next(readings))
    bandwidth = measure.Bandwidth(2)
    assert bandwidth.beside(1.5) == Sample(1.5, 15.0)
    assert bandwidth.beside(2.5) == Sample(2.5, 30.0)
    assert bandwidth.readings == [10.0, 20.0, 40.0]


def test_peak_memory(tmp_path: Path) -> None:
    assert machine.peak_memory(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmPeak:\t 99 kB\nVmHWM:\t   12 kB\n")
    assert machine.peak_memory(tmp_path) == 12 * 1024


def test_the_clock_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    call = Kernel.__call__
    kernel = SimpleNamespace(name="some", _ready=True, _dispatcher=lambda x: next(ticks) and x)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(ticks)))
    with measure.kernel_clock() as spent:
        assert Kernel.__call__(kernel, 7) == 7  # type: ignore[arg-type]
        Kernel.__call__(kernel, 7)  # type: ignore[arg-type]
    assert spent == {"some": 4.0}  # each call takes one tick and ends at the next
    assert Kernel.__call__ is call


@pytest.mark.parametrize("depth", [0, 100, 383, 1000])
def test_a_depth_is_filled_with_numbers(depth: int) -> None:
    with LLM(DEMO) as llm:
        model = llm.model
        case = Case("", depth, tokens=2)
        cache = measure._cache(model, case)
        assert cache.capacity == min(model.capacity, depth + 2) and model.capacity == 383
        filled = min(depth, cache.capacity)
        for numbers in (cache.keys, cache.values):
            numbers = numbers.view(np.float16)[:, :, :, : model.config.head_dim]
            assert np.isfinite(numbers).all()
            assert (numbers != 0).any(axis=3).sum() == filled * numbers[:, :, 0, 0].size
        cache.offset = depth
        assert measure.measure(model, [case], 1, SimpleNamespace(beside=lambda s: s))[0][0] > 0  # type: ignore[arg-type]


# The command


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the command prints of the bundled model."""
    result = child("bench", *FEW, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"\n") == 1 and result.stderr == b""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_document_is_complete(report: dict[str, Any]) -> None:
    cases = [(one["name"], one["depth"]) for one in report["speed"]]
    assert cases == [("pp8", 0), ("pp8", 2040), ("tg4", 0), ("tg4", 2044)]
    assert [one["tokens"] for one in report["rows"]] == [1, 2, 4, 8, 16]
    assert [one["sequences"] for one in report["sequences"]] == [1, 8]
    assert len(report["notes"]) == 2 and report["main_type"] == "Q8_0"
    assert report["repetitions"] == 2 and report["model"] == str(DEMO)
    assert report["start_seconds"]["lowest"] > report["first_token_seconds"]["lowest"] > 0
    assert report["peak_memory"] > report["bytes_per_token"] > 3_000_000
    assert report["compute_roof"] > 0 and report["bandwidth_roof"]["lowest"] > 0
    step = report["step"]
    assert 0 < step["outside_kernels"] < step["seconds"]
    assert 0 < step["outside_kernels_percent"] < 100


def test_the_figures_are_consistent(report: dict[str, Any]) -> None:
    everything = [*report["speed"], *report["rows"], *report["sequences"]]
    for one in everything:
        assert one["toks"]["lowest"] <= one["toks"]["median"] <= one["toks"]["highest"]
        assert one["gbps"] == pytest.approx(one["bytes_per_token"] * one["toks"]["median"] / 1e9)
        assert one["gmacs"] == pytest.approx(one["macs_per_token"] * one["toks"]["median"] / 1e9)
        assert one["compute_percent"] == pytest.approx(100 * one["gmacs"] / report["compute_roof"])
        assert one["bandwidth_percent"] > 0
    first, deep = report["speed"][2:]
    # the window is 128; positions 0 to 3 are read on from 1 to 4 others
    position = first["bytes_per_token"] - report["bytes_per_token"]
    assert position > 0
    assert deep["bytes_per_token"] - report["bytes_per_token"] == pytest.approx(
        position / 2.5 * 128
    )
    assert report["rows"][0]["step_ratio"]["median"] == 1
    eight = report["sequences"][1]
    assert eight["toks_ratio"]["lowest"] == pytest.approx(8 / eight["step_ratio"]["highest"])


def test_the_table(report: dict[str, Any]) -> None:
    lines = list(bench.text(report))
    assert lines[0] == f"model        {DEMO}: Q8_0, 3.6 MiB of weights a token"
    shown = "\n".join(lines)
    for one in report["speed"]:
        speed = rf"^{one['name']} +{one['depth']}  [\d.]+ \([\d.]+ to [\d.]+\) "
        assert re.search(speed, shown, re.MULTILINE)
    assert re.search(r"^ +16  [\d.]+ \(", shown, re.MULTILINE)
    assert re.search(r"^step .* us of it \([\d.]+ %\) outside kernels$", shown, re.MULTILINE)
    assert lines[-1] == f"note         {report['notes'][-1]}"
    unknown = "\n".join(bench.text({**report, "peak_memory": None}))
    assert "peak memory unknown" in unknown


@pytest.mark.parametrize(
    ("number", "shown"), [(3750.9, "3751"), (375.06, "375.1"), (37.506, "37.51"), (0.3751, "0.375")]
)
def test_figures_for_people(number: float, shown: str) -> None:
    assert bench._figure(number) == shown


def test_the_tool_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_tool.main(["nothing.gguf"]) == 66
    assert capsys.readouterr().err == "cpuinfer: nothing.gguf: No such file or directory\n"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("-p 0", "prompt"),
        ("-n 0", "generation"),
        ("-r 0", "repetitions"),
        ("--depth -1", "depth"),
        ("--depth many", "--depth"),
        ("--threads 0", "threads"),
    ],
)
def test_bad_options(argv: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "bench", *argv.split())
    assert (result.code, result.out) == (2, "") and word in result.err
    assert result.err.count("\n") == 1


# The plot


def test_the_plot(report: dict[str, Any], tmp_path: Path) -> None:
    bench_plot = pytest.importorskip("cpuinfer.bench_plot", reason="matplotlib is not installed")
    bench_plot.draw(report, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    labels = [label for label, _, _ in bench_plot.points(report)]
    assert labels[:3] == ["pp8 at 0", "pp8 at 2040", "tg4 at 0"]
    assert labels[4:] == ["2 rows", "4 rows", "8 rows", "16 rows", "8 sequences"]
    _, across, up = bench_plot.points(report)[2]
    one = report["speed"][2]
    assert across == one["macs_per_token"] / one["bytes_per_token"] and up == one["gmacs"]


def test_a_plot_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for path in (tmp_path, tmp_path / "none/roof.png"):
        result = run(capsys, "bench", "--plot", path)
        assert (result.code, result.out) == (73, "") and str(path) in result.err


def test_a_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "cpuinfer.bench_plot", raising=False)
    monkeypatch.setattr(sys.modules["cpuinfer"], "bench_plot", None, raising=False)
    monkeypatch.delattr(sys.modules["cpuinfer"], "bench_plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(capsys, "bench", "--plot", "roof.png")
    assert (result.code, result.out) == (2, "") and "cpuinfer[plot]" in result.err
    assert result.err.count("\n") == 1


# The comparison


def test_ratios_of_the_comparison() -> None:
    found = compare.item("decode", 32, [[2.0, 4.0, 8.0], [6.0, 5.0, 7.0]])
    assert found["ratio"] == 1.5 and found["tokens"] == 32
    lines = compare.table(
        {
            "model": "m.gguf",
            "cpu": "some",
            "rounds": 3,
            "depth": 0,
            "ours": "one",
            "peer": "other",
            "items": [found, compare.item("peak memory", None, [[1024.0], [512.0]])],
            "decode_bandwidth_percent": [80.0, 60.0],
            "bandwidth": [10.0, 12.0],
        }
    )
    assert "decode                  8.00 tok/s      5.33 tok/s    1.50" in lines
    assert "peak memory                1.0 KiB           512 B    0.50" in lines


class Fake:
    """An engine that keeps what it is asked."""

    name = "fake"

    def __init__(self) -> None:
        self.offset = 0
        self.asked: list[tuple[int, int]] = []

    def read(self, ids: Any) -> None:
        self.asked.append((self.offset, len(ids)))
        self.offset += len(ids)

    def rewind(self, offset: int) -> None:
        assert offset <= self.offset
        self.offset = offset

    def first_token(self) -> dict[str, Any]:
        return {"seconds": 1.0, "peak_memory": None}


def test_both_engines_do_the_same_work() -> None:
    engines = [Fake(), Fake()]
    bandwidth: Any = SimpleNamespace(beside=lambda seconds: Sample(seconds, 1.0))
    items = compare.running(engines, list(range(110)), 30, 40, 1, bandwidth)
    assert engines[0].asked == engines[1].asked
    expected = [(0, 30), (30, 40)]  # the depth, the prompt
    expected += [(70 + i, 1) for i in range(40)]
    for n in compare.ROWS:
        expected += [(70 + i * n, n) for i in range(4)]
    assert engines[0].asked == expected
    assert [one["tokens"] for one in items] == [40, 40, 8, 16, 32]
    assert [one["name"] for one in compare.fresh(engines, 2)] == ["first token"]


def test_without_the_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert compare.main([str(DEMO)]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and "GGML_NATIVE" in found.err


# The machine code of kernels

_CODE = """
tile:
	cmp	x2, #1
.LBB0_1:
	mov	x9, xzr
.LBB0_2:
	ldr	q1, [x0]
	sdot	v0.4s, v1.16b, v2.4b[0]
	sdot	v3.4s, v1.16b, v2.16b
	{vex}	vpdpbusd	%ymm1, %ymm2, %ymm3
	b.lt	.LBB0_2
.LBB0_3:
	.p2align	4
	ldr	q1, [x0]
	fmla	v0.4s, v1.4s, v2.4s
	cbnz	x9, .LBB0_3
	b	.LBB0_1
	ret
"""


def test_the_hot_loop_is_the_innermost_that_multiplies_most() -> None:
    loop = hot_loop.hot_loop(_CODE)
    assert loop.label == ".LBB0_2" and len(loop.lines) == 5
    assert loop.products == 16 + 16 + 32
    with pytest.raises(ValueError, match="no loop"):
        hot_loop.hot_loop("tile:\n\tret\n")


def kernels(*argv: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own: it writes code for another CPU than this one."""
    warm()
    command = [sys.executable, str(TOOLS / "bench_kernels.py"), "--type", "Q4_0", *argv]
    paths = {"PYTHONPATH": os.pathsep.join([str(TOOLS.parent), str(TOOLS)])}
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths})


def test_code_for_arm_is_written_anywhere() -> None:
    result = kernels("--cpu", "cortex-a76")
    assert result.returncode == 0, result.stderr
    counts = re.findall(
        r"^Q4_0, (\d) tokens?, \S+ \d+ instructions, ([\d.]+) for 8 x 32", result.stdout, re.M
    )
    assert [tokens for tokens, _ in counts] == ["1", "4"]
    # 8 rows x 32 weights x 1 token are at least 16 products of 16 bytes
    assert float(counts[0][1]) > 16 and float(counts[1][1]) > 64
    assert "sdot" in result.stdout


def test_cycles_on_arm() -> None:
    if shutil.which("llvm-mca") is None:
        pytest.skip("no llvm-mca")
    result = kernels("--cpu", "cortex-a76", "neoverse-n1", "--mca")
    assert result.returncode == 0, result.stderr
    one, four = (line.split() for line in result.stdout.splitlines()[2:])
    assert one[:3] == ["Q4_0", "1", "144"] and four[:3] == ["Q4_0", "4", "144"]
    assert one[-1] == "115" and 8 < float(one[4]) < float(four[4])


def test_this_cpu_and_what_cannot_be() -> None:
    assert kernels("--asm", "--isa", "plain").stdout.startswith("Q4_0, 1 ")
    for argv in (["--mca"], ["--cpu", "cortex-a76", "--mca", "no-such-mca"], ["--isa", "mmx"]):
        result = kernels(*argv)
        assert (result.returncode, result.stdout) == (2, ""), argv
