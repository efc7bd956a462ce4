"""A Mistral 7B shaped file of random weights: `pytest -m large` (4.1 GB of disk, 6 GB of memory,
about ten minutes); deselected otherwise."""

from pathlib import Path

import numpy as np
import pytest

from cpuinfer.config import ModelConfig
from cpuinfer.gguf import open_gguf
from cpuinfer.machine import resident_memory
from cpuinfer.models.llama import Llama, Span
from quant.ggml_types import GGMLType
from tools.random_model import write_random_model

pytestmark = pytest.mark.large

MIB = 1 << 20


def test_memory_is_file_and_cache_and_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "7b.gguf"
    write_random_model(path, "mistral-7b", GGMLType.Q4_0)
    file = open_gguf(path)
    config = ModelConfig.from_gguf(file)
    model = Llama(file, config, threads=2)
    cache = model.make_cache()
    limit = file.nbytes + cache.nbytes + 300 * MIB
    tokens = np.random.default_rng(0).integers(300, config.vocab_size, 5000).astype(np.int32)

    def read(start: int, end: int) -> int:
        for first in range(start, end, model.chunk):
            some = tokens[first : min(end, first + model.chunk)]
            logits = model.forward([Span(some, cache, 1)])
            assert np.isfinite(logits).all()
        return resident_memory()

    early = read(0, 100)
    late = read(100, 5000)
    assert cache.offset == 5000 > cache.capacity
    assert max(early, late) < limit, f"{max(early, late) / MIB:.0f} of {limit / MIB:.0f} MiB"
    assert abs(late - early) < 40 * MIB, f"{(late - early) / MIB:.0f} MiB more after 5,000 tokens"
