"""How far a long stage is, on one line of standard error that is rewritten and in the end erased.

Nothing is shown of a stage that is over in half a second. Where standard error is no terminal, the
one thing said is that kernels are being compiled, since that takes longest and leaves no trace.
"""

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TextIO

DELAY = 0.5  # seconds a stage lasts before it is shown
COMPILING = 2.0  # seconds after which a plain line says what takes so long
_TICK = 0.2  # seconds between two drawings
_OF_BYTES = {
    "quantize": "quantizing",
    "split": "splitting",
    "join": "joining",
    "convert": "converting",
    "verify": "verifying",
    "resume": "reading what is there",
    "download": "downloading",
}


@dataclass(frozen=True)
class Stage:
    """`done` of `total` since `start`; `reported` is when that was said, in seconds as well.
    `begun` were done at the start already."""

    name: str
    done: int
    total: int
    start: float
    reported: float
    begun: int = field(default=0, kw_only=True)

    def line(self, now: float) -> str:
        """What a terminal shows at `now`."""
        if self.name == "compile":
            return f"compiling kernels {min(self.done + 1, self.total)}/{self.total} (done once)"
        if self.name == "load":
            return f"loading {100 * self.done // max(1, self.total)} %"
        if self.name in _OF_BYTES:
            share = 100 * self.done // max(1, self.total)
            line, unit, count = f"{_OF_BYTES[self.name]} {share} %", "MB/s", 1e6
            if self.name == "download":
                line += f", {self.done / count:.0f} of {self.total / count:.0f} MB"
        else:
            line, unit, count = f"reading {self.name} {self.done}/{self.total}", "tok/s", 1
        if self.done == self.begun or self.reported <= self.start:
            return line
        rate = (self.done - self.begun) / (self.reported - self.start)
        left = (self.total - self.done) / rate - (now - self.reported)
        return f"{line}  {rate / count:.1f} {unit}  ETA {_clock(left)}"


class Progress:
    """What `LLM(on_progress=...)` calls; it draws between `with` and its end, and then erases.

    The calls come seconds apart, so a thread draws: it may be entered again for the next stages.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._stage: Stage | None = None
        self._shown = 0  # characters on the line
        self._said_compiling = False
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._ticker: threading.Thread | None = None

    def __call__(self, name: str, done: int, total: int) -> None:
        """A stage ("compile", "load", "prompt", "text" or one of _OF_BYTES) has come so far."""
        now = time.monotonic()
        with self._lock:
            if self._stage is None or self._stage.name != name:
                self._stage = Stage(name, done, total, now, now, begun=done)
            else:
                self._stage = replace(self._stage, done=done, total=total, reported=now)

    def __enter__(self) -> "Progress":
        self._end.clear()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._ticker is not None
        self._end.set()
        self._ticker.join()
        self._stage = None
        self._write("")

    def _tick(self) -> None:
        while not self._end.wait(_TICK):
            with self._lock:
                stage = self._stage
            if stage is not None:
                self.draw(stage, time.monotonic())

    def draw(self, stage: Stage, now: float) -> None:
        """Show `stage` as it is at `now`, if it has lasted long enough."""
        lasted = now - stage.start
        if self._terminal:
            self._write(stage.line(now) if lasted >= DELAY else "")
        elif stage.name == "compile" and lasted >= COMPILING and not self._said_compiling:
            self._said_compiling = True
            print("cpuinfer: compiling kernels, which is done once", file=self._stream, flush=True)

    def _write(self, line: str) -> None:
        if line or self._shown:
            # The line, blanks over what is left of the last one and of a Ctrl-C ("^C"), and back.
            self._stream.write(f"\r{line:<{self._shown + 2}}" + "\r" * (not line))
            self._stream.flush()
            self._shown = len(line)


def _clock(seconds: float) -> str:
    """12 -> "0:12", 190 -> "3:10", 7265 -> "2:01:05"."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
