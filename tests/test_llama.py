"""models/llama.py against the reference: shapes, types, the ring, spans, what is refused."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import (
    SHARED,
    TINY,
    Tensors,
    dequantized,
    llama_metadata,
    llama_tensors,
    load_llama,
    run_python,
)
from numpy.typing import NDArray

from cpuinfer.cache import KVCache
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import ModelFormatError, open_gguf
from cpuinfer.models.llama import Cancelled, Llama, Span, capacity, check_tensors
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf

Floats = NDArray[np.float32]

WINDOW = 24
WINDOWED = replace(TINY, sliding_window=WINDOW)
#: Sizes that K blocks divide.
WIDE = replace(TINY, dim=256, hidden_dim=512, n_heads=8, head_dim=32, rope_dim=32)


def tokens(length: int, vocab_size: int = TINY.vocab_size, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab_size, length).tolist()
    return ids


def span(ids: Sequence[int], cache: KVCache) -> Span:
    return Span(np.array(ids, np.int32), cache, len(ids))


def empty_cache(model: Llama, chunk: int) -> KVCache:
    """The smallest cache for passes of up to `chunk` tokens."""
    c = model.config
    slots = capacity(c, chunk, model.context_length)
    return KVCache(c.n_layers, c.n_kv_heads, c.head_dim, slots, model.kv_type)


def logits(model: Llama, ids: Sequence[int], chunk: int) -> Floats:
    """Every row (T, V), `chunk` tokens a pass."""
    cache = empty_cache(model, chunk)
    parts = [
        model.forward([span(ids[start : start + chunk], cache)])
        for start in range(0, len(ids), chunk)
    ]
    return np.concatenate(parts)


def assert_close(got: Floats, want: NDArray[np.float64]) -> None:
    """Within single precision: 1e-5 of the largest logit."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def expected(config: ModelConfig, tensors: Tensors, ids: list[int]) -> NDArray[np.float64]:
    weights = {name: dequantized(packed, qtype) for name, qtype, packed in tensors}
    return reference.logits(config, weights, ids)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    path = tmp_path_factory.mktemp("windowed") / "model.gguf"
    return load_llama(path, WINDOWED, llama_tensors(WINDOWED))


# --- against the reference ---

SHAPES = {
    "plain": TINY,
    "one kv head": replace(TINY, n_kv_heads=1),
    "as many kv heads as heads": replace(TINY, n_kv_heads=4),
    "groups of 3": replace(TINY, n_heads=6),
    "heads wider than dim / n_heads": replace(TINY, head_dim=24, rope_dim=24),
    "heads narrower": replace(TINY, head_dim=10, rope_dim=10),
    "RoPE on a part of a head": replace(TINY, rope_dim=6),
    "no multiples of 16": replace(
        TINY,
        dim=43,
        hidden_dim=61,
        vocab_size=37,
        n_heads=3,
        n_kv_heads=3,
        head_dim=14,
        rope_dim=14,
    ),
    "another theta and epsilon": replace(TINY, rope_theta=1e6, norm_eps=0.5),
    "a window": WINDOWED,
    "a window of 1": replace(TINY, sliding_window=1),
    "one layer": replace(TINY, n_layers=1),
}


