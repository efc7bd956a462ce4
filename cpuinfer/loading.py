"""What happens to a model file before there is a model: adapters, kernels, what is odd about it."""

import os
from collections.abc import Callable, Sequence

from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile, escape
from cpuinfer.kernels.jit import Kernel
from cpuinfer.lora import Adapter, open_adapter
from cpuinfer.models.llama import check_tensors, expected_shapes
from quant.ggml_types import GGMLType

#: Called with a stage ("compile", "load", "prompt"), how much is done, and of how much.
Progress = Callable[[str, int, int], None]
#: A file, or a file and a scale.
Lora = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


def open_adapters(lora: Sequence[Lora], file: GGUFFile, config: ModelConfig) -> tuple[Adapter, ...]:
    """The adapters, checked against what the model uses of its file."""
    shapes = {name: s for name, s in expected_shapes(config).items() if name in file.tensors}
    architecture = file.text("general.architecture")
    given = ((each if isinstance(each, tuple) else (each, 1.0)) for each in lora)
    return tuple(open_adapter(path, scale, architecture, shapes) for path, scale in given)


def matrix_types(file: GGUFFile) -> set[GGMLType]:
    """The types of a file's matrices."""
    return {tensor.qtype for tensor in file.tensors.values() if len(tensor.shape) == 2}


def prepare_kernels(kernels: Sequence[Kernel], on_progress: Progress) -> int:
    """Make kernels ready; how many had to be compiled."""
    compiled = 0
    for done, kernel in enumerate(kernels):
        on_progress("compile", done, len(kernels))
        compiled += kernel.prepare()
    on_progress("compile", len(kernels), len(kernels))
    return compiled


def file_warnings(file: GGUFFile, config: ModelConfig) -> list[str]:
    """What is odd about a file without keeping it from running; ModelFormatError for what does."""
    unused = check_tensors(file, config)
    if not unused:
        return list(file.warnings)
    names = escape(", ".join(unused[:3])) + ", ..." * (len(unused) > 3)
    return [*file.warnings, f"{escape(file.path.name)}: {len(unused)} tensors not used: {names}"]
