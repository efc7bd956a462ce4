"""What of a reply is on the screen while it is written, and when it has ended."""

import io
import os
import re
import unicodedata
from collections.abc import Callable

import pytest

from cpuinfer.terminal import screen
from cpuinfer.terminal.blocks import first_block
from cpuinfer.terminal.lines import Lines
from cpuinfer.terminal.markdown import rendered
from cpuinfer.terminal.screen import MarkdownScreen, RawScreen
from cpuinfer.terminal.text import printable

REPLY = """\
# A heading

A paragraph with **bold words** that is longer than one line of a window,
and a second line.

1. First
2. Second, with code:

   ```py
   x = 1

   # not a heading
   ```
3. Third

```sh
ls *

cat <file>
```
The end.
"""


class Window(io.StringIO):
    """A terminal: understands what moves the cursor back and what erases, ignores colours."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows
        self.lines = [""]  # those that have left the window at the top too
        self.row = self.column = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for code, number, name, character in re.findall(
            r"(\x1b\[([\d;]*)([A-Za-z]))|([^\x1b])", text
        ):
            if code:
                self._control(name, int(number) if number.isdigit() else 1)
            else:
                self._put(character)
        return len(text)

    def _control(self, name: str, number: int) -> None:
        line = self.lines[self.row]
        match name:
            case "A":
                top = max(0, len(self.lines) - self.rows)
                assert self.row - number >= top, "what has left the window cannot be erased"
                self.row -= number
            case "D":
                assert number <= self.column
                self.column -= number
            case "K":
                self.lines[self.row] = line[: self.column]
            case "J":
                raise AssertionError("some terminals keep what is erased in their history")
            case _:
                assert name == "m"

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            if self.row == len(self.lines):
                self.lines.append("")
        else:
            assert character.isprintable(), repr(character)
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1
            assert self.column <= self.columns, "the terminal would break the line itself"

    def shown(self) -> str:
        """All lines down to the cursor's, below which there is nothing."""
        assert not "".join(self.lines[self.row + 1 :])
        return "\n".join(line.rstrip() for line in self.lines[: self.row + 1])


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Window]:
    def made(columns: int, rows: int) -> Window:
        opened = Window(columns, rows)
        size = lambda: os.terminal_size((opened.columns, opened.rows))  # noqa: E731
        monkeypatch.setattr(screen.shutil, "get_terminal_size", size)
        return opened

    return made


def told(window: Window, text: str, pieces: int = 3) -> str:
    """What stands there after a reply that comes in pieces of so many characters."""
    reply = MarkdownScreen(window)
    for start in range(0, len(text), pieces):
        reply.write(text[start : start + pieces])
    reply.end()
    return window.shown()


def drawn(text: str, columns: int) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", rendered(text, columns))


# blocks


@pytest.mark.parametrize(
    "blocks",
    [
        ["One\nparagraph.\n\n", "Another"],
        ["# Heading\n", "text\n\n\n", "## Next\n", "text"],
        ["text\n", "# Heading\n", "more"],
        ["- a\n", "- b\n  c\n\n  d\n\n", "- e\n  - f\n\n", "text"],
        ["1. a\n", "2) b\n\n", "10. c"],
        ["Why:\n", "- a\n", "- b"],
        ["It was in\n1984. In that year\n\n", "text"],
        ["```\na\n\n# b\n- c\n~~~\n```\n", "text"],
        ["text\n", "~~~~ py\na\n~~~\n~~~~~\n", "text"],
        ["- a\n  ```\n\nb\n  ```\n  c\n", "- d"],
        ["| a | b |\n|---|---|\n| 1 | 2 |\n\n", "text"],
        ["- a\n", "* * *\nb\n\n", "c"],
        ["`` `code` ``\n\n", "```a`b\n\n", "c"],
    ],
)
def test_a_text_is_cut_where_blocks_end(blocks: list[str]) -> None:
    found, rest = [], "".join(blocks)
    while length := first_block(rest):
        found.append(rest[:length])
        rest = rest[length:]
    assert [*found, rest] == blocks


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "One\n",
        "One\nt",
        "One\n\n",
        "# H\n",
        "- a\n\n ",
        "```\na\n\nb\n",
        "- a\n-",
        "- a\n  ```\n- b",
    ],
)
def test_what_may_go_on_is_no_block_yet(text: str) -> None:
    assert first_block(text) == 0


# lines


def test_lines_break_between_words() -> None:
    lines = Lines(10)
    assert lines.add("one two three") == "one two t\x1b[1D\x1b[K\nthree"
    assert (lines.count, lines.open) == (2, True)
    lines.add("\n")
    assert (lines.count, lines.open) == (3, False)
    # Of how many cells a picture takes terminals are not sure: it is not moved.
    assert Lines(10).add("ab 日本語日") == "ab 日本語\n日"


