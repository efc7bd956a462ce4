"""Messages from a terminal: with editing and history where it can, see `prompt.py`, or else line by
line.
"""

import codecs
import io
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from cpuinfer.terminal.screen import can_edit

PROMPT = "> "
MORE = "  "  # before the lines of a message after its first

#: What may follow a text that begins with "/": names, each with what it means.
Choices = Callable[[str], Mapping[str, str]]


class Reader(Protocol):
    """Where messages come from."""

    def read(self, draft: str = "") -> str:
        """A message, begun with `draft` where it can be edited.  EOFError where there are no more,
        KeyboardInterrupt for Ctrl-C without a message."""

    def listening(self) -> AbstractContextManager[None]:
        """While this lasts, what is typed when no message is read is kept for the next one."""


def reader(history: Path | None, choices: Choices, when_shown: Callable[[], object]) -> Reader:
    """The best that the terminal allows.  `history` is the file of earlier messages; `when_shown`
    is called in a thread once there is a prompt."""
    if not can_prompt():
        return LineReader()
    from cpuinfer.terminal.prompt import PromptReader

    return PromptReader(history, choices, when_shown)


def can_prompt() -> bool:
    """Whether lines can be edited: in a POSIX terminal of UTF-8 that can move its cursor."""
    return (
        find_spec("termios") is not None
        and can_edit(sys.stdin)
        and can_edit(sys.stdout)
        and codecs.lookup(sys.stdin.encoding).name == "utf-8"
    )


class LineReader:
    """A line is a message; one that ends in a backslash is continued in the next."""

    def __init__(self) -> None:
        with suppress(ImportError):  # input() edits lines and remembers them where this is loaded
            import_module("readline")
        if isinstance(sys.stdin, io.TextIOWrapper):  # like output: UTF-8 whatever the locale
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")

    def read(self, draft: str = "") -> str:
        text = _line(PROMPT)
        while text.endswith("\\"):
            text = f"{text[:-1]}\n{_line(MORE)}"
        return text

    def listening(self) -> AbstractContextManager[None]:
        return nullcontext()


def _line(prompt: str) -> str:
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    try:
        if stream is sys.stdout:
            return input(prompt)
        print(prompt, end="", file=stream, flush=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=stream)
        raise
