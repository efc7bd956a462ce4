"""Keys and values on disk: what is found is what would be computed, and nothing else is found."""

import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cpuinfer import prefixes
from cpuinfer.cache import KVCache
from cpuinfer.llm import LLM
from cpuinfer.prefixes import BLOCK, PrefixStore

DEMO = Path(__file__).parents[1] / "cpuinfer/data/demo.gguf"
CAPACITY = 3 * BLOCK - 10


def filled(ids: Sequence[int], first: int = 0, capacity: int = 1000) -> KVCache:
    """A cache whose numbers are told by the position and all tokens up to there."""
    cache = KVCache(2, 3, 16, capacity)
    cache.begin_at(first)
    for position in range(first, len(ids)):
        seed = hash(tuple(ids[: position + 1])) % 2**32
        numbers = np.random.default_rng(seed).integers(0, 2**16, (2, 2, 3, 1, 16), np.uint16)
        cache.extend(numbers)
    return cache


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 30_000, n).tolist()


def assert_holds(cache: KVCache, ids: Sequence[int], first: int = 0) -> None:
    """`cache` holds the positions from `first` on as `filled` makes them."""
    assert cache.offset == len(ids)
    assert cache.first <= first
    want = filled(ids, first)
    np.testing.assert_array_equal(cache.read(first, len(ids)), want.read(first, len(ids)))


@pytest.fixture
def store(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "prefixes", notice=complain)


def complain(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("kept", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
@pytest.mark.parametrize("more", [0, 1, 100])
def test_what_was_kept_is_restored(store: PrefixStore, kept: int, more: int) -> None:
    ids = text(kept)
    store.keep("model", ids, filled(ids))
    cache = filled(text(30, 9))
    assert store.restore("model", [*ids, *text(more, 1)], cache, None, 0) == kept
    assert_holds(cache, ids)


@pytest.mark.parametrize("common", [1, 50, BLOCK, 2 * BLOCK + 3, 3 * BLOCK])
def test_a_text_that_begins_alike_gets_what_is_common(store: PrefixStore, common: int) -> None:
    ids = text(4 * BLOCK + 20)
    store.keep("model", ids, filled(ids))
    cache = filled([])
    assert store.restore("model", [*ids[:common], *text(200, 1)], cache, None, 0) == common
    assert_holds(cache, ids[:common])


def test_texts_that_begin_alike_share_files(store: PrefixStore) -> None:
    ids = text(3 * BLOCK)
    store.keep("model", ids, filled(ids))
    longer = [*ids, *text(BLOCK, 1)]
    store.keep("model", longer, filled(longer))
    assert len(list(store.directory.glob("*/*"))) == 4


def test_a_block_replaces_the_shorter_one_it_begins_with(store: PrefixStore) -> None:
    ids = text(2 * BLOCK)
    for end in (BLOCK + 10, BLOCK + 30, BLOCK + 20):
        store.keep("model", ids[:end], filled(ids[:end]))
    assert len(list(store.directory.glob("*/*"))) == 2
    cache = filled([])
    assert store.restore("model", ids, cache, None, 0) == BLOCK + 30


def test_another_model_or_text_is_not_found(store: PrefixStore) -> None:
    ids = text(100)
    store.keep("model", ids, filled(ids))
    cache = filled(ids[:7])
    assert store.restore("other", ids, cache, None, 7) == 7
    assert store.restore("model", text(100, 1), cache, None, 0) == 0
    assert_holds(cache, ids[:7])


def test_what_the_cache_holds_already_is_not_read(store: PrefixStore) -> None:
    ids = text(100)
    store.keep("model", ids, filled(ids))
    cache = filled([])
    assert store.restore("model", ids, cache, None, 100) == 100
    assert cache.offset == 0


@pytest.mark.parametrize("end", [3 * BLOCK, 5 * BLOCK - 1, 9 * BLOCK + 1])
def test_a_ring_that_wrapped_needs_what_its_window_sees(store: PrefixStore, end: int) -> None:
    """Nothing else was kept, as after one long reply."""
    window, ids = CAPACITY - 2 * BLOCK, text(end)
    ring = filled(ids, end - CAPACITY, CAPACITY)
    store.keep("model", ids, ring)
    cache = KVCache(2, 3, 16, CAPACITY)
    assert store.restore("model", [*ids, 5], cache, None, 0) == (0 if end > CAPACITY else end)
    assert store.restore("model", [*ids, 5], cache, window, 0) == end
    assert cache.holds(end, window)
    assert_holds(cache, ids, end - window + 1)


def test_a_wrapped_ring_restores_an_earlier_place_from_blocks_kept_then(
    store: PrefixStore,
) -> None:
    ids, window = text(9 * BLOCK), CAPACITY - 2 * BLOCK
    for end in range(40, len(ids) + 1, 50):
        store.keep("model", ids[:end], filled(ids[:end], max(0, end - CAPACITY), CAPACITY))
    cache = KVCache(2, 3, 16, CAPACITY)
    for end in (7 * BLOCK + 5, 3 * BLOCK, 40):
        assert store.restore("model", [*ids[:end], -1], cache, window, 0) == end
        assert_holds(cache, ids[:end], max(0, end - window + 1))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"GGUF" + data[4:],
    ],
)
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_damaged_file_is_left_out_and_replaced(
    tmp_path: Path, damage: Callable[[bytes], bytes], block: int
) -> None:
    notices: list[str] = []
    store = PrefixStore(tmp_path, notice=notices.append)
    ids = text(2 * BLOCK + 9)
    files: list[Path] = []
    for end in (BLOCK, 2 * BLOCK, len(ids)):
        store.keep("model", ids[:end], filled(ids[:end]))
        files += set(tmp_path.glob("*/*")) - set(files)
    files[block].write_bytes(damage(files[block].read_bytes()))
    cache = filled([])
    held = store.restore("model", ids, cache, None, 0)
    assert held == block * BLOCK
    cache.rewind(held)
    assert_holds(cache, ids[:held])
    assert len(notices) <= 1
    store.keep("model", ids, filled(ids))
    assert store.restore("model", ids, cache, None, 0) == len(ids)
    assert_holds(cache, ids)


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    texts = [text(2 * BLOCK, seed) for seed in range(3)]
    store = PrefixStore(tmp_path)
    for ids in texts[:2]:
        store.keep("model", ids, filled(ids))
    size = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    store.restore("model", texts[0], filled([]), None, 0)
    store = PrefixStore(tmp_path, limit=size)
    store.keep("model", texts[2], filled(texts[2]))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= size
    found = [store.restore("model", ids, filled([]), None, 0) for ids in texts]
    assert found == [2 * BLOCK, 0, 2 * BLOCK]


