"""Memory, planned before it is taken: weights, cache and scratch of a model file, and what would
fit where that is too much."""

from bisect import bisect_right
from dataclasses import dataclass

from cpuinfer import machine
from cpuinfer.cache import cache_bytes
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile
from cpuinfer.models.llama import CHUNK, capacity
from cpuinfer.weights import has_kernel
from quant.mixes import MIXES, Model, Wishes, target_types

#: Types that models are commonly had in, by their names in quant.mixes, the largest first.
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")

#: The fewest positions that are worth loading a model for.
_LEAST = 512
#: Contexts cut to the memory are multiples of this.
_STEP = 256
#: Positions that another type should leave room for, where none were asked for.
_USUAL = 4096


def memory_plan(
    file: GGUFFile, config: ModelConfig, kv_type: str, context_length: int, adapters: int = 0
) -> machine.MemoryPlan:
    """What the model will take with a cache of this context and `adapters` bytes of adapters."""
    positions = capacity(config, min(CHUNK, context_length), context_length)
    cache = cache_bytes(config.n_layers, config.n_kv_heads, config.head_dim, positions, kv_type)
    widest = max(config.hidden_dim, config.dim, config.n_heads * config.head_dim)
    scratch = 4 * 6 * CHUNK * widest + 4 * CHUNK * config.vocab_size + (150 << 20)
    return machine.MemoryPlan(file.nbytes + adapters, cache, scratch)


def check_context(config: ModelConfig, context_length: int) -> None:
    """ValueError for a context that is too short for a text, or longer than the trained one."""
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2, got {context_length}")
    if context_length > config.context_length:
        raise ValueError(
            f"context_length {context_length} is more than the {config.context_length} "
            "positions the model was trained for"
        )


def fitting_context(
    file: GGUFFile,
    config: ModelConfig,
    kv_type: str,
    context_length: int | None,
    adapters: int = 0,
    *,
    force: bool = False,
) -> int:
    """The context to use: the one asked for, or the trained one cut to what memory allows.

    Raises machine.NotEnoughMemory if it does not fit (or not even 512 positions do), ValueError
    for one longer than the model was trained for. With `force` nothing has to fit.
    """
    available = machine.memory_available()
    if context_length is not None:
        check_context(config, context_length)
        chosen = context_length
    else:
        chosen = largest_context(file, config, kv_type, available, adapters)
        chosen = chosen or min(_LEAST, config.context_length)
    plan = memory_plan(file, config, kv_type, chosen, adapters)
    if plan.total > available and not force:
        fitting = alternatives(file, config, kv_type, context_length, available, adapters)
        advice = f"{fitting.lines()[0]} (--force tries it all the same, and may swap)"
        raise machine.NotEnoughMemory(plan, available, advice)
    return chosen


def largest_context(
    file: GGUFFile, config: ModelConfig, kv_type: str, available: int, adapters: int = 0
) -> int:
    """The most positions, of those the model was trained for, that `available` bytes allow; 0
    where they are too few to be of use."""

    def total(context_length: int) -> int:
        return memory_plan(file, config, kv_type, context_length, adapters).total

    if total(config.context_length) <= available:
        return config.context_length
    shorter = range(_STEP, config.context_length, _STEP)
    found = _STEP * bisect_right(shorter, available, key=total)
    return found if found >= _LEAST else 0


def type_bytes(file: GGUFFile, config: ModelConfig) -> dict[str, int]:
    """Bytes of this model's file in each of TYPES, as `cpuinfer quantize` would make it."""
    tensors = file.tensors.values()
    present = {tensor.name: (tensor.shape, tensor.qtype) for tensor in tensors}
    model = Model(config.n_layers, config.group_size)
    header = file.nbytes - sum(tensor.data.nbytes for tensor in tensors)
    found = {}
    for name in TYPES:
        targets = target_types(present, MIXES[name], model, Wishes())
        rows = (len(t.data) * targets[t.name].row_bytes(t.shape[-1]) for t in tensors)
        found[name] = header + sum(rows)
    return found


@dataclass(frozen=True)
class Alternatives:
    """What fits: the longest contexts, with the cache as planned and with one of 8 bits (0: none),
    and the smaller types of the model with their bytes, for a context of `positions`."""

    context_length: int
    q8_0_context_length: int
    positions: int
    types: dict[str, int]

    def lines(self) -> list[str]:
        """What to choose, in one line or two."""
        found = []
        if self.context_length:
            found.append(f"a context of {self.context_length} positions fits")
            if self.q8_0_context_length > self.context_length:
                found[0] += f", with a q8_0 cache one of {self.q8_0_context_length}"
        elif self.q8_0_context_length:
            found.append(f"with a q8_0 cache a context of {self.q8_0_context_length} fits")
        if self.types:
            types = ", ".join(
                f"{name} ({machine.format_bytes(nbytes)}{_slow(name)})"
                for name, nbytes in self.types.items()
            )
            found.append(f"with {self.positions} positions it fits as {types}")
        return found or ["take a smaller model, or free some memory"]


def alternatives(
    file: GGUFFile,
    config: ModelConfig,
    kv_type: str,
    context_length: int | None,
    available: int,
    adapters: int = 0,
) -> Alternatives:
    """What fits into `available` bytes instead of the context asked for (None: the trained one),
    which does not."""
    wanted = context_length or config.context_length
    own = min(wanted, largest_context(file, config, kv_type, available, adapters))
    positions = wanted if context_length or own >= _USUAL else min(_USUAL, wanted)
    rest = memory_plan(file, config, kv_type, positions, adapters).total - file.nbytes
    return Alternatives(
        own,
        min(wanted, largest_context(file, config, "q8_0", available, adapters)),
        positions,
        {
            name: nbytes
            for name, nbytes in type_bytes(file, config).items()
            if rest + nbytes <= available
        },
    )


def _slow(mix: str) -> str:
    return "" if has_kernel(MIXES[mix].qtype) else ", slow"
