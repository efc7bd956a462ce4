"""Time a model on this engine and on llama.cpp (llama-cpp-python) in turn, A B A B.

Both read the same random token ids, keep f16 keys and values, and see all of them (no sliding
window).  llama.cpp reads in batches of 512, with the threads and with or without flash attention
as is fastest for it in a short try.  Figures are medians of the rounds; a ratio is above 1 where
this engine (A) is better.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

import cpuinfer
from cpuinfer import machine, measure
from cpuinfer.config import ModelConfig
from cpuinfer.cost import Rows, pass_cost
from cpuinfer.gguf import ModelFormatError, open_gguf
from cpuinfer.models.llama import Span

BUILD = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python"
ROWS = (2, 4, 8)

_FIRST_TOKEN = """
import json, sys, time
import llama_cpp
from cpuinfer import machine
start = time.perf_counter()
model = llama_cpp.Llama(**json.loads(sys.argv[1]))
model.eval(model.tokenize(sys.argv[2].encode()))
model.sample(temp=0.0)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "peak_memory": machine.peak_memory()}))
"""


class Engine(Protocol):
    """A model and one sequence of tokens that it has read."""

    name: str

    def read(self, ids: Sequence[int]) -> None:
        """Append ids and compute the logits of the last one."""

    def rewind(self, offset: int) -> None:
        """Forget what was read from `offset` on."""

    def first_token(self) -> dict[str, Any]:
        """In a fresh process: seconds from the file to the first token, and peak memory."""


class Ours:
    """This engine, below sampling and text."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        self.name = (
            f"cpuinfer {cpuinfer.__version__}, {machine.instruction_set()}, {threads} threads"
        )
        self.path = path
        self.loading = {"context_length": context, "threads": threads, "sliding_window": "off"}
        self.model = cpuinfer.LLM(path, **self.loading).model
        self.cache = self.model.make_cache()

    def read(self, ids: Sequence[int]) -> None:
        for first in range(0, len(ids), self.model.chunk):
            some = np.array(ids[first : first + self.model.chunk], np.int32)
            self.model.forward([Span(some, self.cache, int(first + len(some) == len(ids)))])

    def rewind(self, offset: int) -> None:
        self.cache.rewind(offset)

    def first_token(self) -> dict[str, Any]:
        return measure.first_token_in_child(str(self.path), self.loading)


class Peer:
    """llama.cpp: the file memory-mapped, weights repacked for this CPU."""

    def __init__(self, path: Path, context: int, threads: list[int], ids: Sequence[int]) -> None:
        import llama_cpp

        self.options = {
            "model_path": str(path),
            "n_ctx": context,
            "n_batch": 512,
            "n_ubatch": 512,
            "n_threads": max(threads),
            "n_threads_batch": max(threads),
            "verbose": False,
        }
        tries: dict[bool, float] = {}
        for flash in (False, True):
            self.model: Any = llama_cpp.Llama(**self.options, flash_attn=flash)
            tries[flash] = sum(self._try(ids))
            if not flash:
                self.model.close()  # two would take twice the memory
        self.options["flash_attn"] = tries[True] < tries[False]
        if not self.options["flash_attn"]:
            self.model.close()
            self.model = llama_cpp.Llama(**self.options)
        seconds = {}
        for count in threads:
            llama_cpp.llama_set_n_threads(self.model.ctx, count, count)
            tries_of_two = zip(self._try(ids), self._try(ids), strict=True)
            seconds[count] = [min(pair) for pair in tries_of_two]
        for i, name in enumerate(("n_threads_batch", "n_threads")):
            by_count = {count: seconds[count][i] for count in threads}
            self.options[name] = min(by_count, key=by_count.__getitem__)
        counts = (self.options["n_threads"], self.options["n_threads_batch"])
        llama_cpp.llama_set_n_threads(self.model.ctx, *counts)
        info = llama_cpp.llama_print_system_info().decode().strip(" |\n")
        self.name = (
            f"llama-cpp-python {llama_cpp.__version__}, {counts[0]} threads "
            f"({counts[1]} for prompts), flash attention "
            f"{'on' if self.options['flash_attn'] else 'off'}; {info}"
        )

    def _try(self, ids: Sequence[int]) -> tuple[float, float]:
        """Seconds of a prompt and of some tokens behind it."""
        self.rewind(0)
        self.read(ids[:8])
        prompt = timed(self, ids[8:], len(ids))
        new = timed(self, ids[:8], 1)
        self.rewind(0)
        return prompt, new

    def read(self, ids: Sequence[int]) -> None:
        self.model.eval(ids)

    def rewind(self, offset: int) -> None:
        self.model.n_tokens = offset  # `eval` begins with removing what lies behind

    def first_token(self) -> dict[str, Any]:
        printed = measure.child("-c", _FIRST_TOKEN, json.dumps(self.options), measure.PROMPT)
        found: dict[str, Any] = json.loads(printed)
        return found


def timed(engine: Engine, ids: Sequence[int], each: int) -> float:
    """Seconds in which the engine reads ids, `each` in a step."""
    start = time.perf_counter()
    for first in range(0, len(ids), each):
        engine.read(ids[first : first + each])
    return time.perf_counter() - start


