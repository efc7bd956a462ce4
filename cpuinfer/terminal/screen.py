"""A reply on the screen: text as it comes, and where the terminal can, Markdown in its place.

What is shown of a block that is still being written is erased when the block ends, and drawn again
as what it means.  That needs all of its lines on the screen: a block that is longer, or during
which the window changes its size, stays as it came.
"""

import os
import shutil
from typing import TYPE_CHECKING, Protocol, TextIO

from cpuinfer.terminal.blocks import first_block
from cpuinfer.terminal.text import printable

if TYPE_CHECKING:
    from cpuinfer.terminal.lines import Lines

_MARK = 12  # characters at the beginning of a line that tell whether a block begins there


class Screen(Protocol):
    """Where one reply goes."""

    def write(self, piece: str) -> None: ...

    def step_aside(self) -> None:
        """Something else is about to be written, on a line of its own."""

    def end(self) -> None:
        """Nothing follows: end the line."""


def can_edit(stream: TextIO) -> bool:
    """Whether this is a terminal in which the cursor can be moved back."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class RawScreen:
    """The text alone; unchanged where it does not go to a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._open = False  # a line

    def write(self, piece: str) -> None:
        self._stream.write(printable(piece) if self._terminal else piece)
        self._stream.flush()
        self._open = not piece.endswith("\n") if piece else self._open

    def step_aside(self) -> None:
        if self._open and self._terminal:
            self.write("\n")

    def end(self) -> None:
        self.write("\n")


class MarkdownScreen:
    """Text as it comes, in lines that break between words, and each block anew when it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._block = ""  # what has been written since the last block ended
        self._begin()

    def write(self, piece: str) -> None:
        before = len(self._block)
        self._block += printable(piece)
        # Blocks end where lines begin.
        if "\n" in self._block[max(0, before - _MARK) :]:
            while length := first_block(self._block):
                self._finish(length)
        self._show(len(self._block))
        self._stream.flush()

    def step_aside(self) -> None:
        self._end_line()
        self._stays = True
        self._stream.flush()

    def end(self) -> None:
        if self._can_erase():
            self._block = self._block.rstrip()
        self._finish(len(self._block))
        self._stream.flush()

    def _begin(self) -> None:
        """The block begins here, at the left margin."""
        self._size = shutil.get_terminal_size()
        self._lines = _lines(self._size.columns)
        self._shown = 0  # characters of the block
        self._stays = False  # as it is: it cannot be erased

    def _finish(self, length: int) -> None:
        """So much of the block ends it: draw it, or leave it as it came."""
        ended, rest = self._block[:length], self._block[length:]
        if self._can_erase():
            erase = "\r\x1b[K" + "\x1b[A\x1b[K" * (self._lines.count - 1)
            self._stream.write(erase + _drawn(ended, self._size.columns))
            self._begin()
        elif length < self._shown:  # what ended it is shown already, on a line of its own
            self._stays = not self._same_size()
            self._lines = _lines(self._size.columns)
            self._lines.add(rest[: self._shown - length])
            self._shown -= length
        else:
            self._show(length)
            self._end_line()
            self._begin()
        self._block = rest

    def _can_erase(self) -> bool:
        return not self._stays and self._lines.count < self._size.lines and self._same_size()

    def _same_size(self) -> bool:
        return self._size == shutil.get_terminal_size()

    def _show(self, length: int) -> None:
        self._stream.write(self._lines.add(self._block[self._shown : length]))
        self._shown = length

    def _end_line(self) -> None:
        if self._lines.open:
            self._stream.write(self._lines.add("\n"))


def _lines(columns: int) -> "Lines":
    from cpuinfer.terminal.lines import Lines

    return Lines(columns)


def _drawn(text: str, columns: int) -> str:
    from cpuinfer.terminal.markdown import rendered

    return rendered(text, columns)
