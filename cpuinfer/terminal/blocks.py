"""Where a Markdown text that is still being written can be cut: blocks that nothing changes any
more.  Knows of Markdown only what separates blocks at the outermost level; rendering is elsewhere.
"""

import re

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")
_HEADING = re.compile(r" {0,3}#{1,6}([ \t]|$)")
_ITEM = re.compile(r" {0,3}([-*+]|\d{1,9}[.)])([ \t]|$)")
_WHOLE_ITEM = re.compile(r"([-*+]|\d{1,9}[.)])[ \t]+\S")
# Inside a paragraph a number other than 1 begins no list: "It was in\n1984. In that year".
_INTERRUPTING_ITEM = re.compile(r" {0,3}([-*+]|1[.)])[ \t]+\S")
_RULE = re.compile(r" {0,3}([-*_])([ \t]*\1){2,}$")


def first_block(text: str) -> int:
    """The length of the first block of `text` with the empty lines after it, 0 while the block may
    go on.  A block is a paragraph, a heading, fenced code, or one item of a list.

    A line that has not ended yet may begin the next block, but is not known to belong to this one.
    """
    fence = ""  # what opened the code that the line is in
    begun = item = ended = False  # there is a block; it is an item of a list; it may be over
    for found in _LINE.finditer(text):
        line = found[0].rstrip()
        if not found[0].endswith("\n"):
            sure = begun and not fence and line and line[0] not in " \t"
            return found.start() if sure and (ended or (item and _WHOLE_ITEM.match(line))) else 0
        if fence:
            if line.lstrip().startswith(fence) and not line.strip(fence[0] + " \t"):
                fence, ended = "", not item
        elif not line:
            ended = begun
        elif begun and _begins_block(line, item, ended):
            return found.start()
        else:
            item = item or (not begun and _is_item(line))
            ended = not item and _HEADING.match(line) is not None
            fence, begun = _opened(line), True
    return 0


def _opened(line: str) -> str:
    """The fence that a line opens code with; "" if it opens none."""
    found = _FENCE.match(line)
    return "" if found is None or ("`" in found[1] and "`" in found[2]) else found[1]


def _is_item(line: str) -> bool:
    return _ITEM.match(line) is not None and _RULE.match(line) is None


def _begins_block(line: str, item: bool, ended: bool) -> bool:
    """Whether a line that follows others in a block begins the next one."""
    if item and line[0] in " \t":
        return False
    if ended or (item and _ITEM.match(line)):
        return True
    if _RULE.match(line):  # or what makes a heading of the paragraph
        return False
    return any((_HEADING.match(line), _opened(line), _INTERRUPTING_ITEM.match(line)))