def fresh(engines: Sequence[Engine], rounds: int) -> list[dict[str, Any]]:
    """First tokens in fresh processes: seconds and memory of each engine."""
    found: list[list[dict[str, Any]]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, results in zip(engines, found, strict=True):
            results.append(engine.first_token())
    items = []
    for name, key in (("first token", "seconds"), ("peak memory", "peak_memory")):
        values = [[one[key] for one in results] for results in found]
        if None not in (value for one in values for value in one):
            items.append(item(name, None, values))
    return items


def running(
    engines: Sequence[Engine],
    ids: list[int],
    depth: int,
    new: int,
    rounds: int,
    bandwidth: measure.Bandwidth,
) -> list[dict[str, Any]]:
    """A prompt behind `depth` tokens, then `new` tokens one by one, then some rows in one step."""
    prompt = ids[depth:-new]
    steps = {f"prefill {len(prompt)}": (prompt, len(prompt)), "decode": (ids[-new:], 1)}
    steps |= {f"{n} rows in a step": (ids[-new:][: 4 * n], n) for n in ROWS}
    for engine in engines:
        engine.read(ids[:depth] or ids[:16])
    samples: dict[str, list[list[measure.Sample]]] = {name: [[] for _ in engines] for name in steps}
    for _ in range(rounds):
        for name, (some, each) in steps.items():
            for engine, results in zip(engines, samples[name], strict=True):
                engine.rewind(depth if each == len(prompt) else depth + len(prompt))
                results.append(bandwidth.beside(timed(engine, some, each)))
    items = []
    for name, (some, _) in steps.items():
        seconds = [[sample.seconds for sample in results] for results in samples[name]]
        bandwidths = [median(s.bandwidth for s in results) for results in samples[name]]
        items.append({**item(name, len(some), seconds), "bandwidth": bandwidths})
    return items


def item(name: str, tokens: int | None, values: list[list[float]]) -> dict[str, Any]:
    """Seconds or bytes of both engines; the ratio is above 1 where the first needs less."""
    a, b = (median(one) for one in values)
    found = {"name": name, "ours": values[0], "peer": values[1], "ratio": b / a}
    return found if tokens is None else {**found, "tokens": tokens}


def table(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [
        f"{report['model']} on {report['cpu']}, median of {report['rounds']}, at {report['depth']}",
        *(f"{letter}  {report[who]}" for letter, who in (("A", "ours"), ("B", "peer"))),
        "",
        f"{'':<18}{'A':>16}{'B':>16}{'A : B':>8}",
    ]
    for one in report["items"]:
        a, b = (median(one[who]) for who in ("ours", "peer"))
        if "tokens" in one:
            shown = [f"{one['tokens'] / seconds:.2f} tok/s" for seconds in (a, b)]
        elif one["name"] == "peak memory":
            shown = [machine.format_bytes(int(nbytes)) for nbytes in (a, b)]
        else:
            shown = [f"{seconds:.2f} s" for seconds in (a, b)]
        lines.append(f"{one['name']:<18}{shown[0]:>16}{shown[1]:>16}{one['ratio']:>8.2f}")
    shares = " and ".join(f"{share:.0f} %" for share in report["decode_bandwidth_percent"])
    low, high = min(report["bandwidth"]), max(report["bandwidth"])
    lines.append("")
    lines.append(
        f"decode reads at {shares} of the bandwidth beside it ({low:.1f} to {high:.1f} GB/s)"
    )
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", choices=["llama-cpp-python"], default="llama-cpp-python")
    parser.add_argument("--prompt", type=int, default=512, help="tokens read (default 512)")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded behind (default 32)")
    parser.add_argument("--depth", type=int, default=0, help="tokens read before (default 0)")
    parser.add_argument("--rounds", type=int, default=3, help="of both engines (default 3)")
    parser.add_argument("--threads", type=int, default=machine.threads()[0])
    parser.add_argument(
        "--peer-threads", type=int, help="threads of the peer (default: the fastest count for it)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    arguments = parser.parse_args(argv)
    for name, least in (("prompt", 64), ("new", 32), ("depth", 0), ("rounds", 1), ("threads", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return arguments


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one document."""
    file = open_gguf(arguments.model)
    config = ModelConfig.from_gguf(file, "off")
    context = arguments.depth + arguments.prompt + arguments.new
    ids = np.random.default_rng(0).integers(3, config.vocab_size, context).tolist()
    counts = range(1, machine.threads()[0] + 1)
    peer_threads = [arguments.peer_threads] if arguments.peer_threads else list(counts)
    ours = Ours(arguments.model, context, arguments.threads)
    peer = Peer(arguments.model, context, peer_threads, ids[:64])
    bandwidth = measure.Bandwidth(arguments.threads)
    items = running((ours, peer), ids, arguments.depth, arguments.new, arguments.rounds, bandwidth)
    items += fresh((ours, peer), arguments.rounds)
    first = arguments.depth + arguments.prompt
    costs = [pass_cost(file, config, "f16", [Rows(first + i, 1, 1)]) for i in range(arguments.new)]
    needed = sum(one.nbytes for one in costs) / 1e9
    decode = items[1]
    shares = [
        100 * needed / median(decode[who]) / beside
        for who, beside in zip(("ours", "peer"), decode["bandwidth"], strict=True)
    ]
    return {
        "model": arguments.model.name,
        "cpu": machine.cpu_model(),
        "depth": arguments.depth,
        "rounds": arguments.rounds,
        "ours": ours.name,
        "peer": peer.name,
        "items": items,
        "decode_bandwidth_percent": shares,
        "bandwidth": bandwidth.readings,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = parse(argv)
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print(f"compare: there is no llama-cpp-python: {BUILD}", file=sys.stderr)
        return 2
    try:
        report = compare(arguments)
    except (ModelFormatError, OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        codes = {ModelFormatError: 65, OSError: 66, ValueError: 2}
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    if arguments.json:
        print(json.dumps(report))
    else:
        print("\n".join(table(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