@pytest.mark.parametrize(
    "text", ["x" * 30, "日本語" * 9, "👩‍👩‍👧👍🏽🇩🇪❤️ " * 5, "a\tb\tc\td\te", "e\u0301 " * 40]
)
def test_no_line_is_wider_than_the_window(text: str) -> None:
    laid = Lines(12).add(text)
    laid = re.sub(r"[^\n]\x1b\[(\d+)D\x1b\[K", "", laid)
    for line in laid.split("\n"):
        wide = sum(
            0 if unicodedata.category(c) in ("Mn", "Cf") else 1 + (ord(c) > 0x2E80) for c in line
        )
        assert wide < 12, line


# text


def test_nothing_in_a_reply_controls_the_terminal() -> None:
    assert printable("a\tb\nc é ‍ \u200c") == "a\tb\nc é ‍ \u200c"
    assert printable("\x1b[2J\r\x07\x9b\u202e\u2028\udcff") == (
        "\\x1b[2J\\r\\x07\\x9b\\u202e\\u2028\\udcff"
    )


@pytest.mark.parametrize("made", [RawScreen, MarkdownScreen])
def test_screens_escape_what_the_model_wrote(
    made: type[RawScreen] | type[MarkdownScreen], window: Callable[[int, int], Window]
) -> None:
    opened = window(60, 24)
    reply = made(opened)
    reply.write("a\x1b[31m\rb &#27;[2J `&#x202e;` &#x202e;")
    reply.end()
    assert "a\\x1b[31m\\rb" in opened.shown()


def test_what_does_not_go_to_a_terminal_is_left_as_it_is() -> None:
    stream = io.StringIO()
    reply = RawScreen(stream)
    for piece in ("a\x1b", "\r", ""):
        reply.write(piece)
    reply.end()
    assert stream.getvalue() == "a\x1b\r\n"


# Markdown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("roses are red\nviolets\n\n", "roses are red\nviolets\n\n"),
        ("a <b>tag</b> &lt; <think>\n", "a <b>tag</b> < <think>\n"),
        ("[x](http://y.z) ![i](p.png)", "x (http://y.z) !i (p.png)\n"),
        ("[x]: http://y.z\n", "[x]: http://y.z\n"),
        ("# One\n", "One\n"),
        ("3. c\n", " 3 c\n"),
        ("```py\nif x:\n    y\n```\n", "if x:\n    y\n"),
        ("> said\n", "▌ said\n"),
        ("\n  \n", ""),
    ],
)
def test_markdown_says_all_that_the_text_says(text: str, shown: str) -> None:
    assert drawn(text, 40) == shown


# the screen


@pytest.mark.parametrize("pieces", [1, 3, 1000])
@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_reply_is_drawn_block_by_block(
    columns: int, pieces: int, window: Callable[[int, int], Window]
) -> None:
    rest, blocks = REPLY.rstrip(), []
    while length := first_block(rest):
        blocks.append(rest[:length])
        rest = rest[length:]
    expected = "".join(drawn(block, columns) for block in [*blocks, rest])
    assert told(window(columns, 24), REPLY, pieces) == expected


def test_text_is_shown_as_it_comes(window: Callable[[int, int], Window]) -> None:
    opened = window(40, 24)
    reply = MarkdownScreen(opened)
    for piece, shown in [("Some", "Some"), (" **bo", "Some **bo"), ("ld**", "Some **bold**")]:
        reply.write(piece)
        assert opened.shown() == shown
    reply.write("\n\nNext")
    assert opened.shown() == "Some bold\n\nNext"


def test_what_is_longer_than_the_window_stays_as_it_came(
    window: Callable[[int, int], Window],
) -> None:
    long = "".join(f"**line** {i}\n" for i in range(12))
    opened = window(40, 10)
    assert told(opened, f"*One*\n\n{long}\n*Two*\n") == f"One\n\n{long}\nTwo\n"


def test_a_block_during_which_the_window_changes_stays_as_it_came(
    window: Callable[[int, int], Window],
) -> None:
    opened = window(40, 24)
    reply = MarkdownScreen(opened)
    reply.write("some **bold** words\n")
    opened.columns = 30
    reply.write("*more*\n\n*Next*")
    reply.end()
    assert opened.shown() == "some **bold** words\n*more*\n\nNext\n"


def test_a_line_in_the_middle_of_a_reply_stays(window: Callable[[int, int], Window]) -> None:
    opened = window(40, 24)
    reply = MarkdownScreen(opened)
    reply.write("*One* is")
    reply.step_aside()
    opened.write("a note\n")
    reply.write(" first.\n\n*Two*")
    reply.end()
    assert opened.shown() == "*One* is\na note\n first.\n\nTwo\n"


def test_a_reply_that_stops_in_a_block_is_drawn_as_far_as_it_came(
    window: Callable[[int, int], Window],
) -> None:
    assert told(window(40, 24), "a **b** c  ") == "a b c\n"
    assert told(window(40, 24), "```\ncode") == "code\n"
    assert told(window(40, 24), "") == ""


def test_where_a_cursor_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Window(80, 24)
    for term, can in [("xterm", True), ("dumb", False), ("", False)]:
        monkeypatch.setenv("TERM", term)
        assert screen.can_edit(stream) is can
    monkeypatch.delenv("TERM")
    assert not screen.can_edit(stream)
    monkeypatch.setenv("TERM", "xterm")
    assert not screen.can_edit(io.StringIO())
