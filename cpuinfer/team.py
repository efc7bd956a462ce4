"""The threads that kernels run on: a process has one set of them, for one caller at a time."""

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cpuinfer.kernels import parallel
from cpuinfer.kernels.jit import config

_MOST_THREADS = int(config.NUMBA_NUM_THREADS)


def most_threads() -> int:
    """The CPUs this process may run on, or what NUMBA_NUM_THREADS said at the start."""
    return _MOST_THREADS


class Team:
    """A leader, which is whoever computes, and followers that sleep while nobody does.

    Outside of `computing` a kernel runs on the thread that calls it, which must be the only one
    to call kernels then.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.forked = False
        # A table must not share its cache lines with anything else.
        raw = np.zeros(parallel.table_words(most_threads()) + 2 * parallel.LINE, np.int64)
        self._words = raw[-(raw.ctypes.data // 8) % parallel.LINE :]
        self.table = self._words.ctypes.data
        self._followers: list[_Follower] = []
        self._dismissed = False
        self.threads = 1

    @property
    def threads(self) -> int:
        """How many threads a kernel called now is shared among."""
        return int(self._words[parallel.THREADS // 8])

    @threads.setter
    def threads(self, count: int) -> None:
        while len(self._followers) < count - 1:
            try:
                self._followers.append(_Follower(self.table, len(self._followers) + 1))
            except RuntimeError:  # the system has no thread left: fewer do the same
                count = len(self._followers) + 1
        self._words[parallel.THREADS // 8] = count

    def begin_pass(self) -> None:
        """Wake the followers, who will hardly sleep before `end_pass`."""
        if self._dismissed:
            return
        self._words[parallel.PASS // 8] = 1
        for follower in self._followers[: self.threads - 1]:
            follower.awake.set()

    def end_pass(self) -> None:
        """The followers wait a little for the next pass, then sleep."""
        if not self._dismissed:
            self._words[parallel.PASS // 8] = 0

    def mark_forked(self) -> None:
        """Threads do not survive a fork."""
        self.forked = True

    def dismiss(self) -> None:
        """End the followers: their table must not go before them."""
        self._dismissed = True
        self._words[parallel.PASS // 8] = -1
        for follower in self._followers:
            follower.dismissed = True
            follower.awake.set()
            follower.join()


class _Follower(threading.Thread):
    """A thread at its own seat; a daemon, for Python waits for all others before atexit."""

    def __init__(self, table: int, seat: int) -> None:
        super().__init__(name=f"cpuinfer-{seat}", daemon=True)
        self.table = table
        self.seat = seat
        self.awake = threading.Event()
        self.dismissed = False
        parallel.FOLLOW.prepare()
        self.start()

    def run(self) -> None:
        while True:
            self.awake.wait()
            self.awake.clear()
            if self.dismissed:
                return
            parallel.FOLLOW(self.table, self.seat)


team = Team()
atexit.register(team.dismiss)
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=team.mark_forked)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Hold the kernels' threads for a pass; RuntimeError in a forked child, which has none."""
    if team.forked:
        raise RuntimeError("the process was forked after cpuinfer was loaded: use spawn instead")
    with team.lock:
        before = team.threads
        try:
            team.threads = min(threads, most_threads())
            team.begin_pass()
            yield
        finally:
            team.end_pass()
            team.threads = before
