"""Running commands in tests, in this process or in a child, and variants of the bundled model."""

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpuinfer
from cpuinfer import LLM
from cpuinfer.cli import main
from cpuinfer.gguf import open_gguf
from quant.gguf_writer import write_gguf

DEMO = Path(cpuinfer.__file__).parent / "data/demo.gguf"
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@cache
def warm() -> None:
    """Compile the kernels of the bundled model now: a command that has to says so."""
    with LLM(DEMO):
        pass


class Stdin(io.TextIOWrapper):
    """Standard input with these bytes, from a terminal or not."""

    def __init__(self, data: bytes = b"", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> Result:
    """A command in this process."""
    warm()
    code = main([str(word) for word in argv])
    return Result(code, *capsys.readouterr())


def child(
    *argv: str | Path | bytes, first: str = "", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, which runs the statements `first` before anything else;
    a child that hangs fails the test."""
    warm()
    script = f"{first}\nimport sys; from cpuinfer.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *argv]
    usual = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "timeout": 300,
        "env": environment(),
    }
    return subprocess.run(command, **{**usual, **options})


def environment(**names: str) -> dict[str, str]:
    """This process's, with changes, and with output buffered as it is for users."""
    names.setdefault("PYTHONUNBUFFERED", "")
    return {**os.environ, **names}


def variant(path: Path, keys: Mapping[str, Any] | None = None, nan: str | None = None) -> Path:
    """The bundled model at `path`, with other keys (None: without), and NaN in one tensor."""
    file = open_gguf(DEMO)
    metadata = {**file.metadata, **(keys or {})}
    tensors = [
        (
            tensor.name,
            tensor.qtype,
            np.full(tensor.shape, np.nan, np.float32)
            if tensor.name == nan
            else tensor.data.reshape(*tensor.shape[:-1], -1),
        )
        for tensor in file.tensors.values()
    ]
    write_gguf(path, {key: v for key, v in metadata.items() if v is not None}, tensors)
    return path
