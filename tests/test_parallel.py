"""The table that a leader and its followers sit at."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from conftest import run_python

from cpuinfer.kernels import parallel
from cpuinfer.kernels.jit import kernel
from cpuinfer.kernels.parallel import shared
from cpuinfer.team import computing, team


@shared("test_count_rows")
def _count(begin, end, seat, counts, seats, busy):  # type: ignore[no-untyped-def]
    for i in range(begin, end):
        busy[seat, 0] += 1
        counts[i] += 1
        seats[i] = seat
        x = 0.0
        for j in range(200):
            x += 1.0 / (i + j + 1)
        busy[seat, 1] += int(x > 0)


@kernel("test_count", "void(i8[::1],i8[::1],i8[:,::1],i8,i8)")
def COUNT(counts, seats, busy, piece, table):  # type: ignore[no-untyped-def]
    _count(table, counts.size, piece, (counts, seats, busy))


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def arrays(items: int) -> Arrays:
    return np.zeros(items, np.int64), np.full(items, -1), np.zeros((3, 2), np.int64)


@pytest.mark.parametrize("items", [0, 1, 2, 5, 64, 1000])
@pytest.mark.parametrize("piece", [1, 3, 16, 2000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_item_is_done_once(items: int, piece: int, threads: int) -> None:
    counts, seats, busy = arrays(items)
    with computing(threads):
        for _ in range(20):
            COUNT(counts, seats, busy, piece, team.table)
    assert (counts == 20).all()
    assert ((seats >= 0) & (seats < threads)).all()
    assert busy[:, 0].sum() == busy[:, 1].sum() == 20 * items  # no seat was taken twice at once


def test_followers_help() -> None:
    def others() -> int:
        counts, seats, busy = arrays(30_000)
        with computing(3):
            COUNT(counts, seats, busy, 16, team.table)
        return int((seats > 0).sum())

    assert eventually(lambda: others() > 0)


def test_work_is_done_without_those_who_do_not_come() -> None:
    """A table with three seats at which nobody but the leader sits."""
    words = np.zeros(parallel.table_words(3) + parallel.LINE, np.int64)
    words[parallel.THREADS // 8] = 3
    counts, seats, busy = arrays(100)
    COUNT(counts, seats, busy, 7, words.ctypes.data)
    assert (counts == 1).all() and (seats == 0).all()


def test_outside_of_a_pass_one_thread_works() -> None:
    counts, seats, busy = arrays(100)
    with computing(3):
        assert team.threads == 3
    assert team.threads == 1
    COUNT(counts, seats, busy, 1, team.table)
    assert (counts == 1).all() and (seats == 0).all()


def test_followers_sleep_between_passes() -> None:
    def processor_seconds() -> float:
        start = time.process_time()
        time.sleep(0.05)
        return time.process_time() - start

    with computing(3):
        pass
    names = {thread.name for thread in threading.enumerate()}
    assert {"cpuinfer-1", "cpuinfer-2"} <= names
    assert eventually(lambda: processor_seconds() < 0.01)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds within some seconds, on cores that others use too."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if holds():
            return True
    return False


def test_a_pass_that_was_not_ended_does_not_keep_followers_busy() -> None:
    """Ctrl-C may strike anywhere, in `computing` too."""
    with computing(2):
        pass
    team.begin_pass()
    with computing(2):
        pass
    assert eventually(lambda: team._words[parallel.PASS // 8] == 0)


def test_a_process_ends_at_once_while_a_daemon_thread_computes() -> None:
    script = """
import threading, time
from test_parallel import *
counts, seats, busy = arrays(3000)
def work():
    while True:
        with computing(3):
            COUNT(counts, seats, busy, 16, team.table)
with computing(3):
    pass
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
start = time.monotonic()
team.dismiss()
print(time.monotonic() - start)
"""
    assert float(run_python(script)) < 5
