"""cache.py: the ring's arithmetic, its size, what a reset forgets."""

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY
from numpy.typing import NDArray

from cpuinfer import ops
from cpuinfer.cache import KVCache, cache_bytes, padded
from cpuinfer.models.llama import capacity


def rows(first: int, count: int, head_dim: int = 16) -> NDArray[np.float32]:
    """(count, 2, head_dim): every number is its position, in the second head negative."""
    positions = np.arange(first, first + count, dtype=np.float32)
    return np.stack([positions, -positions], axis=1)[:, :, None].repeat(head_dim, axis=2)


def write(cache: KVCache, count: int, layer: int = 0, window: int = 5) -> None:
    """Positions offset, offset + 1, ... as keys, and as values with 1000 added."""
    new = rows(cache.offset, count)
    ops.attend(np.zeros_like(new), new, new + 1000, cache, layer, window)


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_position_p_lies_in_slot_p_modulo_capacity(kv_type: str) -> None:
    cache = KVCache(2, 2, 16, 8, kv_type)
    number = np.float16 if kv_type == "f16" else np.float32
    for count in (1, 3, 4, 2, 4, 4, 1, 4):
        write(cache, count, layer=1)
        cache.advance(count)
    kept = range(cache.offset - 8, cache.offset)
    for position in kept:
        key = cache.keys[1, :, position % 8].view(number)
        value = cache.values[1, :, position % 8].view(number)
        np.testing.assert_array_equal(key, rows(position, 1)[0])
        np.testing.assert_array_equal(value, rows(position, 1)[0] + 1000)
    assert not cache.keys[0].any()


def test_the_offset_moves_by_advance_alone() -> None:
    cache = KVCache(2, 2, 16, 8)
    write(cache, 3)
    write(cache, 3, layer=1)
    assert cache.offset == 0
    cache.advance(3)
    assert cache.offset == 3


@pytest.mark.parametrize(
    ("window", "offset", "tokens", "fits"),
    [
        (5, 0, 8, True),  # the ring is exactly full
        (5, 0, 9, False),
        (5, 4, 4, True),  # around the end: what the first token needs is kept
        (5, 100, 4, True),
        (5, 100, 5, False),
        (8, 100, 1, True),
        (8, 100, 2, False),
        (None, 0, 8, True),
        (None, 7, 1, True),
        (None, 8, 1, False),
        (None, 3, 6, False),
    ],
)
def test_a_key_still_needed_is_never_overwritten(
    window: int | None, offset: int, tokens: int, fits: bool
) -> None:
    cache = KVCache(1, 2, 16, 8)
    cache.offset = offset
    new = rows(1, tokens)
    if fits:
        assert ops.attend(new, new, new, cache, 0, window).shape == new.shape
        return
    with pytest.raises(ValueError, match="overrun a cache of 8"):
        ops.attend(new, new, new, cache, 0, window)
    assert not cache.keys.any()


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("head_dim", [16, 20, 128])
def test_size_is_known_before_and_never_changes(kv_type: str, head_dim: int) -> None:
    cache = KVCache(3, 2, head_dim, 12, kv_type)
    bytes_of_32 = {"f16": 64, "f32": 128, "q8_0": 34}[kv_type]
    size = 2 * 3 * 2 * 12 * padded(head_dim, kv_type) * bytes_of_32 // 32
    assert cache.capacity == 12
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes == size
    assert cache_bytes(3, 2, head_dim, 12, kv_type) == size
    new = np.ones((4, 2, head_dim), np.float32)
    keys = cache.keys
    for _ in range(20):
        ops.attend(new, new, new, cache, 0, 5)
        cache.advance(4)
    assert cache.keys is keys
    assert cache.nbytes == size


def test_mistral_7b_takes_the_bytes_of_its_paper() -> None:
    """128 KiB a position in half precision (arXiv 2310.06825: 32 layers, 8 heads of 128)."""
    assert cache_bytes(32, 8, 128, 4096, "f16") == 512 * 2**20
    assert cache_bytes(32, 8, 128, 4096, "f32") == 2**30
    assert cache_bytes(32, 8, 128, 4096, "q8_0") == 272 * 2**20


def test_reset_forgets_the_sequence_and_keeps_the_memory() -> None:
    cache = KVCache(1, 2, 16, 8, "f32")
    write(cache, 4)
    cache.advance(4)
    keys = cache.keys
    cache.reset()
    assert cache.offset == 0
    assert cache.keys is keys
    new = rows(7, 1)
    out = ops.attend(new, new, new, cache, 0, 5)
    np.testing.assert_allclose(out, new, rtol=1e-6)  # it sees itself alone


