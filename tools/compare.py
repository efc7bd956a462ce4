"""Time a model on this engine and on llama.cpp (llama-cpp-python) in turn, A B A B.

Both engines get the same token ids, as many threads, and all weights in memory; llama.cpp should
be built for this machine (CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python).  What is
printed is the median of the rounds and the ratio of the medians.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "active")  # best for both, if the machine is quiet

import cpuinfer
from cpuinfer import machine
from cpuinfer.models.llama import Span


class Engine(Protocol):
    """What is measured: seconds to read a prompt, and seconds for each further token."""

    name: str

    def prefill(self, ids: list[int]) -> float: ...

    def decode(self, ids: list[int]) -> float: ...


class Ours:
    """This engine, below sampling and text."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        self.name = f"cpuinfer {cpuinfer.__version__} ({machine.instruction_set()})"
        self.model = cpuinfer.LLM(path, context_length=context, threads=threads)._model
        self.cache = self.model.make_cache()

    def prefill(self, ids: list[int]) -> float:
        self.cache.reset()
        start = time.perf_counter()
        for first in range(0, len(ids), self.model.chunk):
            some = np.array(ids[first : first + self.model.chunk], np.int32)
            self.model.forward([Span(some, self.cache, int(first + len(some) == len(ids)))])
        return time.perf_counter() - start

    def decode(self, ids: list[int]) -> float:
        start = time.perf_counter()
        for token in ids:
            self.model.forward([Span(np.array([token], np.int32), self.cache, 1)])
        return time.perf_counter() - start


class Peer:
    """llama.cpp with its defaults: memory-mapped, weights repacked for this CPU."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import llama_cpp

        info = llama_cpp.llama_print_system_info().decode().strip()
        self.name = f"llama-cpp-python {llama_cpp.__version__} ({info})"
        self.model: Any = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def prefill(self, ids: list[int]) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - start

    def decode(self, ids: list[int]) -> float:
        start = time.perf_counter()
        for token in ids:
            self.model.eval([token])
        return time.perf_counter() - start


def measure(engines: list[Engine], prompt: list[int], new: list[int], rounds: int) -> list[Any]:
    """Tokens per second of each engine: {"name", "prefill": [...], "decode": [...]}."""
    results: list[Any] = [{"name": e.name, "prefill": [], "decode": []} for e in engines]
    for _ in range(rounds):
        for engine, result in zip(engines, results, strict=True):
            result["prefill"].append(len(prompt) / engine.prefill(prompt))
            result["decode"].append(len(new) / engine.decode(new))
    return results


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens read (default 512)")
    parser.add_argument("--new", type=int, default=32, help="tokens generated (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="of both engines (default 3)")
    parser.add_argument("--threads", type=int, default=machine.threads()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    context = options.prompt + options.new
    engines: list[Engine] = [
        kind(options.model, options.threads, context + 1) for kind in (Ours, Peer)
    ]
    ids = rng.integers(260, 2000, context).tolist()
    engines[0].prefill(ids[:16])  # kernels and pages are there before the clock starts
    engines[1].prefill(ids[:16])
    new = ids[options.prompt :]
    ours, peer = measure(engines, ids[: options.prompt], new, options.rounds)
    if options.json:
        print(json.dumps({"threads": options.threads, "ours": ours, "peer": peer}))
        return 0
    print(f"{machine.cpu_model()}, {options.threads} threads, median of {options.rounds}")
    print(f"A  {ours['name']}\nB  {peer['name']}")
    for what in ("prefill", "decode"):
        a, b = statistics.median(ours[what]), statistics.median(peer[what])
        print(f"{what:8} A {a:7.2f} tok/s   B {b:7.2f} tok/s   A/B {a / b:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
