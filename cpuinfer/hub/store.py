"""The models that were pulled: files OWNER/REPO/FILE.gguf in one directory of the user's.

Beside each FILE.gguf, FILE.gguf.json says what it was verified to be. What is still to come is in
FILE.gguf.partial, with FILE.gguf.partial.json. Nothing here needs the network.
"""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cpuinfer import directories
from cpuinfer.gguf_errors import escape
from cpuinfer.hub import names
from cpuinfer.hub.names import Build, Name

PARTIAL = ".partial"
RECORD = ".json"


@dataclass(frozen=True)
class Record:
    """What a file is or is to become: its size, its SHA-256 where the hub tells it, where it comes
    from, and the server's name for this state of it."""

    url: str
    size: int
    sha256: str | None
    etag: str | None = None


@dataclass(frozen=True)
class LocalModel:
    """A model in the store; `paths` are its files that are complete."""

    repository: str
    build: Build
    name: str
    paths: tuple[Path, ...]
    nbytes: int  # with what is still to be completed
    modified: datetime
    complete: bool


def directory() -> Path:
    """Where models are kept; OSError where no directory can be made."""
    path = directories.data_directory() / "models"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def path_of(repository: str, file: str) -> Path:
    """Where a file of a repository is kept: the one place that makes such a path. ValueError where
    it would not be inside the store."""
    owner, _, repo = repository.partition("/")
    names.check_parts(owner, repo, file)
    root = directory().resolve()
    path = root.joinpath(owner, repo, *file.split("/"))
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{escape(str(path))} is a link that leaves {root}")
    return path


def beside(path: Path, ending: str) -> Path:
    """The file that belongs to `path`, with one of the endings above."""
    return path.with_name(path.name + ending)


