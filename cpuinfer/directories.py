"""Where files of the user's are kept: what can be made again, and what cannot."""

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CacheDirectory:
    """Where compiled kernels are kept, or None and in `warning` why nowhere."""

    path: Path | None
    warning: str | None


def cache_directory() -> CacheDirectory:
    """The user's cache directory for this program, made if need be, and nobody else's to write.

    Cached kernels are code that is loaded and run: a directory that others can write to is not
    used, and a missing one costs no more than compiling at each start.
    """
    try:
        path = _user_cache() / "cpuinfer"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return CacheDirectory(None, f"compiled kernels cannot be kept: {error}")
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        problem = f"belongs to another user ({status.st_uid})"
    elif hasattr(os, "geteuid") and status.st_mode & 0o022:
        problem = f"can be written by others (mode {status.st_mode & 0o777:o})"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = "cannot be written"
    else:
        return CacheDirectory(path, None)
    return CacheDirectory(None, f"compiled kernels cannot be kept: {path} {problem}")


def _user_cache() -> Path:
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # others are to be ignored (XDG Base Directory Specification)
        return Path(xdg)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local)
    return Path.home() / ".cache"


def data_directory() -> Path:
    """The user's directory for what this program keeps (models, conversations), made if need be.

    OSError where it cannot be made or written. Directories made here are the user's alone.
    """
    try:
        path = _user_data() / "cpuinfer"
    except RuntimeError as error:  # there is no home directory
        raise FileNotFoundError(errno.ENOENT, str(error), "~") from None
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _user_data() -> Path:
    xdg = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(xdg):  # others are to be ignored, as above
        return Path(xdg)
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local)
    return Path.home() / ".local/share"
