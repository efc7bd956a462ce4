"""What `cpuinfer bench` finds out: how fast a model runs here, and how near that is to the roofs.

A token cannot be faster than its weights are read (bandwidth) nor than its multiplications are
done (compute); cost.py reckons both.  Each measurement is held against the bandwidth read beside
it.  Figures are medians of the repetitions with the lowest and the highest, ratios those of each
round.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cpuinfer import __version__, machine, measure
from cpuinfer.config import ModelConfig
from cpuinfer.cost import Cost, bytes_per_token, pass_cost
from cpuinfer.gguf import GGUFFile
from cpuinfer.llm import LLM
from cpuinfer.measure import Bandwidth, Case, Sample

Report = dict[str, Any]

ROWS = (1, 2, 4, 8, 16)
SEQUENCES = (1, 8)


@dataclass(frozen=True)
class Settings:
    """What is measured: tokens of a prompt and of a generation, behind how many positions."""

    prompt: int = 512
    generation: int = 128
    depths: Sequence[int] = (0, 4096)
    repetitions: int = 3

    def __post_init__(self) -> None:
        for name in ("prompt", "generation", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.depths) < 0:
            raise ValueError(f"a depth must be at least 0, got {min(self.depths)}")


def cases(settings: Settings) -> list[list[Case]]:
    """Groups of cases that are measured in turn: prompts, generation, rows, sequences."""
    alone = [[Case(f"pp{settings.prompt}", d, tokens=settings.prompt)] for d in settings.depths]
    alone += [
        [Case(f"tg{settings.generation}", d, steps=settings.generation)] for d in settings.depths
    ]
    # Sixteen rows in a step of a large model take as long as a few single ones.
    steps = max(1, settings.generation // 8)
    rows = [Case("rows", tokens=n, steps=steps, n_logits=n) for n in ROWS]
    return [*alone, rows, [Case("sequences", sequences=n, steps=steps) for n in SEQUENCES]]


def examine(
    loaded: LLM,
    settings: Settings,
    loading: dict[str, Any],
    say: Callable[[str], None],
) -> Report:
    """The whole report on a model, which is closed then; `loading` are LLM's parameters that it was
    loaded with, and `say` gets a line about what is measured next."""
    with loaded:
        bandwidth = Bandwidth(loaded.threads)
        matrix = measure.main_matrix(loaded.file)
        compute = measure.compute_roof(matrix, loaded.threads)
        passes = _passes(loaded, settings, bandwidth, compute, say)
    say("fresh processes")  # now that its memory is theirs
    times = range(settings.repetitions)
    path = str(loaded.path)
    starts = [measure.start(path, loading) for _ in times]
    first_tokens = [measure.first_token_in_child(path, loading) for _ in times]
    return {
        "cpuinfer": __version__,
        "model": path,
        "main_type": matrix.qtype.name,
        "cpu": machine.cpu_model(),
        "instruction_set": machine.instruction_set(),
        "threads": loaded.threads,
        "repetitions": settings.repetitions,
        "start_seconds": spread(starts),
        "first_token_seconds": spread(found["seconds"] for found in first_tokens),
        "peak_memory": max_known(found["peak_memory"] for found in first_tokens),
        "bytes_per_token": bytes_per_token(loaded.file),
        "bandwidth_roof": spread(bandwidth.readings),
        "compute_roof": compute,
        **passes,
    }


def _passes(
    loaded: LLM,
    settings: Settings,
    bandwidth: Bandwidth,
    compute: float,
    say: Callable[[str], None],
) -> Report:
    """What is measured with the model in memory."""
    model, config = loaded.model, loaded.config
    speed: list[Report] = []
    compared: dict[str, list[Report]] = {}
    groups, notes = fitting(cases(settings), loaded.context_length)
    for group in groups:
        say(f"{group[0].name} at {group[0].depth}")
        samples = measure.measure(model, group, settings.repetitions, bandwidth)
        entries = []
        for case, found in zip(group, samples, strict=True):
            needed = case_cost(loaded.file, config, loaded.kv_type, case, model.chunk)
            entries.append(entry(case, needed, found, compute))
        if len(group) == 1:
            speed += entries
        else:
            for one, found in zip(entries, samples, strict=True):
                one |= ratios(one, found, entries[0], samples[0])
            compared[group[0].name] = entries
    say("overhead")
    generation = next(case for group in groups for case in group if case.name.startswith("tg"))
    return {
        "speed": speed,
        **compared,
        "step": measure.overhead(model, generation),
        "notes": notes,
    }


def fitting(
    groups: Iterable[Sequence[Case]], context_length: int
) -> tuple[list[list[Case]], list[str]]:
    """The groups cut to a context, none twice, and what was cut."""
    found: list[list[Case]] = []
    notes = []
    for group in groups:
        cut = [case.fit(context_length) for case in group]
        for case, less in zip(group, cut, strict=True):
            if less != case:
                notes.append(
                    f"{case.name} at {case.depth} is {less.name} at {less.depth}: "
                    f"the context is {context_length} positions"
                )
        if cut not in found:
            found.append(cut)
    return found, notes


def case_cost(file: GGUFFile, config: ModelConfig, kv_type: str, case: Case, chunk: int) -> Cost:
    """All its passes."""
    passes = case.passes(chunk)
    costs = (pass_cost(file, config, kv_type, [rows] * case.sequences) for rows in passes)
    return sum(costs, Cost())


def entry(case: Case, needed: Cost, samples: Sequence[Sample], compute: float) -> Report:
    """What a case took: `toks` is tok/s of all sequences together, `gbps` bytes x toks."""
    tokens = case.sequences * case.tokens * case.steps
    toks = spread(tokens / sample.seconds for sample in samples)
    gmacs = needed.macs / tokens * toks["median"] / 1e9
    roofs = (100 * needed.nbytes / s.seconds / 1e9 / s.bandwidth for s in samples)
    return {
        "name": case.name,
        "depth": case.depth,
        "sequences": case.sequences,
        "tokens": case.tokens,
        "steps": case.steps,
        "step_seconds": spread(sample.seconds / case.steps for sample in samples),
        "toks": toks,
        "bytes_per_token": needed.nbytes / tokens,
        "macs_per_token": needed.macs / tokens,
        "gbps": needed.nbytes / tokens * toks["median"] / 1e9,
        "bandwidth": median(sample.bandwidth for sample in samples),
        "bandwidth_percent": median(roofs),
        "gmacs": gmacs,
        "compute_percent": 100 * gmacs / compute,
    }


def ratios(
    one: Report, samples: Sequence[Sample], first: Report, first_samples: Sequence[Sample]
) -> Report:
    """Seconds of a step, and tok/s, over those of the first case of the group, round by round."""
    more = one["tokens"] * one["sequences"] / (first["tokens"] * first["sequences"])
    steps = one["steps"] / first["steps"]
    pairs = zip(samples, first_samples, strict=True)
    times = [a.seconds / b.seconds / steps for a, b in pairs]
    return {"step_ratio": spread(times), "toks_ratio": spread(more / ratio for ratio in times)}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    found = sorted(values)
    return {"median": median(found), "lowest": found[0], "highest": found[-1]}


def max_known(values: Iterable[int | None]) -> int | None:
    """The largest, or None where one is not known."""
    found = list(values)
    return None if None in found else max(value for value in found if value is not None)


# For people


def text(report: Report) -> Iterator[str]:
    """The report as a table."""
    size = machine.format_bytes(report["bytes_per_token"])
    peak = report["peak_memory"]
    memory = "unknown" if peak is None else machine.format_bytes(peak)
    facts = {
        "model": f"{report['model']}: {report['main_type']}, {size} of weights a token",
        "machine": f"{report['cpu']}, {report['instruction_set']}, {report['threads']} threads",
        "roofs": f"{_shown(report['bandwidth_roof'])} GB/s read from memory, "
        f"{report['compute_roof']:.0f} GMAC/s in {report['main_type']}",
        "start": f"{_shown(report['start_seconds'])} s for a command that writes one token",
        "first token": f"{_shown(report['first_token_seconds'])} s with loading; "
        f"peak memory {memory}",
    }
    for name, fact in facts.items():
        yield f"{name:<13}{fact}"
    yield ""
    roofs = f"{'GB/s':>7} {'of roof':>7}{'GMAC/s':>9} {'of roof':>7}"
    yield f"{'':<13}{'depth':>6}  {'tok/s':<25}{roofs}"
    for one in report["speed"]:
        yield f"{one['name']:<13}{one['depth']:>6}  {_shown(one['toks']):<25}{_roofs(one)}"
    for group, counted in (("rows", "tokens"), ("sequences", "sequences")):
        yield ""
        yield f"{group:<13}{'':>6}  {'ms a step':<25}{'times':>7}{'tok/s':>9}{'times':>7}"
        for one in report[group]:
            step, toks = (one[f"{of}_ratio"]["median"] for of in ("step", "toks"))
            yield (
                f"{'':<13}{one[counted]:>6}  {_shown(one['step_seconds'], 1000):<25}"
                f"{step:>7.2f}{_figure(one['toks']['median']):>9}{toks:>7.2f}"
            )
    yield ""
    step = report["step"]
    yield (
        f"{'step':<13}{1e3 * step['seconds']:.2f} ms, {1e6 * step['outside_kernels']:.0f} us of it "
        f"({step['outside_kernels_percent']:.1f} %) outside kernels"
    )
    for note in report["notes"]:
        yield f"{'note':<13}{note}"


def _shown(spread: dict[str, float], unit: float = 1) -> str:
    middle, low, high = (_figure(unit * spread[name]) for name in ("median", "lowest", "highest"))
    return f"{middle} ({low} to {high})"


def _figure(x: float) -> str:
    """Three digits or more: 3751, 375.1, 37.51, 0.375."""
    return f"{x:.{0 if x >= 1000 else 1 if x >= 100 else 2 if x >= 1 else 3}f}"


def _roofs(one: Report) -> str:
    return (
        f"{one['gbps']:>7.2f} {one['bandwidth_percent']:>6.0f}%"
        f"{one['gmacs']:>9.1f} {one['compute_percent']:>6.0f}%"
    )
