"""One file from the hub to its place: resumed where it was cut, and verified before it is there.

What has come is kept in FILE.partial with a record of what it is to become; the name FILE appears
when size, SHA-256 and the first bytes are right.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx2

from cpuinfer.gguf_errors import ModelFormatError, foreign_format
from cpuinfer.hub import store
from cpuinfer.hub.network import denied, opened, reaching, refused, told_of
from cpuinfer.hub.remote import RemoteFile

Report = Callable[[str, int], None]

WAITS = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds, before it is tried again
_MAGIC = b"GGUF"
_HEAD_BYTES = 512  # enough to know what a file is
_BLOCK_BYTES = 1 << 20


class _Cut(Exception):
    """The connection ended early, or the server is busy; what has come is kept."""


def download(file: RemoteFile, target: Path, on_progress: Report) -> int:
    """Fetch `file` to `target`, whose directory is locked by the caller; the bytes that came.

    `on_progress("resume" or "download", bytes so far)`. ModelFormatError for what is not the file
    that the hub told of; OSError where the connection fails for long, or the disk.
    """
    with reaching(), _Partial(file, target, on_progress) as partial:
        try:
            _fetch_all(file, partial)
            partial.finish()
        except OSError as error:
            if error.filename is not None:
                raise
            reason = f"{error.strerror}; what has come is kept for the next pull"
            raise OSError(error.errno, reason, str(target)) from None
        return partial.came


class _Partial:
    """The part of a file that has come, open to be added to."""

    def __init__(self, file: RemoteFile, target: Path, on_progress: Report) -> None:
        self._target = target
        self._path = store.beside(target, store.PARTIAL)
        self._report = on_progress
        self._record = store.Record(file.url, file.size, file.sha256)
        self._reported = 0
        self.came = 0
        self._clear()

    def _clear(self) -> None:
        self.done = 0
        self._head = b""
        self._sum = hashlib.sha256()

    @property
    def etag(self) -> str | None:
        """The server's name for the state of the file that this is a part of."""
        return self._record.etag

    def __enter__(self) -> "_Partial":
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = store.read_record(self._path)
        if kept is None or not self._is_part_of(kept) or not self._path.exists():
            self._path.unlink(missing_ok=True)
            self._keep_record()
        else:
            self._record = kept
        self._stream: IO[bytes] = open(self._path, "a+b")
        if self._stream.tell() > self._record.size:
            self.restart()
        self._stream.seek(0)
        while block := self._stream.read(_BLOCK_BYTES):
            self._count(block)
            self._report("resume", self.done)
        return self

    def _is_part_of(self, kept: store.Record) -> bool:
        now = self._record
        if now.sha256 is None:  # then the state of the file is told by the address and the etag
            return (kept.url, kept.size, kept.sha256) == (now.url, now.size, None)
        return (kept.size, kept.sha256) == (now.size, now.sha256)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written, once more; `finish` has written all
            self._stream.close()
        if kind is not None and self.done == 0:
            self._remove()

    def _remove(self) -> None:
        self._path.unlink(missing_ok=True)
        store.beside(self._path, store.RECORD).unlink(missing_ok=True)

    def _keep_record(self) -> None:
        _write_record(self._path, self._record)

    def _count(self, data: bytes) -> None:
        self.done += len(data)
        self._head += data[: _HEAD_BYTES - len(self._head)]
        self._sum.update(data)

    def is_of(self, etag: str | None) -> bool:
        """Whether a server that says `etag` may go on with this part."""
        return None in (etag, self.etag) or etag == self.etag

    def remember(self, etag: str | None) -> None:
        """Keep the server's name for what is coming."""
        if etag != self.etag:
            self._record = replace(self._record, etag=etag)
            self._keep_record()

    def add(self, data: bytes) -> None:
        """What came next; ModelFormatError where it cannot be the beginning of a model."""
        data = data[: self._record.size - self.done]
        self.came += len(data)
        self._count(data)
        if not self._head.startswith(_MAGIC[: len(self._head)]):
            found = foreign_format(self._head) or "no GGUF file"
            self.done = 0  # nothing worth to be kept
            raise self.wrong("magic", f"what the server sent is {found}")
        self._stream.write(data)
        self._reported = max(self._reported, self.done)  # also where the server began again
        self._report("download", self._reported)

    def restart(self) -> None:
        """Forget what has come."""
        self._stream.truncate(0)
        self._clear()

    def wrong(self, field: str, reason: str) -> ModelFormatError:
        return ModelFormatError(self._target, field, None, reason)

    def finish(self) -> None:
        """Verify the file and put it into its place, or remove it."""
        found, wanted = self._sum.hexdigest(), self._record.sha256
        removed = "it was removed, and can be pulled again"
        if self.done != self._record.size:
            self._remove()
            raise self.wrong("size", f"{self.done} bytes, not {self._record.size}; {removed}")
        if not self._head.startswith(_MAGIC):
            self._remove()
            raise self.wrong("magic", f"{foreign_format(self._head) or 'no GGUF file'}; {removed}")
        if wanted is not None and found != wanted:
            self._remove()
            raise self.wrong("sha256", f"{found}, not {wanted} as the hub tells; {removed}")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        _write_record(self._target, replace(self._record, sha256=found))
        os.replace(self._path, self._target)
        store.beside(self._path, store.RECORD).unlink(missing_ok=True)


