"""What is said of a model file that cannot be used: the one error type, text from the file made
safe to print, and the names of what people offer in place of a GGUF file."""

import codecs
from pathlib import Path

_MAX_TEXT = 400

# First bytes of other files. The old GGML magics are stored as little-endian numbers.
_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive (PyTorch checkpoints are)"),
    (b"\x80\x02", "a Python pickle (old PyTorch checkpoints are)"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"lmgg", "a GGML model, a format before GGUF"),
    (b"fmgg", "a GGMF model, a format before GGUF"),
    (b"tjgg", "a GGJT model, a format before GGUF"),
    (b"algg", "a GGLA adapter, a format before GGUF"),
    (b"GGML", "a GGML model, a format before GGUF"),
    (b"GGJT", "a GGJT model, a format before GGUF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the file)"),
    (b"{", "JSON text (the answer of a server?)"),
)


def escape(text: str | bytes) -> str:
    """Text from a file as one printable line: all else becomes a backslash escape."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ModelFormatError(Exception):
    """A model file that is malformed, foreign or unsupported.

    `field` is the part at fault (a metadata key, "tensor NAME", a part of the header), `offset`
    the byte of the file to look at, None where no single one is, and `reason` what is wrong.
    """

    def __init__(self, path: Path, field: str, offset: int | None, reason: str) -> None:
        super().__init__(path, field, offset, reason)
        self.path = path
        self.field = field
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        """One printable line, whatever the file holds."""
        place = "" if self.offset is None else f" (byte {self.offset})"
        return f"{escape(str(self.path))}: {_brief(self.field)}: {_brief(self.reason)}{place}"


def _brief(text: str) -> str:
    line = escape(text[: _MAX_TEXT + 1])
    return line if len(line) <= _MAX_TEXT else line[:_MAX_TEXT] + "..."


def foreign_format(start: bytes) -> str | None:
    """The kind of file that begins with `start` (some hundred bytes), if it is a known one."""
    for magic, name in _FOREIGN:
        if start.startswith(magic):
            return name
    # safetensors: the length of a JSON header, then that header
    if start[8:9] == b"{" and start[4:8] == bytes(4):
        return "a safetensors file"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page (a failed download?)"
    return None


def text_conversion(start: bytes) -> str | None:
    """The damage a text conversion leaves in the first kilobytes of a binary file, if any shows."""
    line_ends = start.count(b"\n")
    if line_ends >= 4 and start.count(b"\r\n") == line_ends:
        return "it seems to have been copied as text (each line feed has a carriage return)"
    if "\ufffd".encode() in start:
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)
        except UnicodeDecodeError:
            return None
        return "it seems to have been converted to UTF-8 text, which destroys a binary file"
    return None
