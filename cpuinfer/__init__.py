"""cpuinfer runs quantized language models (GGUF files) on a CPU.

import cpuinfer
llm = cpuinfer.LLM("mistral-7b-instruct-v0.2.Q4_0.gguf")
print(llm.generate("Once upon a time", max_tokens=64).text)
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["LLM", "Chunk", "Completion", "ModelFormatError", "SamplingParams"]

_ROOMS = {
    "LLM": "cpuinfer.llm",
    "Chunk": "cpuinfer.completion",
    "Completion": "cpuinfer.completion",
    "ModelFormatError": "cpuinfer.gguf",
    "SamplingParams": "cpuinfer.sampling",
}


def __getattr__(name: str) -> Any:
    """The public names are loaded when first used: numba alone takes a third of a second."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'cpuinfer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)
