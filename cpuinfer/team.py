"""The threads that kernels run on: a process has one set of them, for one caller at a time."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numba

from cpuinfer.kernels.jit import config

ALONE = 1 << 15  # numbers that one thread is done with before others would have begun


@dataclass
class Team:
    """How many threads may work now, and whether there are any."""

    threads: int = 1
    forked: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def mark_forked(self) -> None:
        """Threads do not survive a fork."""
        self.forked = True

    def threads_for(self, size: int) -> int:
        """Threads for work that is a few instructions for each of `size` numbers."""
        return self.threads if size >= ALONE else 1


team = Team()
if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=team.mark_forked)


def most_threads() -> int:
    """The threads Numba has: the CPUs of this process, or NUMBA_NUM_THREADS."""
    return int(config.NUMBA_NUM_THREADS)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Hold the kernels' threads for a pass; RuntimeError in a forked child, which has none."""
    if team.forked:
        raise RuntimeError("the process was forked after cpuinfer was loaded: use spawn instead")
    with team.lock:
        team.threads = min(threads, most_threads())
        numba.set_num_threads(team.threads)
        yield
