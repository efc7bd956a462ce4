"""A model from the hub into the store, and what is checked before the first byte of it."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cpuinfer import machine
from cpuinfer.hub import names, store
from cpuinfer.hub.download import download
from cpuinfer.hub.remote import RemoteFile, RemoteModel


@dataclass(frozen=True)
class Pulled:
    """The files of a model in the store, and how many of their bytes came from the hub just now."""

    paths: tuple[Path, ...]
    nbytes: int
    fetched: int
    verified: bool  # by SHA-256, all files


def check_type(model: RemoteModel) -> None:
    """ValueError where a model of this type could not run here."""
    if not names.computable(model.build.qtype):
        others = ", ".join(qtype for qtype in model.types if names.computable(qtype))
        raise ValueError(
            f"models of type {model.build.qtype} do not run here"
            f"{f'; there are {others}' if others else ''}; --force pulls it nevertheless"
        )


def check_memory(nbytes: int, force: bool) -> str | None:
    """What to warn of, if anything, where a model of `nbytes` is to be used on this computer.

    MemoryError where it is larger than all of the memory, unless `force`.
    """
    total, available = machine.memory_total(), machine.memory_available()
    if nbytes > total:
        reason = (
            f"the model has {machine.format_bytes(nbytes)}, more than the memory of this computer "
            f"({machine.format_bytes(total)})"
        )
        if not force:
            raise MemoryError(f"{reason}; take a smaller type, or --force to pull it nevertheless")
        return reason
    if nbytes > available:
        return (
            f"the model has {machine.format_bytes(nbytes)}, and only "
            f"{machine.format_bytes(available)} of memory are free now"
        )
    return None


def pull(
    model: RemoteModel,
    on_progress: Callable[[str, int, int], None],
    notice: Callable[[str], None],
) -> Pulled:
    """Fetch the files that are not in the store yet, or that are not those of the hub any more.

    `on_progress("resume" or "download", bytes, of how many)`. Waits where another process pulls
    from the same repository. ModelFormatError and OSError as `download` does, and OSError where the
    disk is too small.
    """
    targets = [store.path_of(file.repository, file.file) for file in model.files]
    repository = store.directory() / model.name.repository

    def wait() -> None:
        notice(f"another process pulls from {model.name.repository}: waiting for it")

    with store.locked(repository, wait) as descriptor:
        try:
            missing = [
                (file, target)
                for file, target in zip(model.files, targets, strict=True)
                if not _is_there(file, target)
            ]
            total = sum(file.size for file, _ in missing)
            _check_space(repository, total - sum(_kept_bytes(target) for _, target in missing))
            done = fetched = 0
            for file, target in missing:

                def report(stage: str, count: int, done: int = done) -> None:
                    on_progress(stage, done + count, total)

                fetched += download(file, target, report)
                done += file.size
            os.fsync(descriptor)
        finally:
            for target in targets:  # where nothing came
                store.remove_empty(target.parent)
    verified = all(file.sha256 is not None for file in model.files)
    return Pulled(tuple(targets), model.nbytes, fetched, verified)


def _is_there(file: RemoteFile, target: Path) -> bool:
    """Whether the store has the hub's file: of this size and, if it was verified, with this sum."""
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    record = store.read_record(target)
    return record is None or file.sha256 is None or record.sha256 == file.sha256


def _kept_bytes(target: Path) -> int:
    """Bytes of the file that an earlier pull has left."""
    partial = store.beside(target, store.PARTIAL)
    return partial.stat().st_size if partial.exists() else 0


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        reason = (
            f"{machine.format_bytes(nbytes)} are still to be pulled, and "
            f"{machine.format_bytes(free)} are free on this disk: `cpuinfer rm` makes room, and "
            "XDG_DATA_HOME names another place"
        )
        raise OSError(errno.ENOSPC, reason, str(directory))