def read_record(path: Path) -> Record | None:
    """The record of a file, None where there is none that makes sense."""
    try:
        found = Record(**json.loads(beside(path, RECORD).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (found.url, *(text for text in (found.sha256, found.etag) if text is not None))
    sound = isinstance(found.size, int) and all(isinstance(text, str) for text in texts)
    return found if sound else None


def verified_sha256(path: Path) -> str | None:
    """The SHA-256 that a file had when it was pulled, None where it was not, or is another now."""
    record = read_record(path)
    return record.sha256 if record is not None and record.size == path.stat().st_size else None


@contextmanager
def locked(repository: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """The directory of a repository, made if need be, for this process alone; its descriptor.
    `on_wait` is called where another process has to end first."""
    while True:
        repository.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(repository, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, repository):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open directory is still the one at `path`: who had it locked may have removed it,
    and a third one may have made it anew."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# What there is


def models() -> list[LocalModel]:
    """All models in the store, by name."""
    found: list[LocalModel] = []
    for repository in sorted(directory().glob("*/*/")):
        files = {
            path.relative_to(repository).as_posix().removesuffix(PARTIAL)
            for path in repository.rglob("*")
            if path.is_file()
        }
        found += _models_in(repository, names.builds(files))
    return found


def _models_in(repository: Path, builds: list[Build]) -> Iterator[LocalModel]:
    repository_name = "/".join(repository.parts[-2:])
    types = [build.qtype for build in builds]
    for build in builds:
        paths = [repository / file for file in build.files]
        partials = [beside(path, PARTIAL) for path in paths]
        # Parts first: what is completed meanwhile is found at one place at least.
        stats = {path: found for path in (*partials, *paths) if (found := _stat(path))}
        if not stats:  # it was removed meanwhile
            continue
        there = tuple(path for path in paths if path in stats)
        unique = build.qtype is not None and types.count(build.qtype) == 1
        yield LocalModel(
            repository_name,
            build,
            f"{repository_name}:{build.qtype}" if unique else f"{repository_name}/{build.files[0]}",
            there,
            sum(stat.st_size for stat in stats.values()),
            datetime.fromtimestamp(max(stat.st_mtime for stat in stats.values())).astimezone(),
            len(there) == len(paths) and not build.missing_parts,
        )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def models_named(name: Name) -> list[LocalModel]:
    """Those of the repository, and of the type or file if one is asked for."""
    return [
        model
        for model in models()
        if model.repository.lower() == name.repository.lower()
        and name.qtype in (None, model.build.qtype)
        and (name.file is None or name.file in model.build.files)
    ]


def removed(model: LocalModel) -> int:
    """Remove a model with all that belongs to it; the bytes that are free again.

    OSError where it is just being pulled, and whatever the file system says.
    """
    repository = directory() / model.repository

    def refuse() -> None:
        raise OSError(errno.EBUSY, "it is being pulled by another process", model.name)

    freed = 0
    with locked(repository, refuse):
        for file in model.build.files:
            path = path_of(model.repository, file)
            for ending in ("", RECORD, PARTIAL, PARTIAL + RECORD):
                with suppress(FileNotFoundError):
                    freed += beside(path, ending).stat().st_size
                    beside(path, ending).unlink()
            remove_empty(path.parent)
    return freed


def remove_empty(path: Path) -> None:
    """Remove a directory of the store that holds nothing, and those above it, but not the store."""
    root = directory().resolve()
    with suppress(OSError):  # not empty
        while path.resolve() != root:
            if path.exists():
                path.rmdir()
            path = path.parent


# Names of models on this computer


def resolve(name: str) -> Path:
    """The file of a model: a path as it is, or the first file of one that was pulled.

    FileNotFoundError names what is near, and what to do.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    try:
        parsed = names.parse(name)
    except ValueError:
        parsed = None
    local = _local(parsed) if parsed is not None else []
    complete = [model for model in local if model.complete]
    if parsed is not None and complete:
        return preferred(complete, parsed).paths[0]
    if path.is_dir():
        pulled = "" if parsed is None else f", and not pulled yet (cpuinfer pull {parsed})"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR) + pulled, name)
    raise FileNotFoundError(errno.ENOENT, _missing(name, parsed, bool(local)), name)


def _local(name: Name) -> list[LocalModel]:
    try:
        return models_named(name)
    except OSError:  # there is no store, and none can be made
        return []


def preferred(among: Sequence[LocalModel], name: Name) -> LocalModel:
    """The one that `name` asks for; ValueError where that may be several."""
    try:
        build = names.choose([model.build for model in among], name)
    except LookupError as error:
        raise ValueError(f"{escape(str(name))}: {error}") from None
    return next(model for model in among if model.build == build)


def _missing(name: str, parsed: Name | None, begun: bool) -> str:
    """Why there is no model `name`, what is near, and what to do."""
    if parsed is not None and begun:
        return f"the download is not complete; `cpuinfer pull {parsed}` goes on with it"
    if parsed is not None and parsed.short is not None:
        return f"it is not on this computer; `cpuinfer pull {parsed}` fetches it"
    near = near_names(name)
    meant = f"; near: {', '.join(near)}" if near else ""
    if name.lower().endswith(".gguf") or (parsed is None and os.sep in name):
        return os.strerror(errno.ENOENT) + meant
    if parsed is not None:
        return f"no such file, and not pulled yet (cpuinfer pull {parsed}){meant}"
    advice = "`cpuinfer list` shows what was pulled, `cpuinfer pull mistral` fetches a model"
    return f"no such file or model{meant}; {advice}"


def near_names(name: str) -> list[str]:
    """What may have been meant: models in the store, short names, GGUF files beside the path."""
    known = {short: short for short in names.SHORT_NAMES} | _pulled_names()
    with suppress(OSError, ValueError):
        for file in Path(name).parent.glob("*.gguf"):
            known[str(file)] = str(file)
    return _near(name, known)


def near_pulled(name: str) -> list[str]:
    """What may have been meant among the models in the store."""
    return _near(name, _pulled_names())


def _near(name: str, known: dict[str, str]) -> list[str]:
    near = dict.fromkeys(known[close] for close in names.close_to(name, known))
    return [escape(meant) for meant in near if meant != name]


def _pulled_names() -> dict[str, str]:
    """Names of models in the store by what may be typed for them."""
    known: dict[str, str] = {}
    with suppress(OSError):
        for model in models():
            known |= {model.name: model.name, model.repository.partition("/")[2]: model.name}
    return known