def test_of_a_text_the_end_goes_first(tmp_path: Path) -> None:
    ids = text(4 * BLOCK)
    PrefixStore(tmp_path).keep("model", ids, filled(ids))
    size = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    store = PrefixStore(tmp_path, limit=size // 2)
    store.keep("model", ids, filled(ids))
    assert store.restore("model", ids, filled([]), None, 0) == 2 * BLOCK


def test_half_of_the_disk_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(4 * BLOCK)
    PrefixStore(tmp_path).keep("model", ids, filled(ids))
    size = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(size // 2))
    PrefixStore(tmp_path).keep("model", ids, filled(ids))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 0.75 * size


@pytest.mark.skipif(os.name != "posix", reason="needs permission bits")
def test_files_are_for_the_user_alone(store: PrefixStore) -> None:
    ids = text(10)
    store.keep("model", ids, filled(ids))
    (path,) = store.directory.glob("*/*")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_failed_write_leaves_nothing(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    ids = text(10)
    with pytest.raises(OSError, match="No space left"):
        store.keep("model", ids, filled(ids))
    assert not list(store.directory.glob("*/*"))


def test_a_text_larger_than_the_limit_is_not_written_again_and_again(tmp_path: Path) -> None:
    """Its beginning is kept, whatever it grows to."""
    ids = text(9 * BLOCK)
    block = 2 * 2 * 3 * 16 * 2 * BLOCK + 16 + 4 * BLOCK
    store = PrefixStore(tmp_path, limit=4 * block)
    store.keep("model", ids[: 6 * BLOCK], filled(ids[: 6 * BLOCK]))
    before = {path: path.stat().st_ino for path in tmp_path.glob("*/*")}
    assert len(before) == 4
    store.keep("model", ids, filled(ids))
    assert {path: path.stat().st_ino for path in tmp_path.glob("*/*")} == before
    assert store.restore("model", ids, filled([]), None, 0) == 4 * BLOCK


def test_room_is_made_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text(2 * BLOCK, seed) for seed in range(2)]
    PrefixStore(tmp_path).keep("model", texts[0], filled(texts[0]))
    size = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    write, totals = os.replace, []

    def watched(source: Path, target: Path) -> None:
        write(source, target)
        totals.append(sum(path.stat().st_size for path in tmp_path.glob("*/*")))

    monkeypatch.setattr(os, "replace", watched)
    PrefixStore(tmp_path, limit=size).keep("model", texts[1], filled(texts[1]))
    assert len(totals) == 2
    assert max(totals) <= size


def test_many_small_texts_stay_below_the_limit(tmp_path: Path) -> None:
    block = 2 * 2 * 3 * 16 * 2 * BLOCK + 16 + 4 * BLOCK
    store = PrefixStore(tmp_path, limit=64 * block)
    for seed in range(200):
        ids = text(BLOCK, seed)
        store.keep("model", ids, filled(ids))
    assert 50 <= len(list(tmp_path.glob("*/*"))) <= 64


def test_only_so_many_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MOST_FILES", 5)
    for seed in range(9):
        ids = text(10, seed)
        PrefixStore(tmp_path).keep("model", ids, filled(ids))
    assert len(list(tmp_path.glob("*/*"))) <= 6
    assert store_finds(tmp_path, text(10, 8)) == 10


def store_finds(directory: Path, ids: Sequence[int]) -> int:
    return PrefixStore(directory).restore("model", ids, filled([]), None, 0)


def test_what_another_process_is_writing_is_spared(tmp_path: Path) -> None:
    ids = text(BLOCK)
    store = PrefixStore(tmp_path, limit=0)
    (tmp_path / "model").mkdir(parents=True)
    fresh, old = tmp_path / "model/.a.kv.1", tmp_path / "model/.b.kv.2"
    (tmp_path / "model/directory").mkdir()
    for path in (fresh, old):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    store.keep("model", ids, filled(ids))
    assert {path.name for path in tmp_path.glob("*/*")} == {".a.kv.1", "directory"}


def test_a_block_that_was_removed_meanwhile_is_not_worth_a_word(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = text(2 * BLOCK)
    store.keep("model", ids, filled(ids))
    read = Path.read_bytes

    def gone(path: Path) -> bytes:
        path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", gone)
    cache = filled(text(9, 1))
    assert store.restore("model", ids, cache, None, 0) == 0
    assert (cache.first, cache.offset) == (0, 0)


def test_a_damaged_block_that_cannot_be_removed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    store = PrefixStore(tmp_path, notice=notices.append)
    ids = text(3 * BLOCK)
    store.keep("model", ids, filled(ids))
    second = _in_order(tmp_path, ids)[1]
    second.write_bytes(second.read_bytes()[:-1])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    cache = filled([])
    assert store.restore("model", ids, cache, None, 0) == BLOCK
    assert len(notices) == 1
    assert_holds(cache, ids[:BLOCK])


def test_only_what_is_missing_is_read(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(4 * BLOCK + 9)
    store.keep("model", ids, filled(ids))
    read: list[Path] = []
    whole = Path.read_bytes

    def watched(path: Path) -> bytes:
        read.append(path)
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", watched)
    cache = filled(ids[: 3 * BLOCK + 5])
    assert store.restore("model", ids, cache, None, 3 * BLOCK + 5) == len(ids)
    assert_holds(cache, ids)
    assert len(read) == 2


def test_damage_costs_no_more_than_the_block(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, notice=lambda _: None)
    ids = text(4 * BLOCK)
    store.keep("model", ids, filled(ids))
    last = _in_order(tmp_path, ids)[3]
    last.write_bytes(b"")
    third = _in_order(tmp_path, ids)[2]
    third.write_bytes(third.read_bytes()[:-1])
    cache = filled(ids[:100])
    assert store.restore("model", ids, cache, None, 100) == 2 * BLOCK
    assert_holds(cache, ids[: 2 * BLOCK])


def test_a_file_of_another_text_is_told_by_its_tokens(tmp_path: Path) -> None:
    """As if two texts had the same hash."""
    notices: list[str] = []
    store = PrefixStore(tmp_path, notice=notices.append)
    one, other = text(2 * BLOCK), text(2 * BLOCK, 1)
    for ids in (one, other):
        store.keep("model", ids, filled(ids))
    _in_order(tmp_path, one)[0].write_bytes(_in_order(tmp_path, other)[0].read_bytes())
    assert store.restore("model", one, filled([]), None, 0) == 0
    assert "another text" in notices[0]


def _in_order(directory: Path, ids: Sequence[int]) -> list[Path]:
    """The files of whole blocks of a text."""
    names = prefixes._names("model", ids)
    pairs = zip(names, names[1:], strict=False)
    return [directory / "model" / f"{parent}-{name}.kv" for parent, name in pairs]


# With a model


def long_text(llm: LLM) -> list[int]:
    story = "Once upon a time there was a girl who lived in a house by the sea with her dog. "
    return llm.tokenizer.encode(story * 40)


@pytest.mark.parametrize("window", ["auto", "off"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_resumed_text_goes_on_as_if_it_had_never_been_left(
    tmp_path: Path, window: str, kv_type: str
) -> None:
    """The bundled model's ring of 383 positions wraps three times."""
    options = {"sliding_window": window, "kv_type": kv_type}
    with LLM(DEMO, prefixes=PrefixStore(tmp_path, notice=complain), **options) as llm:
        ids = long_text(llm)
        ids += llm.generate(ids, max_tokens=400, seed=1, ignore_eos=True).token_ids
        llm.remember()
        stayed = llm.generate(ids, max_tokens=40, seed=2)
    with LLM(DEMO, prefixes=PrefixStore(tmp_path, notice=complain), **options) as llm:
        resumed = llm.generate(ids, max_tokens=40, seed=2)
    with LLM(DEMO, **options) as llm:
        computed = llm.generate(ids, max_tokens=40, seed=2)
    assert len(ids) > 1000
    assert resumed.token_ids == stayed.token_ids == computed.token_ids
    assert (resumed.cached_tokens, computed.cached_tokens) == (len(ids) - 1, 0)


@pytest.mark.parametrize(
    "other",
    [{"kv_type": "q8_0"}, {"sliding_window": "off"}, {"sliding_window": 100}],
)
def test_other_keys_and_values_are_not_taken(tmp_path: Path, other: dict[str, object]) -> None:
    with LLM(DEMO, prefixes=PrefixStore(tmp_path)) as llm:
        ids = llm.tokenizer.encode("The dog was very happy to see the girl and her mother.")
        llm.generate(ids, max_tokens=1)
        llm.remember()
    with LLM(DEMO, prefixes=PrefixStore(tmp_path), **other) as llm:
        assert llm.generate(ids, max_tokens=1).cached_tokens == 0


@pytest.mark.parametrize("of", ["__version__", "jit.FINGERPRINT"])
def test_another_program_computes_other_numbers(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(DEMO) as before, LLM(DEMO) as after:
        key = before.key
        monkeypatch.setattr(f"cpuinfer.prefixes.{of}", "other")
        assert after.key != key


def test_a_file_that_has_changed_is_another_model(tmp_path: Path) -> None:
    """Whatever has changed in it: not all of it is read for this."""
    changed = bytearray(DEMO.read_bytes())
    path = tmp_path / "model.gguf"
    path.write_bytes(changed)
    with LLM(path) as before:
        key = before.key
    changed[-1] ^= 1
    os.utime(path, (1, 1))
    with LLM(path) as after:
        assert after.key != key


def test_a_model_trained_further_is_another_one(tmp_path: Path) -> None:
    changed = bytearray(DEMO.read_bytes())
    middle = len(changed) - len(changed) // 2
    changed[middle : middle + 2_000_000] = bytes(b ^ 1 for b in changed[middle:][:2_000_000])
    (tmp_path / "changed.gguf").write_bytes(changed)
    with LLM(DEMO) as one, LLM(tmp_path / "changed.gguf") as other, LLM(DEMO) as same:
        assert one.key == same.key != other.key
