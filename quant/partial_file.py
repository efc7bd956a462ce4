"""A file that is complete or absent, though its making takes long and may be killed.

It is made in a directory `.NAME.partial` beside its place. What a killed run left there is removed
by the next one; a lock on the directory tells it from a run that is still at work.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def complete_or_absent(path: Path, nbytes: int) -> Iterator[Path]:
    """A place to write about `nbytes` to; the file takes `path`'s place at the end, or vanishes.

    OSError where that much is not free, where another process makes the same file, and whatever
    the file system says.
    """
    target = path.resolve()  # through a link, so that the link stays
    work = target.with_name(f".{target.name}.partial")
    with _locked(work):
        try:
            for leftover in work.iterdir():
                leftover.unlink()
            _check_space(work, nbytes, path)
            yield work / target.name
            os.replace(work / target.name, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    _sync(target.parent)


def write_private(path: Path, data: bytes) -> None:
    """Write a file for the user alone, complete or absent; OSError as above."""
    with complete_or_absent(path, len(data)) as place:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory, made if need be, for this process alone."""
    with suppress(FileExistsError):
        directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "another process is making the same file"
            raise OSError(errno.EBUSY, reason, str(directory)) from None
        yield
    finally:
        os.close(descriptor)


def _check_space(directory: Path, nbytes: int, path: Path) -> None:
    """OSError where the file system has not as much room as the file will take."""
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        reason = f"{nbytes / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, reason, str(path))


def _sync(directory: Path) -> None:
    """The directory's entries onto the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
