"""How much the columns of each matrix matter for a text: `cpuinfer imatrix`.

A column matters as much as the mean square of the activations that it meets. The model reads the
text in chunks, each from an empty cache, and what is written is llama.cpp's GGUF format: for each
matrix NAME the tensors NAME.in_sum2 (1, cols), sums of squares, and NAME.counts (1, 1), of how many
tokens. importance.py reads it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpuinfer.llm import LLM
from cpuinfer.models.llama import Span
from cpuinfer.perplexity import split
from cpuinfer.sampling import NumericsError
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf

Floats = npt.NDArray[np.float32]


class Sums:
    """Sums of squares of what the columns of each matrix met, over `tokens` tokens."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self._squares: dict[tuple[str, ...], npt.NDArray[np.float64]] = {}

    def observe(self, names: Sequence[str], x: Floats) -> None:
        """Add activations (T, cols) that meet matrices of these names."""
        squares = np.einsum("tc,tc->c", x, x, dtype=np.float64)
        self._squares[tuple(names)] = self._squares.get(tuple(names), 0.0) + squares
        for name in names:
            self.tokens[name] = self.tokens.get(name, 0) + len(x)

    def by_name(self) -> dict[str, Floats]:
        """The sums of each matrix (cols,), sorted by name; NumericsError where one is no number."""
        found: dict[str, Floats] = {}
        for names, squares in self._squares.items():
            with np.errstate(over="ignore"):
                sums = squares.astype(np.float32)
            if not np.isfinite(sums).all():
                raise NumericsError(f"the activations that enter {names[0]} are no numbers")
            found |= dict.fromkeys(names, sums)
        return dict(sorted(found.items()))


def text_chunks(loaded: LLM, text: str) -> npt.NDArray[np.int32]:
    """A text's whole chunks (n, context length); perplexity.Unsuitable where there is none."""
    return split(loaded.tokenizer, text, loaded.context_length, least=1)


def collect(
    loaded: LLM,
    chunks: npt.NDArray[np.int32],
    with_output: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Sums:
    """The sums over all tokens of the chunks (n, length).

    The output matrix is left out unless `with_output`: llama.cpp quantizes it worse with an
    importance than without. `on_progress("text", tokens read, of how many)`. NumericsError.
    """
    sums, model = Sums(), loaded.model
    cache = model.make_cache()
    for number, chunk in enumerate(chunks):
        cache.reset()
        for start in range(0, len(chunk), model.chunk):
            on_progress("text", number * len(chunk) + start, chunks.size)
            tokens = chunk[start : start + model.chunk]
            n_logits = len(tokens) if with_output else 0
            model.forward([Span(tokens, cache, n_logits)], observe=sums.observe)
        sums.by_name()
    on_progress("text", chunks.size, chunks.size)
    return sums


def write(sums: Sums, path: Path, dataset: str, n_chunks: int, chunk_size: int) -> None:
    """Write the file, complete or not at all; `dataset` is what it calls the text."""
    tensors = []
    for name, squares in sums.by_name().items():
        count = np.full((1, 1), sums.tokens[name], np.float32)
        tensors += [
            (f"{name}.in_sum2", GGMLType.F32, squares[None]),
            (f"{name}.counts", GGMLType.F32, count),
        ]
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [dataset],
        "imatrix.chunk_count": n_chunks,
        "imatrix.chunk_size": chunk_size,
    }
    write_gguf(path, metadata, tensors)
