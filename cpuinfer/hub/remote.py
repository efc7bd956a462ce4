"""What the hub tells of a repository: its model files, their sizes and their SHA-256 sums.

What the server says is checked here before anything is made of it.
"""

import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from cpuinfer.gguf_errors import ModelFormatError, escape
from cpuinfer.hub import names
from cpuinfer.hub.names import Build, Name
from cpuinfer.hub.network import denied, opened, reaching, refused

_MAX_ANSWER_BYTES = 32 << 20  # a repository of ten thousand files takes about 4 MB
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_INVALID_TOKEN = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, as the hub describes it; `sha256` None where it does not say."""

    repository: str
    file: str
    url: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class RemoteModel:
    """A model on the hub, and the types it could be had in."""

    name: Name
    build: Build
    files: tuple[RemoteFile, ...]
    types: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def find(name: Name) -> RemoteModel:
    """The model that `name` asks for.

    FileNotFoundError and PermissionError for what is not there or not allowed, ModelFormatError for
    what the server must not say, other OSErrors where it cannot be reached.
    """
    told = _ask(name)
    files = {sibling["rfilename"]: sibling for sibling in told["siblings"]}
    builds = names.builds(files)
    if not builds:
        reason = (
            "the repository has no GGUF files; where it has safetensors, download it and make one "
            "with `cpuinfer convert`"
        )
        raise FileNotFoundError(errno.ENOENT, reason, name.repository)
    try:
        build = names.choose(builds, name)
    except LookupError as error:
        raise FileNotFoundError(errno.ENOENT, str(error), name.repository) from None
    if build.missing_parts:
        reason = f"{build.missing_parts} parts of {escape(build.files[0])} are missing on the hub"
        raise FileNotFoundError(errno.ENOENT, reason, name.repository)
    commit = told.get("sha")
    if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)):
        commit = name.revision
    found = tuple(_file(name, file, files[file], commit) for file in build.files)
    types = tuple(dict.fromkeys(build.qtype or build.files[0] for build in builds))
    return RemoteModel(name, build, found, types)


def _ask(name: Name) -> dict[str, Any]:
    """The hub's document of a repository; its "siblings" are files with a name each."""
    page = f"{names.endpoint()}/{name.repository}"
    place = f"{names.endpoint()}/api/models/{name.repository}"
    if name.revision != "main":
        place += f"/revision/{name.revision}"
    with reaching(), opened(f"{place}?blobs=true", {}) as response:
        if response.status_code != 200:
            raise _refusal(response, name)
        body = bytearray()
        for data in response.iter_bytes():
            body += data
            if len(body) > _MAX_ANSWER_BYTES:
                raise refused(page, "the answer of the hub does not end")
    try:
        told: dict[str, Any] = json.loads(body)
        if all(isinstance(sibling["rfilename"], str) for sibling in told["siblings"]):
            return told
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    reason = "the answer is no list of files; is there a page to log in to the network?"
    raise refused(page, reason)


def _refusal(response: httpx2.Response, name: Name) -> OSError:
    """What the hub means by an answer that is not the one asked for."""
    page = f"{names.endpoint()}/{name.repository}"
    status, code = response.status_code, response.headers.get("X-Error-Code")
    # Without a token the hub says 401 of what is not there: it does not tell what is private.
    invalid = response.headers.get("X-Error-Message") == _INVALID_TOKEN
    if code == "RevisionNotFound":
        reason = f"the repository has no revision {name.revision}"
    elif code == "RepoNotFound" or status == 404 or (status == 401 and not code and not invalid):
        reason = f"there is no such repository, or it is private (then HF_TOKEN helps): {page}"
    elif status in (401, 403):
        return denied(name.repository)
    else:
        later = "; try again later" if status == 429 or status >= 500 else ""
        return OSError(errno.EIO, f"the hub answered with HTTP status {status}{later}", page)
    return FileNotFoundError(errno.ENOENT, reason, name.repository)


def _file(name: Name, file: str, told: dict[str, Any], commit: str) -> RemoteFile:
    """A file the server told of, if it can be kept; its sum may be missing, but not be wrong."""
    place = Path(name.repository) / file
    try:
        names.check_parts(name.owner, name.repo, file)
    except ValueError as error:
        raise ModelFormatError(Path(name.repository), "file", None, str(error)) from None
    stored = told.get("lfs")  # only of files that git itself does not keep there is a SHA-256
    if not isinstance(stored, dict):
        stored = {"size": told.get("size")}
    sha256, size = stored.get("sha256"), stored.get("size")
    if "sha256" in stored and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
        reason = f"the hub tells {sha256!r}, which is no SHA-256 sum"
        raise ModelFormatError(place, "sha256", None, reason)
    if not isinstance(size, int) or size < 1:
        raise ModelFormatError(place, "size", None, f"the hub tells a size of {size!r} bytes")
    if name.short is not None:
        _check_known(name, file, sha256)
    path = quote(f"{name.repository}/resolve/{commit}/{file}")
    return RemoteFile(name.repository, file, f"{names.endpoint()}/{path}", size, sha256)


def _check_known(name: Name, file: str, sha256: str | None) -> None:
    """ModelFormatError where a short name would fetch something else than it is known for."""
    known = names.KNOWN_SHA256.get(file)
    if known is not None and sha256 != known:
        told = "nothing" if sha256 is None else f"{sha256[:12]}..."
        reason = (
            f"the hub has another file than the known one (SHA-256 {told}, not {known[:12]}...); "
            f"`cpuinfer pull {name.repository}:{names.type_in(file)}` takes it nevertheless"
        )
        raise ModelFormatError(Path(name.repository) / file, "sha256", None, reason)
