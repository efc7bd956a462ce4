"""Text in lines that fit the window, laid out here so that their number is known for sure."""

import re
import unicodedata

from rich.cells import cell_len

_TAB = 8
# Not to be seen alone, but some terminals give them a place: flags' letters, colours of skin, and
# what makes an emoji of the character before.
_PICTURES = re.compile("[\U0001f1e6-\U0001f1ff\U0001f3fb-\U0001f3ff\ufe0f]")
_UNSEEN = ("Mn", "Me", "Cf")  # categories of marks upon other characters


def cells(character: str) -> int:
    """The most cells that a terminal gives a character: terminals differ, where several make up
    one picture."""
    if _PICTURES.match(character):
        return 2
    return max(cell_len(character), unicodedata.category(character) not in _UNSEEN)


class Lines:
    """Lines of less than `columns` cells, broken between words where words are short enough.

    `count` is their number, that of the cursor included, and `open` whether there is something to
    the left of the cursor.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._line = ""
        self._width = 0
        self.count = 1

    @property
    def open(self) -> bool:
        return self._line != ""

    def add(self, text: str) -> str:
        """What shows `text`, which follows the text so far."""
        return "".join(map(self._placed, text))

    def _placed(self, character: str) -> str:
        if character == "\n":
            return self._break("")
        if character == "\t":
            character = " " * (_TAB - self._width % _TAB)
        width = sum(map(cells, character))
        written = ""
        if self._line and self._width + width >= self._columns:
            if character.isspace():
                return self._break("")
            written = self._break(self._last_word())
        self._line += character
        self._width += width
        return written + character

    def _last_word(self) -> str:
        """The word before the cursor, if it can move to the next line: there is another one before
        it, and it takes as many cells as it has characters in any terminal."""
        head, _, word = self._line.rpartition(" ")
        return word if head.strip() and all(cells(c) == 1 for c in word) else ""

    def _break(self, word: str) -> str:
        """End the line, and begin the next one with its last word."""
        self._line, self._width = word, len(word)
        self.count += 1
        return (f"\x1b[{len(word)}D\x1b[K" if word else "") + f"\n{word}"
