"""The caches of a model between requests: what a prompt shares with an earlier one is kept."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cpuinfer.cache import KVCache
from cpuinfer.generate import Generation
from cpuinfer.prefixes import PrefixStore, common


class Caches:
    """Lends caches to requests: that of the last one first, else a new one.

    With a `store` (for the model of this key, see prefixes.model_key) longer beginnings are looked
    up there, and `remember` adds the last request's text.
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
        try:
            yield cache
        finally:
            held = [*generation.prompt, *generation.tokens][: cache.offset]
            with self._lock:
                if not self._closed:
                    self._spare = cache, held

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
