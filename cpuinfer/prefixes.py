"""Keys and values on disk: a prompt that begins like an earlier one is not computed again.

A sequence is kept in blocks of BLOCK positions, a file each, the last one shorter.  A file is named
by two hashes of the model and all tokens, up to its beginning and up to its end: what is found is
what would be computed, and sequences that begin alike share files.  (Keys and values do not depend
on the chunks, the threads or the sampling that made them: all arithmetic has a fixed order.)

    8 bytes   MAGIC
    uint32    n, the positions
    uint32    CRC-32 of all that follows
    int32     the n tokens
    ...       their keys, then their values, as KVCache.read gives them

Files are complete or absent and for the user alone.  They are not synced: what a power cut damages
is told by its checksum and costs no more than computing it.
"""

import hashlib
import os
import shutil
import stat
import struct
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpuinfer import __version__
from cpuinfer.cache import KVCache
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile
from cpuinfer.kernels import jit
from cpuinfer.lora import Adapter

BLOCK = 64
MAGIC = b"CPUINFKV"
#: Bytes kept if nothing else is said: 32,768 positions of a 7B model in half precision.
LIMIT = 4 << 30
#: Files kept: as many as are listed in some hundredths of a second.
MOST_FILES = 8192

_HEADER = struct.Struct("<8sII")
_SAMPLE = 4096  # bytes of a tensor
_STALE = 3600.0  # seconds after which a file that is being written is taken for left behind


class _Damaged(ValueError):
    """A file is not what its name says."""


@dataclass(frozen=True)
class _Part:
    """The first `n` positions of a block's file."""

    path: Path
    n: int


def model_key(
    file: GGUFFile, config: ModelConfig, adapters: Sequence[Adapter], kv_type: str
) -> str:
    """A hash of all that keys and values depend on, but for the tokens.

    Of a file this is its size, its time of change, and a sample of each tensor: reading all of a
    large one would take longer than the prompts that are spared.
    """
    digest = hashlib.sha256()
    for part in (__version__, jit.FINGERPRINT, config, kv_type, BLOCK):
        digest.update(f"{part}\0".encode())
    for source, scale in [(file, 1.0), *((adapter.file, adapter.scale) for adapter in adapters)]:
        changed = sorted(path.stat().st_mtime_ns for path in source.paths)
        digest.update(f"{source.nbytes} {changed} {scale}\0".encode())
        for tensor in source.tensors.values():
            data = tensor.data.reshape(-1)
            middle = len(data) // 2
            digest.update(f"{tensor.name} {tensor.qtype.name} {tensor.shape}\0".encode())
            digest.update(data[middle : middle + _SAMPLE].tobytes())
    return digest.hexdigest()[:32]