@pytest.mark.parametrize("output", [None, GGMLType.F32], ids=["tied", "separate"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_reference(
    shape: str, output: GGMLType | None, tmp_path: Path
) -> None:
    config = SHAPES[shape]
    tensors = llama_tensors(config, output=output)
    model = load_llama(tmp_path / "model.gguf", config, tensors)
    ids = tokens(70, config.vocab_size)
    want = expected(model.config, tensors, ids)
    assert_close(logits(model, ids, 33), want)


def test_rope_frequencies_of_the_file(tmp_path: Path) -> None:
    factors = np.array([1, 1.5, 2, 3, 4, 8, 8, 8], np.float32)
    tensors = [
        *llama_tensors(TINY),
        ("rope_freqs.weight", GGMLType.F32, factors.view(np.uint8)),
    ]
    model = load_llama(tmp_path / "model.gguf", TINY, tensors)
    want = expected(model.config, tensors, tokens(70))
    assert_close(logits(model, tokens(70), 70), want)


def test_linear_scaling_of_positions(tmp_path: Path) -> None:
    tensors, path = llama_tensors(TINY), tmp_path / "model.gguf"
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(path, llama_metadata(TINY) | scaling, tensors)
    config = ModelConfig.from_gguf(open_gguf(path))
    assert config.rope_scale == 4
    want = expected(config, tensors, tokens(70))
    got = logits(Llama(open_gguf(path), config, "f32"), tokens(70), 70)
    assert_close(got, want)


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("qtype", GGMLType, ids=lambda t: t.name)
def test_every_type_of_weights(qtype: GGMLType, kv_type: str, tmp_path: Path) -> None:
    """Activations of 8 bits cost up to 6 hundredths of the largest logit here, an f16 cache up to
    5 thousandths."""
    tensors = llama_tensors(WIDE, qtype, qtype)
    model = load_llama(tmp_path / "model.gguf", WIDE, tensors, kv_type)
    want = expected(model.config, tensors, tokens(40))
    error = np.abs(logits(model, tokens(40), 40) - want).max() / np.abs(want).max()
    eight_bits = qtype.block_size > 1 and qtype is not GGMLType.Q2_K
    assert error < (0.06 if eight_bits else 5e-3 if kv_type == "f16" else 1e-5)


def test_a_cache_of_8_bits(tmp_path: Path) -> None:
    """It costs some 40 times what half precision does: its numbers have 3 to 4 bits less."""
    tensors = llama_tensors(WIDE)
    model = load_llama(tmp_path / "model.gguf", WIDE, tensors, "q8_0")
    want = expected(model.config, tensors, tokens(40))
    error = np.abs(logits(model, tokens(40), 40) - want).max() / np.abs(want).max()
    assert 1e-3 < error < 0.04


# --- the ring, chunks, spans ---


def test_four_windows_of_tokens_in_the_same_memory(windowed: Llama) -> None:
    ids = tokens(4 * WINDOW + 3)
    weights = llama_tensors(WINDOWED)
    cache = empty_cache(windowed, 7)
    keys, nbytes, rows = cache.keys, cache.nbytes, []
    for start in range(0, len(ids), 7):
        rows.append(windowed.forward([span(ids[start : start + 7], cache)]))
        assert cache.keys is keys
        assert cache.nbytes == nbytes
    assert cache.capacity == WINDOW + 7 - 1
    want = expected(windowed.config, weights, ids)
    assert_close(np.concatenate(rows), want)
    without = expected(replace(windowed.config, sliding_window=None), weights, ids)
    assert np.abs(without - want)[:WINDOW].max() == 0
    assert np.abs(without - want)[WINDOW:].max() > 0.1  # the window matters here


@pytest.mark.parametrize("qtype", [GGMLType.F32, GGMLType.Q4_0], ids=lambda t: t.name)
@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_and_threads_change_no_bit(
    qtype: GGMLType, kv_type: str, threads: int, tmp_path: Path
) -> None:
    tensors = llama_tensors(WINDOWED, qtype, qtype)
    model = load_llama(tmp_path / "model.gguf", WINDOWED, tensors, kv_type)
    ids = tokens(4 * WINDOW)
    want = logits(model, ids, len(ids))
    model = load_llama(tmp_path / "again.gguf", WINDOWED, tensors, kv_type, threads)
    for chunk in (1, 7, WINDOW - 1, WINDOW, WINDOW + 1):
        np.testing.assert_array_equal(logits(model, ids, chunk), want)


def test_angles_are_exact_far_into_a_text(tmp_path: Path) -> None:
    """RoPE knows distances alone: what lies within reach gives the same logits anywhere."""
    config = replace(TINY, sliding_window=8)
    model = load_llama(tmp_path / "model.gguf", config, llama_tensors(config))
    near, far = empty_cache(model, 40), empty_cache(model, 40)
    far.offset = 1_000_003
    want = model.forward([span(tokens(40), near)])
    got = model.forward([span(tokens(40), far)])
    reach = config.n_layers * 8  # of which earlier ones are not there
    assert np.abs(got - want)[0].max() > 0.01
    assert_close(got[reach:], want[reach:].astype(np.float64))


def test_decoding_gives_the_row_that_prefill_gives(windowed: Llama) -> None:
    ids = tokens(50)
    whole = logits(windowed, ids, 50)
    cache = empty_cache(windowed, 49)
    windowed.forward([Span(np.array(ids[:-1], np.int32), cache, 0)])
    np.testing.assert_array_equal(windowed.forward([span(ids[-1:], cache)]), whole[-1:])


@pytest.mark.parametrize("qtype", [GGMLType.F32, GGMLType.Q4_0], ids=lambda t: t.name)
def test_spans_do_not_see_each_other(qtype: GGMLType, tmp_path: Path) -> None:
    """Sequences of other lengths and offsets in one pass: a long prompt beside single tokens."""
    tensors = llama_tensors(WINDOWED, qtype, qtype)
    model = load_llama(tmp_path / "model.gguf", WINDOWED, tensors)
    texts = [tokens(length, seed=length) for length in (60, 31, 30, 1, 9)]
    known = [40, 30, 0, 0, 8]
    wanted = [1, 1, 3, 1, 0]
    spans = []
    for ids, start, rows in zip(texts, known, wanted, strict=True):
        cache = empty_cache(model, 40)
        if start:
            model.forward([span(ids[:start], cache)])
        spans.append(Span(np.array(ids[start:], np.int32), cache, rows))
    got = model.forward(spans)
    alone = [
        logits(model, ids, 40)[len(ids) - rows :] for ids, rows in zip(texts, wanted, strict=True)
    ]
    np.testing.assert_array_equal(got, np.concatenate(alone))
    assert [s.cache.offset for s in spans] == [60, 31, 30, 1, 9]


def test_one_cache_for_two_spans_is_refused(windowed: Llama) -> None:
    cache = windowed.make_cache()
    with pytest.raises(ValueError, match="same cache"):
        windowed.forward([span([1, 2], cache), span([3], cache)])
    assert cache.offset == 0


def test_logits_only_where_asked_for(windowed: Llama) -> None:
    ids = np.array(tokens(9), np.int32)
    whole = windowed.forward([Span(ids, windowed.make_cache(), 9)])
    assert whole.dtype == np.float32
    assert whole.shape == (9, TINY.vocab_size)
    for rows in (0, 1, 4):
        got = windowed.forward([Span(ids, windowed.make_cache(), rows)])
        assert got.shape == (rows, TINY.vocab_size)
        np.testing.assert_array_equal(got, whole[9 - rows :])


@pytest.mark.parametrize("rows", [-1, 4])
def test_no_more_logits_than_tokens(windowed: Llama, rows: int) -> None:
    cache = windowed.make_cache()
    with pytest.raises(ValueError, match="logits"):
        windowed.forward([Span(np.array([1, 2, 3], np.int32), cache, rows)])
    assert cache.offset == 0


def test_a_context_is_filled_to_its_last_position(tmp_path: Path) -> None:
    model = load_llama(tmp_path / "model.gguf", TINY, llama_tensors(TINY))
    length = TINY.context_length
    ids = tokens(length + 1)
    whole = logits(model, ids[:length], length)
    cache = model.make_cache()
    assert cache.capacity == length
    model.forward([span(ids[: length - 1], cache)])
    np.testing.assert_array_equal(
        model.forward([span(ids[length - 1 : length], cache)])[0], whole[-1]
    )
    with pytest.raises(ValueError, match=f"1 tokens at {length} overrun a cache of {length}"):
        model.forward([span(ids[length:], cache)])
    assert cache.offset == length


@pytest.mark.parametrize("chunk", [1, 8])
def test_a_pass_takes_a_chunk_and_not_more(chunk: int, tmp_path: Path) -> None:
    model = load_llama(tmp_path / "model.gguf", WINDOWED, llama_tensors(WINDOWED), chunk=chunk)
    cache = model.make_cache()
    assert model.chunk == chunk
    assert cache.capacity == WINDOW + chunk - 1
    assert model.forward([span(tokens(chunk), cache)]).shape[0] == chunk
    for length in (0, chunk + 1):
        with pytest.raises(ValueError, match=f"1 to {chunk} tokens, got {length}"):
            model.forward([span(tokens(length), cache)])
    assert cache.offset == chunk


@pytest.mark.parametrize("token", [-1, TINY.vocab_size, 2**31 - 1])
def test_ids_that_are_none(windowed: Llama, token: int) -> None:
    cache = windowed.make_cache()
    with pytest.raises(ValueError, match=f"token ids are 0 to {TINY.vocab_size - 1}"):
        windowed.forward([span([3, token], cache)])
    assert cache.offset == 0


class SetAfter(threading.Event):
    """An event that is set when it is looked at for the n-th time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("layer", [1, 2])
def test_a_cancelled_pass_leaves_no_trace(windowed: Llama, layer: int) -> None:
    """Even where its keys went around the ring."""
    ids = tokens(90)
    want = logits(windowed, ids, 9)
    cache = empty_cache(windowed, 9)
    for start in range(0, 81, 9):
        windowed.forward([span(ids[start : start + 9], cache)])
    for _ in range(2):
        with pytest.raises(Cancelled):
            windowed.forward([span(tokens(9, seed=5), cache)], SetAfter(layer))
        assert cache.offset == 81
    unset = threading.Event()
    got = windowed.forward([span(ids[81:85], cache)], unset)
    np.testing.assert_array_equal(got, want[81:85])
    np.testing.assert_array_equal(windowed.forward([span(ids[85:], cache)]), want[85:])


# --- files ---


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: [t for t in tensors if t[0] != name]


def changed(
    name: str, qtype: GGMLType, values: NDArray[np.float32]
) -> Callable[[Tensors], Tensors]:
    packed = values.astype(np.float16 if qtype is GGMLType.F16 else np.float32).view(np.uint8)
    return lambda tensors: [(n, qtype, packed) if n == name else (n, t, p) for n, t, p in tensors]


FAULTS = {
    "no embedding": (without("token_embd.weight"), "token_embd.weight", "missing"),
    "no norm": (without("blk.1.ffn_norm.weight"), "blk.1.ffn_norm.weight", "missing"),
    "no matrix": (without("blk.0.attn_k.weight"), "blk.0.attn_k.weight", "missing"),
    "no last norm": (without("output_norm.weight"), "output_norm.weight", "missing"),
    "transposed": (
        changed("blk.1.ffn_down.weight", GGMLType.F32, np.zeros((96, 64), np.float32)),
        "blk.1.ffn_down.weight",
        r"shape \(96, 64\), expected \(64, 96\)",
    ),
    "a matrix for a vector": (
        changed("output_norm.weight", GGMLType.F32, np.zeros((1, 64), np.float32)),
        "output_norm.weight",
        r"shape \(1, 64\), expected \(64,\)",
    ),
    "too many dimensions": (
        changed("blk.0.attn_q.weight", GGMLType.F32, np.zeros((1, 64, 64), np.float32)),
        "blk.0.attn_q.weight",
        r"shape \(1, 64, 64\), expected \(64, 64\)",
    ),
    "a norm in half precision": (
        changed("blk.0.attn_norm.weight", GGMLType.F16, np.ones(64, np.float32)),
        "blk.0.attn_norm.weight",
        "type F16, expected F32",
    ),
    "output rows": (
        lambda tensors: [
            *tensors,
            ("output.weight", GGMLType.F32, np.zeros((49, 256), np.uint8)),
        ],
        "output.weight",
        r"shape \(49, 64\), expected \(50, 64\)",
    ),
    "too few rope frequencies": (
        lambda tensors: [*tensors, ("rope_freqs.weight", GGMLType.F32, np.zeros(28, np.uint8))],
        "rope_freqs.weight",
        r"shape \(7,\), expected \(8,\)",
    ),
    "a bias": (
        lambda tensors: [
            *tensors,
            ("blk.1.attn_q.bias", GGMLType.F32, np.zeros(256, np.uint8)),
        ],
        "blk.1.attn_q.bias",
        "not supported yet",
    ),
    "a rope frequency of zero": (
        lambda tensors: [*tensors, ("rope_freqs.weight", GGMLType.F32, np.zeros(32, np.uint8))],
        "rope_freqs.weight",
        "finite numbers above 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    """H06 and H07 of the fault list."""
    change, name, reason = FAULTS[fault]
    with pytest.raises(ModelFormatError, match=rf"{name}.*{reason}"):
        load_llama(tmp_path / "model.gguf", TINY, change(llama_tensors(TINY)))


def test_embedding_rows_are_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    vocabulary = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(49)]}
    write_gguf(path, llama_metadata(TINY) | vocabulary, llama_tensors(TINY))
    with pytest.raises(ModelFormatError, match=r"49 in tokenizer.*50 in token_embd\.weight"):
        ModelConfig.from_gguf(open_gguf(path))


def test_a_tensor_too_many_is_named_and_ignored(tmp_path: Path) -> None:
    tensors, path = llama_tensors(TINY), tmp_path / "model.gguf"
    more: Tensors = [("blk.2.attn_q.weight", GGMLType.F32, np.zeros((4, 4), np.uint8))]
    want = logits(load_llama(path, TINY, tensors), tokens(5), 5)
    model = load_llama(path, TINY, tensors + more)
    np.testing.assert_array_equal(logits(model, tokens(5), 5), want)
    assert check_tensors(open_gguf(path), model.config) == ["blk.2.attn_q.weight"]


@pytest.mark.parametrize("qtype", [GGMLType.F32, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q6_K])
def test_a_model_of_zeros_runs(qtype: GGMLType, tmp_path: Path) -> None:
    """H16 of the fault list."""
    tensors = [(name, t, np.zeros_like(p)) for name, t, p in llama_tensors(WIDE, qtype, qtype)]
    model = load_llama(tmp_path / "model.gguf", WIDE, tensors)
    np.testing.assert_array_equal(logits(model, tokens(5), 5), np.zeros((5, WIDE.vocab_size)))


def test_bytes_packed_are_reported(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path, tensors = tmp_path / "model.gguf", llama_tensors(TINY, output=GGMLType.F32)
    load_llama(path, TINY, tensors)
    Llama(open_gguf(path), TINY, progress=lambda done, total: seen.append((done, total)))
    total = sum(packed.size for _, _, packed in tensors)
    assert {t for _, t in seen} == {total}
    assert sorted(seen) == seen
    assert 0.8 * total < seen[-1][0] <= total


# --- checkpoints whose logits were computed by transformers ---


@functools.cache
def hf(name: str) -> Path:
    for source in (Path(__file__).parent / "data" / "hf" / name, SHARED / "hf" / name):
        if source.is_dir():
            return source
    return pytest.skip(f"no checkpoint {name}")


@pytest.mark.parametrize("qtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", ["mistral-window", "mistral-full"])
def test_mistral_has_the_logits_of_transformers(name: str, qtype: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert = Path(__file__).resolve().parents[1] / "tools" / "convert.py"
    command = [sys.executable, convert, hf(name), path, "--type", qtype]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(hf(name) / "reference.npz") as arrays:
        want = dict(arrays)
    ids = want["ids"].tolist()
    file = open_gguf(path)
    config = ModelConfig.from_gguf(file)
    assert config.sliding_window == (WINDOW if name == "mistral-window" else None)
    for kv_type, bound in (("f32", 2e-4), ("f16", 1e-2)):
        model = Llama(file, config, kv_type, chunk=len(ids))
        whole = logits(model, ids, len(ids))
        np.testing.assert_allclose(whole[:, want["columns"]], want["logits"], rtol=0, atol=bound)
        np.testing.assert_array_equal(whole.argmax(axis=1), want["argmax"])
        for chunk in (1, 7, WINDOW - 1, WINDOW, WINDOW + 1):
            np.testing.assert_array_equal(logits(model, ids, chunk), whole)


# --- threads and processes ---

TWO_THREADS = """
import sys, threading
from pathlib import Path
from conftest import *
from test_llama import *

path, n_models = Path(sys.argv[1]), int(sys.argv[2])
file = open_gguf(path)
models = [Llama(file, ModelConfig.from_gguf(file), threads=2) for _ in range(n_models)]
results = {}

def work(i):
    results[i] = [logits(models[i % n_models], tokens(40, seed=i), 8) for _ in range(6)]

threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for i in range(2):
    want = logits(models[0], tokens(40, seed=i), 40)
    assert len(results[i]) == 6
    for got in results[i]:
        np.testing.assert_array_equal(got, want)
"""

FORK = """
import os, sys, time
from pathlib import Path
from conftest import *
from test_llama import *

file = open_gguf(Path(sys.argv[1]))
model = Llama(file, ModelConfig.from_gguf(file), threads=2)
want = logits(model, tokens(9), 9)
child = os.fork()
if child == 0:
    start = time.monotonic()
    try:
        logits(model, tokens(9), 9)
    except RuntimeError as error:
        os._exit(0 if "fork" in str(error) and time.monotonic() - start < 1 else 3)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
np.testing.assert_array_equal(logits(model, tokens(9), 9), want)
"""


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model.gguf"
    write_gguf(path, llama_metadata(WINDOWED), llama_tensors(WINDOWED, GGMLType.Q4_0))
    return path


@pytest.mark.parametrize("n_models", [1, 2])
def test_two_threads_may_call_at_once(n_models: int, small_file: Path) -> None:
    """R11 of the fault list: passes take turns at the one set of threads."""
    run_python(TWO_THREADS, small_file, n_models)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_told_instead_of_hanging(small_file: Path) -> None:
    """R12 of the fault list."""
    run_python(FORK, small_file)
