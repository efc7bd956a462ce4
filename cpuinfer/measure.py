"""Instruments: seconds of forward passes and of fresh processes, and the roofs above them.

The bandwidth of a machine drifts while others use it too, so it is read again before and after
every measurement.  What is to be compared is measured in turn.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpuinfer import llm, machine, ops
from cpuinfer.cache import KVCache
from cpuinfer.cost import Rows
from cpuinfer.gguf import GGUFFile, QTensor
from cpuinfer.kernels.jit import Kernel
from cpuinfer.models.llama import Llama, Span
from cpuinfer.team import computing
from cpuinfer.weights import pack
from quant.ggml_types import GGMLType

Report = dict[str, Any]

PROMPT = "Once upon a time"

_SMALL = 256 << 10  # bytes of a matrix that stays in any core's second cache
_MANY = 240  # tokens, a multiple of every tile


@dataclass(frozen=True)
class Case:
    """`steps` in which each of `sequences` adds `tokens` behind the positions it has: first
    `depth`, then more.  Each step wants the logits of its last `n_logits` tokens."""

    name: str
    depth: int = 0
    sequences: int = 1
    tokens: int = 1
    steps: int = 1
    n_logits: int = 1

    def passes(self, chunk: int) -> Iterator[Rows]:
        """What each sequence adds in each forward pass of at most `chunk` tokens."""
        for step in range(self.steps):
            for start in range(0, self.tokens, chunk):
                end = min(start + chunk, self.tokens)
                wanted = end - max(start, self.tokens - self.n_logits)
                yield Rows(self.depth + step * self.tokens + start, end - start, max(0, wanted))

    def fit(self, context_length: int) -> "Case":
        """As much of it as a context of this length holds."""
        tokens = min(self.tokens, context_length)
        steps = min(self.steps, context_length // tokens)
        return replace(
            self,
            name=self.name.replace(str(self.tokens * self.steps), str(tokens * steps)),
            depth=min(self.depth, context_length - tokens * steps),
            tokens=tokens,
            steps=steps,
            n_logits=min(self.n_logits, tokens),
        )


@dataclass(frozen=True)
class Sample:
    """One measurement, and the GB/s that the memory gave just before and after it."""

    seconds: float
    bandwidth: float


class Bandwidth:
    """GB/s read by `threads` threads, read again after each measurement."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.readings = [machine.read_bandwidth(threads)]

    def beside(self, seconds: float) -> Sample:
        """What took `seconds` since the last reading, with the mean of that one and a new one."""
        self.readings.append(machine.read_bandwidth(self.threads))
        return Sample(seconds, sum(self.readings[-2:]) / 2)


