"""Text that a terminal may be given: nothing in it can move the cursor or change a colour."""

import re

# Control characters other than line feed and tab, separators of lines that terminals may break at,
# marks that reverse the direction of what follows, and halves of characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """What a model wrote, its line feeds and tabs kept, other control characters as escapes."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def explained(error: Exception) -> str:
    """What is wrong, and with which file."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    return str(error)