def test_capacity_is_what_window_and_chunk_need() -> None:
    windowed = replace(TINY, sliding_window=24)
    assert capacity(windowed, chunk=1, context_length=128) == 24
    assert capacity(windowed, chunk=10, context_length=128) == 33
    assert capacity(windowed, chunk=10, context_length=30) == 30
    assert capacity(TINY, chunk=10, context_length=128) == 128


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("capacity", "window"), [(8, 5), (8, 8), (8, 2), (40, 5), (40, None)])
def test_what_a_ring_still_holds(capacity: int, window: int | None, seed: int) -> None:
    """Against a ring of labels: passes, some of them given up or taken back, in any order."""
    draw = random.Random(seed)
    cache = KVCache(1, 1, 16, capacity)
    slots: dict[int, int] = {}
    text: list[int] = []
    longest = 40 if window is None else capacity - window + 1
    for label in range(0, 4000, 40):
        new = [label + i for i in range(draw.randint(1, longest))]
        new = new[: 40 - len(text)] if capacity == 40 else new
        if new:
            cache.claim(len(new))
            slots |= {(len(text) + i) % capacity: token for i, token in enumerate(new)}
            if draw.random() < 0.7:
                text += new
                cache.advance(len(new))
        assert cache.offset == len(text)
        held = []
        for offset in range(len(text) + 3):
            oldest = 0 if window is None else max(0, offset - window + 1)
            seen = range(oldest, offset)
            right = offset <= len(text) and all(slots[p % capacity] == text[p] for p in seen)
            assert cache.holds(offset, window) == right
            held += [offset] * right
        assert len(text) in held
        if draw.random() < 0.5:
            text = text[: draw.choice(held)]
            cache.rewind(len(text))


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("taken", range(1, 5))
def test_a_pass_is_taken_back_without_a_trace(kv_type: str, taken: int) -> None:
    """A window of 5 and a chunk of 4, long after the ring has gone round."""

    def run(cache: KVCache, first: int, count: int, wrong: float = 0) -> NDArray[np.float32]:
        new = rows(first, count) / 16 + wrong
        out = ops.attend(new, new, new, cache, 0, 5)
        cache.advance(count)
        return out

    straight, cache = KVCache(1, 2, 16, 8, kv_type), KVCache(1, 2, 16, 8, kv_type)
    for first in range(0, 40, 4):
        want = run(straight, first, 4)
        run(cache, first, 4, wrong=77)
        cache.rewind(first)
        run(cache, first, taken)
        run(cache, first + taken, min(4, 40 - first - taken), wrong=99)
        cache.rewind(first + taken)
        assert cache.holds(first + taken, 5)
        if taken < 4:
            np.testing.assert_array_equal(run(cache, first + taken, 4 - taken), want[taken:])
        assert cache.offset == straight.offset == first + 4


def test_rewinding_to_nothing_is_a_reset() -> None:
    cache = KVCache(1, 2, 16, 8)
    for _ in range(5):
        cache.advance(4)
    assert cache.holds(20, 5) and cache.holds(16, 5) and not cache.holds(15, 5)
    assert cache.holds(0, 5) and not cache.holds(21, 5)
    cache.rewind(0)
    assert (cache.offset, cache.holds(0, 5), cache.holds(1, 5)) == (0, True, False)
    cache.advance(4)
    assert all(cache.holds(offset, 5) for offset in range(5))


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("start", [0, 5, 21])
def test_rows_that_are_read_can_be_put_into_another_ring(kv_type: str, start: int) -> None:
    cache, other = KVCache(2, 2, 64, 8, kv_type), KVCache(2, 2, 64, 8, kv_type)
    rng = np.random.default_rng(0)
    cache.keys[:] = rng.integers(0, 99, cache.keys.shape)
    cache.values[:] = rng.integers(0, 99, cache.values.shape)
    cache.begin_at(start)
    cache.offset = start + 7
    other.begin_at(start + 2)
    for end in range(start + 3, start + 7, 2):
        other.extend(cache.read(end - 1, end + 1))
    assert (other.first, other.offset) == (start + 2, start + 6)
    for position in range(start + 2, start + 6):
        slot = position % 8
        np.testing.assert_array_equal(other.keys[:, :, slot], cache.keys[:, :, slot])
        np.testing.assert_array_equal(other.values[:, :, slot], cache.values[:, :, slot])


def test_a_ring_that_is_extended_forgets_the_oldest() -> None:
    cache = KVCache(1, 1, 16, 8)
    cache.begin_at(3)
    for number in range(3):
        cache.extend(np.full((2, 1, 1, 5, 16), number, np.uint16))
    assert (cache.first, cache.offset) == (10, 18)
    assert cache.read(10, 18)[0, 0, 0, :, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    cache.extend(np.arange(2 * 11 * 16, dtype=np.uint16).reshape(2, 1, 1, 11, 16))
    assert cache.read(21, 29)[0, 0, 0, :, 0].tolist() == list(range(48, 176, 16))