def _write_record(path: Path, record: store.Record) -> None:
    place = store.beside(path, store.RECORD)
    work = store.beside(place, ".tmp")
    work.write_text(json.dumps(asdict(record)))
    os.replace(work, place)


# The network


def _fetch_all(file: RemoteFile, partial: _Partial) -> None:
    """Fetch until all is there or the server has no more; a cut connection is tried again."""
    failures = 0
    while partial.done < file.size:
        before = partial.done
        try:
            if not _fetch(file, partial):
                return
        except _Cut as error:
            failures = 1 if partial.done > before else failures + 1
            if failures > len(WAITS):
                kept = f"{partial.done} of {file.size} bytes are kept for the next pull"
                raise OSError(errno.EIO, f"{error}; {kept}", file.file) from None
            time.sleep(WAITS[failures - 1])


def _fetch(file: RemoteFile, partial: _Partial) -> bool:
    """Add what the server sends; False where it has no more.

    _Cut where the connection ended early, ModelFormatError and OSError as `download` does.
    """
    headers = {}
    if partial.done:
        headers["Range"] = f"bytes={partial.done}-"
        if partial.etag is not None and not partial.etag.startswith("W/"):
            headers["If-Range"] = partial.etag
    try:
        with opened(file.url, headers) as response:
            if response.status_code == 416:
                return False
            _check_answer(response, file, partial)
            for data in response.iter_raw():
                partial.add(data)
                if partial.done == file.size:  # whatever else the server would like to send
                    return True
    except httpx2.TransportError as error:
        raise _Cut(f"the connection failed ({told_of(error)})") from None
    if partial.done < file.size:
        raise _Cut("the connection ended early")
    return True


def _check_answer(response: httpx2.Response, file: RemoteFile, partial: _Partial) -> None:
    """That the body is the file, from where `partial` ends; or that begins anew."""
    status, headers = response.status_code, response.headers
    if status in (401, 403):
        raise denied(file.repository)
    if status in (408, 429) or status >= 500:
        raise _Cut(f"the server answered with HTTP status {status}")
    if status == 404:
        raise FileNotFoundError(errno.ENOENT, "the hub does not have the file any more", file.file)
    if status not in (200, 206):
        raise refused(file.url, f"the server answered with HTTP status {status}")
    if headers.get("Content-Type", "").startswith("text/html"):
        reason = "the server sent a web page in its place; is there one to log in to the network?"
        raise partial.wrong("content", reason)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise refused(file.url, f"the server sends it in {headers['Content-Encoding']} encoding")
    etag = headers.get("ETag")
    if status == 206 and not (partial.done and partial.is_of(etag)):
        partial.restart()
        raise _Cut("the server sent a part of another file")
    start = partial.done if status == 206 else 0
    part = headers.get("Content-Range")
    if status == 206 and part != f"bytes {start}-{file.size - 1}/{file.size}":
        raise refused(file.url, f"the server sent the part {part!r}")
    length = headers.get("Content-Length", str(file.size - start))
    if length != str(file.size - start):
        reason = f"the server is to send {file.size - start} bytes, and tells of {length}"
        raise refused(file.url, reason)
    if start == 0:  # not before: what has come is not given up for an answer that is no use
        partial.restart()
    partial.remember(etag)