class PrefixStore:
    """Keys and values of texts that were read or written, in files of one directory.

    What takes more than `limit` bytes, or more than half of what the disk has for it, goes, the
    longest unused first.  `notice` is told of damaged files, which are removed.
    """

    def __init__(
        self, directory: Path, limit: int = LIMIT, notice: Callable[[str], None] = lambda _: None
    ) -> None:
        self.directory = directory
        self.limit = limit
        self._notice = notice
        self._room = -1  # bytes that may be written before the directory is looked through again

    def restore(
        self, model: str, ids: Sequence[int], cache: KVCache, window: int | None, held: int
    ) -> int:
        """Make `cache` hold as much of the beginning of `ids` as is known; how much that is.

        `held` of them it holds already: where no more is known it stays as it is.  Positions that
        nothing sees any more under a sliding window need not be known.
        """
        broken: set[Path] = set()
        while True:
            begin, parts = self._longest(model, ids, window, broken)
            end = begin + sum(part.n for part in parts)
            if end <= held:
                return held
            edge = held // BLOCK * BLOCK
            if begin < edge and cache.first <= begin:  # only what is missing
                cache.rewind(edge)
                parts = parts[(edge - begin) // BLOCK :]
            else:
                cache.begin_at(begin)
            for part in parts:
                try:
                    cache.extend(_read(part, ids[cache.offset : cache.offset + part.n], cache))
                except (OSError, _Damaged) as error:
                    broken.add(part.path)
                    self._leave_out(part.path, error)
                    held = cache.offset if cache.holds(cache.offset, window) else 0
                    break
            else:
                _touch(part.path for part in parts)
                return end
            if not held:
                cache.reset()

    def keep(self, model: str, ids: Sequence[int], cache: KVCache) -> None:
        """Store the keys and values of `ids` that `cache` holds; OSError where it cannot be done.

        Of what takes more than there may be, the beginning is stored.
        """
        (self.directory / model).mkdir(mode=0o700, parents=True, exist_ok=True)
        names, children = _names(model, ids), self._children(model)
        blocks: list[Path] = []
        missing: dict[Path, int] = {}  # where they begin
        for start in range(-(-cache.first // BLOCK) * BLOCK, len(ids), BLOCK):
            some, parent = ids[start : start + BLOCK], names[start // BLOCK]
            path = self._path(model, parent, _next_name(parent, some))
            like = _likest(children.get(parent, []), some)
            if like is None or like.n < len(some):
                missing[path] = start
                blocks.append(path)
            else:
                blocks.append(like.path)
        nbytes = cache.nbytes // cache.capacity * BLOCK
        room = self._make_room(len(missing) * nbytes, blocks)
        for path, start in list(missing.items())[: room // nbytes]:
            some = ids[start : start + BLOCK]
            _write(path, some, cache.read(start, start + len(some)))
            for sibling in children.get(names[start // BLOCK], []):
                if list(some[: len(shorter := _tokens(sibling))]) == shorter and sibling != path:
                    sibling.unlink(missing_ok=True)  # what it holds is in this block
        _touch(blocks)

    def _longest(
        self, model: str, ids: Sequence[int], window: int | None, broken: Collection[Path]
    ) -> tuple[int, list[_Part]]:
        """Where to begin, and the parts that follow each other from there: those that the token
        behind them sees."""
        names, children = _names(model, ids), self._children(model, broken)
        for block in reversed(range(len(names))):
            tail = _likest(children.get(names[block], []), ids[block * BLOCK :][:BLOCK])
            if tail is None:
                continue
            end = block * BLOCK + tail.n
            first = 0 if window is None else max(0, end - window + 1) // BLOCK
            paths = [self._path(model, *names[i : i + 2]) for i in range(first, block)]
            if all(path in children.get(names[first + i], []) for i, path in enumerate(paths)):
                return first * BLOCK, [*(_Part(path, BLOCK) for path in paths), tail]
        return 0, []

    def _children(self, model: str, but: Collection[Path] = ()) -> dict[str, list[Path]]:
        """The files of a model by the first part of their names."""
        children: dict[str, list[Path]] = {}
        for path in (self.directory / model).glob("*.kv"):
            if path not in but:
                children.setdefault(path.name.partition("-")[0], []).append(path)
        return children

    def _path(self, model: str, parent: str, name: str) -> Path:
        return self.directory / model / f"{parent}-{name}.kv"

    def _leave_out(self, path: Path, error: Exception) -> None:
        if isinstance(error, FileNotFoundError):  # another process made room
            return
        with suppress(OSError):
            path.unlink()
        reason = error.strerror if isinstance(error, OSError) else error
        self._notice(f"stored keys and values are computed again: {reason}")

    def _make_room(self, nbytes: int, blocks: Sequence[Path]) -> int:
        """Remove what was not used for longest, until there is room for `nbytes`, but for the
        `blocks` of a text that is being stored; the bytes there is room for."""
        if nbytes <= self._room:
            self._room -= nbytes
            return nbytes
        files = self._files()
        total, count = sum(size for _, size, _ in files), len(files)
        limit = min(self.limit, (total + shutil.disk_usage(self.directory).free) // 2)
        sizes = {path: size for _, size, path in files}
        others = [path for _, _, path in files if path not in set(blocks)]
        own = [path for path in reversed(blocks) if path in sizes]
        for path in [*others, *own]:
            wanted = limit - nbytes if path not in own else limit
            if total <= wanted and count < MOST_FILES:
                continue
            with suppress(OSError):
                path.unlink()
                total -= sizes[path]
                count -= 1
        room = max(0, limit - total)
        self._room = min(max(0, room - nbytes), limit // 16)
        return room

    def _files(self) -> list[tuple[int, int, Path]]:
        """When they were used, bytes, and paths, the longest unused first; without those that are
        just being written."""
        found = []
        for path in self.directory.glob("*/*"):
            with suppress(OSError):  # another process removes files as well
                status = path.stat()
                written = path.name.startswith(".") and time.time() - status.st_mtime < _STALE
                if stat.S_ISREG(status.st_mode) and not written:
                    found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _names(model: str, ids: Sequence[int]) -> list[str]:
    """The names of the beginnings of `ids` that end where a block begins: [0] of none, ..."""
    names = [model]
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        names.append(_next_name(names[-1], ids[start : start + BLOCK]))
    return names


def _next_name(parent: str, ids: Sequence[int]) -> str:
    return hashlib.sha256(parent.encode() + _as_bytes(ids)).hexdigest()[:32]


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, "<i4").tobytes()


def _likest(paths: Iterable[Path], ids: Sequence[int]) -> _Part | None:
    """Of blocks at the same place the one that has most of its beginning in common with `ids`."""
    parts = [_Part(path, common(_tokens(path), ids)) for path in paths]
    best = max(parts, key=lambda part: part.n, default=None)
    return best if best is not None and best.n else None


def _tokens(path: Path) -> list[int]:
    """The tokens of a block; none if it is no such file."""
    with suppress(OSError, struct.error, ValueError), path.open("rb") as file:
        magic, n, _ = _HEADER.unpack(file.read(_HEADER.size))
        if magic == MAGIC and n <= BLOCK:
            tokens: list[int] = np.frombuffer(file.read(4 * n), "<i4", n).tolist()
            return tokens
    return []


def _read(part: _Part, ids: Sequence[int], cache: KVCache) -> npt.NDArray[Any]:
    """(2, layers, K, part.n, row): keys and values, checked to be those of `ids`."""
    data = part.path.read_bytes()
    if len(data) < _HEADER.size:
        raise _Damaged("it is cut short")
    magic, n, checksum = _HEADER.unpack_from(data)
    shape = (2, *cache.keys.shape[:2], n, cache.keys.shape[3])
    body = memoryview(data)[_HEADER.size :]
    if magic != MAGIC or len(body) != 4 * n + int(np.prod(shape)) * cache.keys.itemsize:
        raise _Damaged("it is no block of keys and values of this model")
    if zlib.crc32(body) != checksum:
        raise _Damaged("its checksum is wrong")
    if bytes(body[: 4 * part.n]) != _as_bytes(ids):
        raise _Damaged("it belongs to another text")
    rows = np.frombuffer(body[4 * n :], cache.keys.dtype).reshape(shape)
    return rows[:, :, :, : part.n]


def _write(path: Path, ids: Sequence[int], rows: npt.NDArray[Any]) -> None:
    body = (_as_bytes(ids), rows.data.cast("B"))
    checksum = zlib.crc32(body[1], zlib.crc32(body[0]))
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(_HEADER.pack(MAGIC, len(ids), checksum))
            file.writelines(body)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _touch(paths: Iterable[Path]) -> None:
    """Mark blocks of a text as used, the last one first: it is the first of them to go."""
    for now, path in enumerate(reversed(list(paths)), time.time_ns()):
        with suppress(OSError):
            os.utime(path, ns=(now, now))