def measure(
    model: Llama, group: Sequence[Case], repetitions: int, bandwidth: Bandwidth
) -> list[list[Sample]]:
    """The samples of each case; the cases of a group take turns."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, model.chunk, np.int32)
    caches = [[_cache(model, case) for _ in range(case.sequences)] for case in group]
    samples: list[list[Sample]] = [[] for _ in group]
    for _ in range(repetitions):
        for case, its, found in zip(group, caches, samples, strict=True):
            tokens = min(case.tokens, 16)
            short = replace(case, tokens=tokens, steps=1, n_logits=min(case.n_logits, tokens))
            _seconds(model, short, its, ids)  # pages and caches are as they are in a long run
            found.append(bandwidth.beside(_seconds(model, case, its, ids)))
    return samples


def _seconds(model: Llama, case: Case, caches: list[KVCache], ids: np.ndarray) -> float:
    for cache in caches:
        cache.offset = case.depth
    start = time.perf_counter()
    for rows in case.passes(model.chunk):
        model.forward([Span(ids[: rows.tokens], cache, rows.n_logits) for cache in caches])
    return time.perf_counter() - start


def _cache(model: Llama, case: Case) -> KVCache:
    """A cache with room for the case and random keys and values up to its depth."""
    c = model.config
    capacity = min(model.capacity, case.depth + case.tokens * case.steps)
    cache = KVCache(c.n_layers, c.n_kv_heads, c.head_dim, capacity, model.kv_type)
    cache.take_memory()
    shape = (model.chunk, c.n_kv_heads, c.head_dim)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    with computing(model.threads):
        for start in range(max(0, case.depth - capacity), case.depth, min(model.chunk, capacity)):
            cache.offset = start
            some = x[: min(capacity, case.depth - start)]
            for layer in range(c.n_layers):
                # Under a window of 1 attention is little more than writing keys and values.
                ops.attend(some, some, some, cache, layer, 1)
    return cache


@contextmanager
def kernel_clock() -> Iterator[dict[str, float]]:
    """Seconds inside each kernel called meanwhile, by name."""
    spent: dict[str, float] = {}
    call = Kernel.__call__

    def timed(self: Kernel, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(self, *arguments)
        spent[self.name] = spent.get(self.name, 0.0) + time.perf_counter() - start
        return result

    Kernel.__call__ = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Kernel.__call__ = call  # type: ignore[method-assign]


def overhead(model: Llama, case: Case) -> Report:
    """Seconds of a step of `case`, and those of them outside kernels."""
    caches = [_cache(model, case)]
    ids = np.zeros(model.chunk, np.int32)
    _seconds(model, replace(case, steps=1), caches, ids)
    with kernel_clock() as spent:
        seconds = _seconds(model, case, caches, ids)
    outside = seconds - sum(spent.values())
    return {
        "seconds": seconds / case.steps,
        "outside_kernels": outside / case.steps,
        "outside_kernels_percent": 100 * outside / seconds,
    }


def compute_roof(tensor: QTensor, threads: int) -> float:
    """GMAC/s of a matrix's kernel with many tokens and as many of its rows as stay in cache."""
    rows, cols = tensor.shape
    rows = min(rows, max(16, _SMALL * threads // tensor.qtype.row_bytes(cols) // 16 * 16))
    weight = pack(QTensor(tensor.name, tensor.qtype, (rows, cols), tensor.data[:rows]))
    x = np.random.default_rng(0).standard_normal((_MANY, cols), np.float32)
    fastest = float("inf")
    with computing(threads), kernel_clock() as spent:
        ops.linear(x, weight)  # compiles the kernel if need be
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            spent.clear()
            ops.linear(x, weight)
            products = (s for name, s in spent.items() if name.startswith("matmul"))
            fastest = min(fastest, sum(products))
    return _MANY * rows * cols / fastest / 1e9


def main_matrix(file: GGUFFile) -> QTensor:
    """The largest matrix of the type that most of the weights have."""
    nbytes: dict[GGMLType, int] = {}
    matrices = [t for n, t in file.tensors.items() if len(t.shape) == 2 and n.startswith("blk.")]
    for tensor in matrices:
        nbytes[tensor.qtype] = nbytes.get(tensor.qtype, 0) + tensor.data.nbytes
    main = max(nbytes, key=lambda qtype: nbytes[qtype])
    return max((t for t in matrices if t.qtype is main), key=lambda t: t.data.nbytes)


# Fresh processes


def first_token(model: str, loading: dict[str, Any]) -> Report:
    """Seconds from a file to the first token, in this process, and the memory it has taken."""
    start = time.perf_counter()
    with llm.LLM(model, **loading) as loaded:
        loaded.generate(PROMPT, max_tokens=1, temperature=0)
        return {"seconds": time.perf_counter() - start, "peak_memory": machine.peak_memory()}


def first_token_in_child(model: str, loading: dict[str, Any]) -> Report:
    """`first_token` in a fresh process, with its imports done before the clock starts."""
    script = "import json, sys; from cpuinfer import measure; "
    script += "print(json.dumps(measure.first_token(*json.loads(sys.argv[1]))))"
    report: Report = json.loads(child("-c", script, json.dumps([model, loading])))
    return report


def start(model: str, loading: dict[str, Any]) -> float:
    """Seconds of the whole command that writes one token."""
    options = [_option(name.replace("_", "-"), value) for name, value in loading.items()]
    start = time.perf_counter()
    child("-m", "cpuinfer", "generate", model, "-p", PROMPT, "-n", "1", *options)
    return time.perf_counter() - start


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


def child(*arguments: str) -> bytes:
    """What a Python process with these arguments prints; it must succeed."""
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=pipe, check=True).stdout
