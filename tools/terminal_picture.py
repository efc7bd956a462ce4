"""A picture of a conversation for the README: `cpuinfer chat` in a shell, typed to.

python tools/terminal_picture.py tools/chat.svg
"""

import argparse
import io
import os
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl
from itertools import groupby
from pathlib import Path
from termios import TIOCSCTTY, TIOCSWINSZ

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 88, 30
#: What is typed, and what the screen shows then before the next is typed.
TYPED = (
    ("cpuinfer chat --temperature 0.7 --seed 34", "/help for commands\n>"),
    ("One day, a little bird lost its way.", "tok/s"),
    ("/exit", "to go on with this"),
    ("cpuinfer chat --resume", "/help for commands\n>"),
    ("Was the bird happy?", "tok/s"),
)


class _Screen(pyte.Screen):
    """One that shows faint text, which pyte does not know, as grey."""

    def select_graphic_rendition(self, *attrs: int, private: bool = False) -> None:
        super().select_graphic_rendition(*(90 if attr == 2 else attr for attr in attrs))


class Terminal:
    """A program in a pseudo-terminal of its own, and what its screen shows."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        columns: int = COLUMNS,
        rows: int = ROWS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = _Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = os.openpty()
        self._set_size(columns, rows)
        self.process = subprocess.Popen(
            argv,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={"TERM": "xterm-256color", **os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    @property
    def lines(self) -> list[str]:
        """The rows of the screen, without blanks at their ends."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """The screen."""
        return "\n".join(self.lines).rstrip()

    def type(self, keys: str | bytes) -> None:
        """Send keys, as a terminal encodes them."""
        data = keys.encode() if isinstance(keys, str) else keys
        while data:
            data = data[os.write(self._ours, data) :]

    def resize(self, columns: int, rows: int) -> None:
        """Another size of the window, which the program is told of."""
        self._set_size(columns, rows)
        self.screen.resize(rows, columns)
        os.killpg(self.process.pid, signal.SIGWINCH)

    def read(self, seconds: float = 0.05) -> bool:
        """Take in what the program writes within some seconds; False when it has ended."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self._stream.feed(data)
        self._answer(data)
        return bool(data)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Until the screen is as it should be; AssertionError with the screen if it never is."""
        end = time.monotonic() + seconds
        while not condition():
            running = self.read()
            assert running or condition(), f"the program ended:\n{self.text}"
            assert time.monotonic() < end, f"the screen stays:\n{self.text}"

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until the screen shows `text`, so often."""
        self.wait_until(lambda: self.text.count(text) >= times)

    def wait_for_end(self, seconds: float = 60) -> int:
        """The exit code."""
        end = time.monotonic() + seconds
        while self.read():
            assert time.monotonic() < end, f"the program goes on:\n{self.text}"
        return self.process.wait(seconds)

    def _answer(self, data: bytes) -> None:
        """A program that asks where the cursor is waits for the answer."""
        if b"\x1b[6n" in data:
            cursor = self.screen.cursor
            self.type(f"\x1b[{cursor.y + 1};{cursor.x + 1}R")

    def _set_size(self, columns: int, rows: int) -> None:
        ioctl(self._ours, TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def draw(screen: pyte.Screen, path: Path, title: str) -> None:
    """Write a screen as SVG."""
    console = Console(record=True, width=screen.columns, file=io.StringIO())
    rows = [screen.buffer[row] for row in range(screen.lines) if screen.display[row].strip()]
    for row in rows:
        line = Text()
        cells = [row[column] for column in range(screen.columns)]
        for style, some in groupby(cells, _style):
            line.append("".join(cell.data for cell in some), style)
        line.rstrip()
        console.print(line, overflow="crop", no_wrap=True)
    # Without fonts from elsewhere: the viewer's own will do.
    path.write_text(re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.S))


def _style(cell: "pyte.screens.Char") -> Style:
    colour = {"brightblack": "bright_black", "brown": "yellow"}.get(cell.fg, cell.fg)
    return Style(
        color=f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else colour,
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a short conversation, which is left and gone on with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args(argv)
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as data:
        environment = {"PS1": "$ ", "PATH": programs, "XDG_DATA_HOME": data}
        with Terminal(["bash", "--norc", "--noprofile"], environment=environment) as terminal:
            terminal.wait_for("$")
            for keys, shown in TYPED:
                seen = terminal.text.count(shown)
                terminal.type(f"{keys}\r")
                terminal.wait_for(shown, seen + 1)
                terminal.wait_until(lambda: terminal.lines[terminal.screen.cursor.y] in (">", "$"))
            draw(terminal.screen, arguments.output, "cpuinfer chat")
    return 0


if __name__ == "__main__":
    sys.exit(main())
