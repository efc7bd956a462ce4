"""`cpuinfer convert`: runs that end early, outputs that cannot be made, and what is left then."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import (
    ROOT,
    assert_refused,
    metadata,
    outcome,
    random_weights,
    run,
    write_checkpoint,
)
from numpy.typing import NDArray

from quant import gguf_writer, partial_file
from quant.safetensors_file import StoredTensor

NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def fail_at(tensor: str, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Do something when the rows of a tensor are read."""
    whole = StoredTensor.rows

    def rows(self: StoredTensor, start: int, end: int) -> NDArray[np.float32]:
        if self.name == tensor:
            action()
        return whole(self, start, end)

    monkeypatch.setattr(StoredTensor, "rows", rows)


def refuse(error: BaseException) -> Callable[..., None]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_interruption_leaves_nothing(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    fail_at(NORM, monkeypatch, refuse(KeyboardInterrupt()))
    code, _ = outcome(capfd, checkpoint, checkpoint.parent / "out.gguf")
    assert code == 130
    assert sorted(checkpoint.parent.rglob("*")) == before


SLOW = """
import time
from quant.safetensors_file import StoredTensor
whole = StoredTensor.rows
def rows(self, start, end):
    if self.name == "model.norm.weight":
        print("here", flush=True)
        time.sleep(SECONDS)
    return whole(self, start, end)
StoredTensor.rows = rows
import sys; from cpuinfer.cli import main; sys.exit(main())
"""


def start_slow(source: Path, output: Path, seconds: int = 60) -> subprocess.Popen[str]:
    """A conversion that stays at its last tensor for so long."""
    script = f"SECONDS = {seconds}\n{SLOW}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "convert", str(source), str(output), "--no-verify"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_remove_what_was_begun(checkpoint: Path, number: signal.Signals) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    with start_slow(checkpoint, checkpoint.parent / "out.gguf", seconds=1) as process:
        process.send_signal(number)
    assert process.returncode == 128 + number
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_killed_run_is_cleared_away(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing under the final name, and what is left is gone after the next run."""
    output = checkpoint.parent / "out.gguf"
    with start_slow(checkpoint, output) as process:
        process.kill()
    left = [path.name for path in checkpoint.parent.iterdir() if path != checkpoint]
    assert left == [".out.gguf.partial"]
    usage = shutil.disk_usage

    def after_clearing(directory: Path) -> Any:
        assert not list(Path(directory).iterdir())  # its space is free again
        return usage(directory)

    monkeypatch.setattr(partial_file.shutil, "disk_usage", after_clearing)
    run(checkpoint, output)
    assert sorted(checkpoint.parent.iterdir()) == [output, checkpoint]


def test_two_runs_at_once(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second is refused and harms nothing of the first."""
    output = checkpoint.parent / "out.gguf"
    with start_slow(checkpoint, output) as process:
        before = sorted(checkpoint.parent.rglob("*"))
        code, error = outcome(capfd, checkpoint, output)
        assert code == 74
        assert "another process is making the same file" in error
        assert sorted(checkpoint.parent.rglob("*")) == before
        process.kill()


def test_full_disk_is_known_before_the_work(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(NORM, monkeypatch, refuse(AssertionError("read")))
    usage = shutil.disk_usage(checkpoint)._replace(free=100_000)
    monkeypatch.setattr(partial_file.shutil, "disk_usage", lambda path: usage)
    assert_refused(checkpoint, capfd, "MB are needed, 0.1 MB are free", 74)


@pytest.mark.parametrize("number", range(4))
def test_disk_that_is_full_later(
    checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """At whatever tensor: code 74, and neither output nor leftovers."""
    name = sorted(random_weights())[number * 5]
    fail_at(name, monkeypatch, refuse(OSError(errno.ENOSPC, "No space left on device", "out.gguf")))
    assert_refused(checkpoint, capfd, "No space left on device", 74)


@pytest.mark.parametrize(
    ("function", "number", "code"),
    [("fsync", errno.EIO, 74), ("replace", errno.EXDEV, 74), ("replace", errno.EACCES, 73)],
)
def test_end_that_fails(
    checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
    code: int,
) -> None:
    """An existing output stays as it was."""
    output = checkpoint.parent / "out.gguf"
    output.write_bytes(b"mine")
    error = OSError(number, os.strerror(number), str(output))
    monkeypatch.setattr(gguf_writer.os, function, refuse(error))
    assert_refused(checkpoint, capfd, os.strerror(number), code, "--force")
    assert output.read_bytes() == b"mine"


@pytest.mark.parametrize("change", ["touch", "truncate"])
def test_input_that_changes(
    checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    path = checkpoint / "model.safetensors"

    def damage() -> None:
        if change == "touch":
            os.utime(path, ns=(0, 0))
        else:
            os.truncate(path, 1000)

    fail_at(NORM, monkeypatch, damage)
    reason = "was changed while" if change == "touch" else "has become shorter while"
    assert_refused(checkpoint, capfd, reason, 74)


def test_no_such_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, error = outcome(capfd, tmp_path / "nowhere", tmp_path / "out.gguf")
    assert (code, error.count("\n")) == (66, 1)
    assert "nowhere" in error


def test_existing_output_wants_force(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = checkpoint.parent / "out.gguf"
    output.write_bytes(b"mine")
    assert_refused(checkpoint, capfd, "it exists (--force replaces it)", 73)
    assert output.read_bytes() == b"mine"
    run(checkpoint, output, "--force")


@pytest.mark.parametrize("place", ["missing/m.gguf", "tiny/config.json/m.gguf", "tiny"])
def test_output_that_cannot_be_made(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    (checkpoint / "config.json").write_text("not read yet")
    code, error = outcome(capfd, checkpoint, checkpoint.parent / place, "--force")
    assert (code, error.count("\n")) == (73, 1)


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_output_is_never_an_input(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], link: Callable[..., None] | None
) -> None:
    weights = checkpoint / "model.safetensors"
    output = weights if link is None else checkpoint.parent / "link.gguf"
    if link is not None:
        link(weights, output)
    before = weights.read_bytes()
    code, error = outcome(capfd, checkpoint, output, "--force")
    assert code == 2
    assert "input and output are the same file" in error
    assert weights.read_bytes() == before


def test_plot_wants_a_proof(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ("--no-verify", "--plot", "x.png")
    assert_refused(checkpoint, capfd, "--plot draws what --verify finds", 2, *options)


def test_as_a_program(checkpoint: Path) -> None:
    """From another directory, without the repository on the path of modules."""
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), "tiny", "m.gguf"]
    here = checkpoint.parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert metadata(gguf.GGUFReader(here / "m.gguf"))["general.name"] == "tiny"
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (73, "")
    assert done.stderr == "cpuinfer: m.gguf: it exists (--force replaces it)\n"


def test_closed_output(checkpoint: Path) -> None:
    """A reader that goes away ends the command, without a traceback; the file is there."""
    output = checkpoint.parent / "m.gguf"
    command = [sys.executable, "-m", "cpuinfer", "convert", str(checkpoint), str(output)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert output.exists()
