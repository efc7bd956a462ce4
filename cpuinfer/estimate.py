"""How fast a model will generate here, before it is loaded: its bytes against the bandwidth.

Nothing is said of how fast a prompt is read: that is a matter of the cores, and takes the model to
be measured (`cpuinfer bench`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cpuinfer import bandwidth, machine
from cpuinfer.config import ModelConfig
from cpuinfer.cost import Rows, bytes_per_token, pass_cost
from cpuinfer.gguf import GGUFFile, open_gguf
from cpuinfer.plan import fitting_context, memory_plan
from cpuinfer.team import most_threads
from cpuinfer.weights import has_kernel

#: The part of the bandwidth that generation reaches: `cpuinfer bench` finds 80 to 97 % on machines
#: whose memory is the limit.
EFFICIENCY = 0.9

#: Bytes a token from which on the memory is the limit. A smaller model is held by the caches of
#: the CPU in part, and what a step costs beside the reading counts.
FROM_MEMORY = 256 << 20

#: Bytes of a file whose loading takes long enough to say before it what will come of it.
LARGE = 1_000_000_000


@dataclass(frozen=True)
class Speed:
    """Tokens a second, expected at the beginning of a text and with `positions`, the most that are
    seen, in the cache, when `threads` threads read `bandwidth` GB/s."""

    tokens_per_second: float
    tokens_per_second_full: float
    positions: int
    bandwidth: float
    threads: int

    def __str__(self) -> str:
        start, full = _rate(self.tokens_per_second), _rate(self.tokens_per_second_full)
        return f"about {start} tok/s, {full} with {self.positions} positions in the cache"


def tokens_per_second(nbytes: int, gbs: float) -> float:
    """Passes that read `nbytes` each, in a second."""
    return EFFICIENCY * gbs * 1e9 / nbytes


def speed(
    file: GGUFFile, config: ModelConfig, kv_type: str, context_length: int, threads: int
) -> Speed | None:
    """What to expect with this cache; None where the memory is not the limit: of a small model,
    of types without a kernel, without vector instructions."""
    matrices = (tensor for tensor in file.tensors.values() if len(tensor.shape) == 2)
    if (
        bytes_per_token(file) < FROM_MEMORY
        or machine.instruction_set() == "plain"
        or not all(has_kernel(tensor.qtype) for tensor in matrices)
    ):
        return None
    gbs = bandwidth.known(threads)
    positions = min(config.sliding_window or context_length, context_length)
    start, full = (
        pass_cost(file, config, kv_type, [Rows(offset, 1, 1)]).nbytes
        for offset in (0, positions - 1)
    )
    return Speed(
        tokens_per_second(start, gbs), tokens_per_second(full, gbs), positions, gbs, threads
    )


def before_loading(model: str, loading: Mapping[str, Any]) -> str | None:
    """Memory and speed in one line, None of a file that is loaded in no time.

    `loading` are parameters of LLM; the errors are those that LLM raises for them.
    """
    file = open_gguf(model)
    if file.nbytes < LARGE:
        return None
    config = ModelConfig.from_gguf(file, loading.get("sliding_window", "auto"))
    kv_type = loading.get("kv_type", "f16")
    asked = loading.get("context_length")
    force = loading.get("force", False)
    context_length = fitting_context(file, config, kv_type, asked, force=force)
    plan = memory_plan(file, config, kv_type, context_length)
    available = machine.memory_available()
    parts = (plan.weights, plan.cache, plan.scratch, available)
    weights, cache, scratch, free = map(machine.format_bytes, parts)
    memory = f"{weights} of weights, {cache} of cache, {scratch} to compute in, of {free} free"
    threads = min(loading.get("threads") or decode_threads(), most_threads())
    if plan.total > available or threads < 1:  # it swaps, or is refused
        return memory
    expected = speed(file, config, kv_type, context_length, threads)
    return memory if expected is None else f"{memory}; expect {expected}"


def decode_threads() -> int:
    """The threads that generate where no other number is asked for."""
    cores, _ = machine.threads()
    return machine.decode_threads(cores)[0]


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"
