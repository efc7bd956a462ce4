"""Memory, planned before it is taken: weights, cache and scratch of a model file."""

from cpuinfer import machine
from cpuinfer.cache import cache_bytes
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile
from cpuinfer.models.llama import CHUNK, capacity


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
) -> int:
    """The context to use: the one asked for, or the trained one cut to what memory allows.

    Raises machine.NotEnoughMemory if it does not fit (or not even 512 positions do), ValueError
    for one longer than the model was trained for.
    """
    available = machine.memory_available()
    if context_length is not None:
        check_context(config, context_length)
        machine.check(memory_plan(file, config, kv_type, context_length, adapters), available)
        return context_length
    fitting = config.context_length
    while fitting > 512 and (
        memory_plan(file, config, kv_type, fitting, adapters).total > available
    ):
        fitting //= 2
    machine.check(memory_plan(file, config, kv_type, fitting, adapters), available)
    return fitting
