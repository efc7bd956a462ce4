"""What commands share: standard streams, prompts, loading a model, and refusals.

Rooms that take long to import are imported where they are needed.
"""

import importlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpuinfer import options
from cpuinfer.gguf_errors import escape
from cpuinfer.progress import Progress

if TYPE_CHECKING:
    from cpuinfer.gguf import GGUFFile
    from cpuinfer.llm import LLM
    from cpuinfer.prefixes import PrefixStore


class BadInput(Exception):
    """Input, other than a model file, that is not what it should be."""


class BadOutput(Exception):
    """A file that cannot be made."""


def load(arguments: Namespace, progress: Progress, prefixes: "PrefixStore | None" = None) -> "LLM":
    with progress:
        from cpuinfer.estimate import before_loading
        from cpuinfer.hub.store import resolve
        from cpuinfer.llm import LLM

        bundled = resources.files("cpuinfer") / "data/demo.gguf"
        path = bundled if arguments.model is None else resolve(arguments.model)
        loading = options.loading(arguments)
        if sys.stderr.isatty() or getattr(arguments, "stats", False):
            line = before_loading(str(path), loading)
            if line is not None:
                note(line)
        llm = LLM(str(path), **loading, prefixes=prefixes, on_progress=progress)
    for warning in llm.warnings:
        note(f"warning: {warning}")
    return llm


def prefix_store(notice: Callable[[str], None]) -> "PrefixStore | None":
    """The keys and values of earlier texts, in the user's cache directory if there is one."""
    from cpuinfer import directories
    from cpuinfer.prefixes import PrefixStore

    directory = directories.cache_directory().path
    if directory is None:
        notice("keys and values are not kept: there is no cache directory for them")
        return None
    return PrefixStore(directory / "prefixes", notice=notice)


def open_model(name: str) -> "GGUFFile":
    """The model file at a path, or of a model that was pulled under this name."""
    from cpuinfer.gguf import open_gguf
    from cpuinfer.hub.store import resolve

    return open_gguf(resolve(name))


def read_prompt(path: Path | None) -> str:
    """The text of a file or of standard input, less one line feed at the end."""
    if path is not None:
        data = path.read_bytes()
    else:
        data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        name = "standard input" if path is None else path
        raise BadInput(f"{name}: the prompt is not UTF-8 text (byte {error.start})") from None


def utf8(text: str, option: str) -> str:
    """An argument whose bytes are UTF-8, even where the locale says otherwise; or ValueError."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # Python keeps bytes it cannot decode as lone surrogates
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{option} is not UTF-8 text: {text}") from None


def plotter(name: str, room: str) -> Callable[[Any], None]:
    """What draws a report to the file `name`; that it cannot be done is found before the work."""
    path = Path(name)
    try:
        drawing = importlib.import_module(f"cpuinfer.{room}")
    except ImportError as error:
        raise ValueError(
            f"--plot needs matplotlib (pip install 'cpuinfer[plot]'): {error}"
        ) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadOutput(f"{path}: the file cannot be made")

    def draw(report: Any) -> None:
        try:
            drawing.draw(report, path)
        except OSError as error:
            raise BadOutput(f"{path}: {error.strerror or error}") from None

    return draw


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(document: Any) -> None:
    """One document of ASCII characters only: nothing in it can be mistaken by a terminal."""
    from cpuinfer.describe import plain

    print(json.dumps(plain(document), allow_nan=False))


def note(message: str) -> None:
    """One line on standard error."""
    print(f"cpuinfer: {escape(message)}", file=sys.stderr)
