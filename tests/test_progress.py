"""The line that tells how far a stage is."""

import io
import threading
import time
from collections.abc import Callable

import pytest

from cpuinfer import progress
from cpuinfer.progress import Progress, Stage


class Terminal(io.StringIO):
    """Keeps what is written to it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """The line as it would look: a carriage return lets the next text overwrite."""
        line: list[str] = []
        for text in self.getvalue().split("\r"):
            line[: len(text)] = text
        return "".join(line).rstrip()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread will do; the test fails where it does not."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen within ten seconds")


@pytest.mark.parametrize(
    ("stage", "now", "line"),
    [
        (Stage("compile", 2, 9, 0.0, 5.0), 6.0, "compiling kernels 3/9 (done once)"),
        (Stage("compile", 9, 9, 0.0, 5.0), 6.0, "compiling kernels 9/9 (done once)"),
        (Stage("load", 456, 1000, 0.0, 5.0), 6.0, "loading 45 %"),
        (Stage("load", 0, 0, 0.0, 5.0), 6.0, "loading 0 %"),
        (Stage("prompt", 0, 2048, 100.0, 100.0), 130.0, "reading prompt 0/2048"),
        # 512 tokens in 64 s are 8 a second; 1536 are left, of whose 192 s 2 have gone by.
        (
            Stage("prompt", 512, 2048, 100.0, 164.0),
            166.0,
            "reading prompt 512/2048  8.0 tok/s  ETA 3:10",
        ),
        (
            Stage("text", 512, 2048, 100.0, 164.0),
            166.0,
            "reading text 512/2048  8.0 tok/s  ETA 3:10",
        ),
        (
            Stage("join", 10**9, 4 * 10**9, 0.0, 5.0),
            6.0,
            "joining 25 %  200.0 MB/s  ETA 0:14",
        ),
        (
            Stage("prompt", 1, 7266, 0.0, 1.0),
            1.0,
            "reading prompt 1/7266  1.0 tok/s  ETA 2:01:05",
        ),
        # 3 GB of 4 in 100 s are 30 MB/s; the last takes 33 s, of which 3 have gone by.
        (
            Stage("quantize", 3 * 10**9, 4 * 10**9, 0.0, 100.0),
            103.0,
            "quantizing 75 %  30.0 MB/s  ETA 0:30",
        ),
        # 0.5 GB of 4 in 50 s are 10 MB/s, since 1 GB was there before.
        (
            Stage("download", 1_500_000_000, 4 * 10**9, 0.0, 50.0, begun=10**9),
            60.0,
            "downloading 37 %, 1500 of 4000 MB  10.0 MB/s  ETA 4:00",
        ),
        (
            Stage("prompt", 9, 10, 0.0, 9.0),
            99.0,
            "reading prompt 9/10  1.0 tok/s  ETA 0:00",
        ),
    ],
)
def test_lines(stage: Stage, now: float, line: str) -> None:
    assert stage.line(now) == line


def test_a_stage_is_shown_late_and_rewritten() -> None:
    terminal = Terminal()
    shown = Progress(terminal)
    shown.draw(Stage("load", 1, 2, 10.0, 10.0), 10.4)
    assert terminal.getvalue() == ""
    shown.draw(Stage("prompt", 300, 2000, 10.0, 20.0), 20.0)
    assert terminal.screen() == "reading prompt 300/2000  30.0 tok/s  ETA 0:57"
    shown.draw(Stage("load", 1, 2, 20.0, 21.0), 21.0)
    assert terminal.screen() == "loading 50 %"
    assert "\n" not in terminal.getvalue()


def test_a_thread_draws_while_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    terminal = Terminal()
    threads = threading.active_count()
    shown = Progress(terminal)
    for done in (3, 4):  # it may be used again
        with shown:
            shown("compile", done, 9)
            until(lambda done=done: f"{done + 1}/9" in terminal.screen())
        assert terminal.screen() == ""
    assert threading.active_count() == threads


def test_the_rate_is_that_of_what_was_done_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    clock = iter([100.0, 101.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 101.0))
    terminal = Terminal()
    with Progress(terminal) as shown:
        shown("download", 3 * 10**9, 4 * 10**9)
        shown("download", 3_100_000_000, 4 * 10**9)
        until(lambda: "100.0 MB/s  ETA 0:09" in terminal.screen())


def test_an_error_ends_it_and_erases_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    terminal = Terminal()
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Progress(terminal) as shown:
        shown("load", 1, 3)
        until(lambda: "33 %" in terminal.screen())
        raise KeyboardInterrupt
    assert terminal.screen() == "" and threading.active_count() == threads


def test_without_a_terminal_compiling_alone_is_told_once() -> None:
    stream = io.StringIO()
    shown = Progress(stream)
    for name in ("load", "prompt"):
        shown.draw(Stage(name, 1, 9, 0.0, 60.0), 60.0)
    shown.draw(Stage("compile", 0, 9, 0.0, 0.0), 1.9)
    assert stream.getvalue() == ""
    for now in (2.1, 9.0):
        shown.draw(Stage("compile", 0, 9, 0.0, 0.0), now)
    assert stream.getvalue().count("\n") == 1 and "compiling kernels" in stream.getvalue()
