"""Markdown as lines for a terminal, by rich, which takes long to import.

Nothing that the text says is left out: tags are text, line breaks stay, links show where they lead.
"""

from collections.abc import Sequence
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.theme import Theme

from cpuinfer.terminal.text import printable

# What would hide text: HTML, link definitions; an image would show its description alone.
_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["reference", "image"])
)
_COLOURS = Theme({"markdown.code": "cyan", "markdown.h1": "bold", "markdown.h2": "bold"})
# The terminal's own colours, so that it can be read on any background.
_THEME = "ansi_dark"


class _Code(CodeBlock):
    """Code without a margin: what is copied from the screen is the code."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True)


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Text(Markdown):
    elements: ClassVar = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
        "heading_open": _Heading,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme=_THEME, hyperlinks=False)
        self.parsed = _PARSER.parse(text)
        _keep_line_breaks(self.parsed)


def rendered(text: str, columns: int) -> str:
    """Lines with escape sequences for this terminal.  Empty lines around the text are one after it
    where there were any."""
    console = Console(force_terminal=True, width=columns, theme=_COLOURS)
    lines = console.render_lines(_Text(text), pad=False)
    while lines and not _plain(lines[-1]):
        lines.pop()
    while lines and not _plain(lines[0]):
        del lines[0]
    if not lines:
        return ""
    with console.capture() as capture:
        for line in lines:
            console.print(Segments([*_safe(line), Segment.line()]), end="")
    return capture.get() + "\n" * text.endswith("\n\n")


def _keep_line_breaks(tokens: Sequence[Token]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_line_breaks(token.children or ())


def _plain(line: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in line).strip()


def _safe(line: Sequence[Segment]) -> list[Segment]:
    """Without spaces at the end, which would be copied with the text, and without what "&#27;" in
    the text has become."""
    kept = [Segment(printable(segment.text), segment.style) for segment in line]
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept
