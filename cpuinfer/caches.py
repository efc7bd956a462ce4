"""The caches of a model between requests: what a prompt shares with an earlier one is kept."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cpuinfer.cache import KVCache
from cpuinfer.generate import Generation
from cpuinfer.prefixes import BLOCK, PrefixStore, common


class Caches:
    """Lends caches to requests: that of the last one first, else a new one.

    With a `store` (for the model of this key, see prefixes.model_key) longer beginnings are looked
    up there, and `remember` adds the last request's text.  What a ring loses before that is added
    when it is about to be lost.
    """

    def __init__(
        self,
        make: Callable[[], KVCache],
        window: int | None,
        store: PrefixStore | None = None,
        key: str = "",
    ) -> None:
        self._make = make
        self._window = window
        self._store = store
        self._key = key
        self._spare: tuple[KVCache, list[int]] | None = None  # with the ids that it holds
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, generation: Generation) -> Iterator[KVCache]:
        """A cache that holds the beginning of the prompt as far as it is known, never all of it."""
        with self._lock:
            spare, self._spare = self._spare, None
        cache, held = spare or (self._make(), [])
        prompt = generation.prompt[:-1]
        known = common(held, prompt)
        known = known if cache.holds(known, self._window) else 0
        if self._store is not None:
            known = self._store.restore(self._key, prompt, cache, self._window, known)
        cache.rewind(known)
        cache.before_loss = self._saver(cache, generation)
        try:
            yield cache
        finally:
            cache.before_loss = None
            held = [*generation.prompt, *generation.tokens][: cache.offset]
            with self._lock:
                if not self._closed:
                    self._spare = cache, held

    def _saver(self, cache: KVCache, generation: Generation) -> Callable[[int], None] | None:
        """What stores the blocks that a ring is about to lose."""
        store, stored = self._store, 0
        if store is None:
            return None

        def save(first: int) -> None:
            nonlocal stored
            if first <= stored:
                return
            stored = -(-first // BLOCK) * BLOCK
            with suppress(OSError):  # `remember` meets that again, and says so
                text = [*generation.prompt, *generation.tokens]
                store.keep(self._key, text[: min(stored, cache.offset // BLOCK * BLOCK)], cache)

        return save

    def remember(self) -> None:
        """Store the keys and values of the last request; OSError where that cannot be done."""
        with self._lock:
            if self._store is not None and self._spare is not None:
                cache, held = self._spare
                self._store.keep(self._key, held, cache)

    def forget(self) -> None:
        """Give back the memory of the last request."""
        with self._lock:
            self._spare = None

    def close(self) -> None:
        """`forget`, for good."""
        self._closed = True
        self.forget()
