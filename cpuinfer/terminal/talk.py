"""What a person sees of a conversation: replies, notes between them, and how far the reading of a
prompt has come.  Replies go to standard output, all else to standard error.
"""

import shutil
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import closing

from cpuinfer.gguf_errors import escape
from cpuinfer.progress import Progress
from cpuinfer.terminal.screen import Screen, can_edit

_DIM, _USUAL = "\x1b[2m", "\x1b[0m"


class Talk:
    """Shows replies on screens that `screen` makes, one for each."""

    def __init__(self, screen: Callable[[], Screen], progress: Progress) -> None:
        self._make_screen = screen
        self._screen: Screen | None = None  # while there is a reply on it
        self._progress = progress
        self._watched = False

    def show(self, pieces: Generator[str, None, None]) -> bool:
        """A reply, and whether it came to its end: Ctrl-C stops it."""
        ended = True
        self._screen = screen = self._make_screen()
        try:
            with closing(pieces):
                self._watch(True)
                for piece in pieces:
                    self._watch(False)
                    screen.write(piece)
        except KeyboardInterrupt:
            ended = False
        except BaseException:
            screen.step_aside()
            raise
        finally:
            self._watch(False)
            self._screen = None
        screen.end()
        return ended

    def tell(self, line: str) -> None:
        """A line beside the replies, also in the middle of one."""
        self._watch(False)
        if self._screen is not None:
            self._screen.step_aside()
        print(_dimmed(escape(line)), file=sys.stderr)
        self._watch(self._screen is not None)  # what follows may be a prompt that is read

    def _watch(self, reading: bool) -> None:
        """Whether nothing is written now, so that there is room for the progress."""
        if reading == self._watched:
            return
        self._watched = reading
        if reading:
            self._progress.__enter__()
        else:
            self._progress.__exit__()


def _dimmed(line: str) -> str:
    """A line as a terminal shows it, broken between words; unchanged for others."""
    if not can_edit(sys.stderr):
        return line
    columns = shutil.get_terminal_size().columns
    return f"{_DIM}{textwrap.fill(line, max(2, columns), break_on_hyphens=False)}{_USUAL}"
