"""Names of models, as people type them, and the model files of a repository.

A name is OWNER/REPO, a link to the hub, or one of SHORT_NAMES; after a colon the type of the
weights. Nothing here looks at a disk or at the network.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from urllib.parse import quote, unquote, urlsplit

from cpuinfer.gguf_errors import escape

ENDPOINT = "https://huggingface.co"

# Repositories in which others have put GGUF files of Mistral AI's models. Those without "base" are
# the Instruct models, which chat.
SHORT_NAMES = {
    "mistral": "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
    "mistral:v0.3": "bartowski/Mistral-7B-Instruct-v0.3-GGUF",
    "mistral:v0.2": "TheBloke/Mistral-7B-Instruct-v0.2-GGUF",
    "mistral:v0.1": "TheBloke/Mistral-7B-Instruct-v0.1-GGUF",
    "mistral-base": "MaziyarPanahi/Mistral-7B-v0.3-GGUF",
    "mistral-base:v0.3": "MaziyarPanahi/Mistral-7B-v0.3-GGUF",
    "mistral-base:v0.1": "TheBloke/Mistral-7B-v0.1-GGUF",
}

# What a short name is expected to fetch. Files that are not here are verified by the sum that the
# hub tells.
KNOWN_SHA256 = {
    "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf": (
        "1270d22c0fbb3d092fb725d4d96c457b7b687a5f5a715abe1e818da303e562b6"
    ),
    "mistral-7b-instruct-v0.2.Q4_K_M.gguf": (
        "3e0039fd0273fcbebb49228943b17831aadd55cbcbf56f0af00499be2040ccf9"
    ),
    "mistral-7b-v0.1.Q4_K_M.gguf": (
        "ce6253d2e91adea0c35924b38411b0434fa18fcb90c52980ce68187dbcbbe40c"
    ),
}

# Taken where no type is asked for: the first are small, and hardly worse than the original.
_PREFERRED = ("Q4_K_M", "Q4_0", "Q4_K_S", "Q5_K_M", "Q5_0", "Q5_K_S", "Q6_K", "Q8_0")

_OWNER_OR_REPO = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_NOT_IN_NAME = re.compile(r"\.\.|--|\.git$")  # the hub has no such repositories
_TYPE = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_TYPE_IN_NAME = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:(?:I?Q|TQ)[1-9]\w*|MXFP4\w*|BF16|FP?16|FP?32))$", re.I | re.ASCII
)
_FOREIGN_TYPE = re.compile(r"(?:UD-)?(?:IQ|TQ|MXFP)")  # of GGUF, but not of quant.ggml_types
_PART = re.compile(r"-[0-9]{5}-of-(?P<count>[0-9]{5})$")
# Files beside a model that are no models: image encoders and importance matrices.
_BESIDE = re.compile(r"mmproj|imatrix", re.I)

MAX_COMPONENT_BYTES = 200  # of 255, which leaves room for what is put behind a name


@dataclass(frozen=True)
class Name:
    """A model on the hub: its repository, and its type, its file, or neither."""

    owner: str
    repo: str
    qtype: str | None = None
    file: str | None = None
    revision: str = "main"
    short: str | None = None

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.repo}"

    def __str__(self) -> str:
        """As it can be typed."""
        if self.revision != "main":
            place = f"{ENDPOINT}/{self.repository}"
            if self.file is None:
                return f"{place}/tree/{self.revision}"
            return f"{place}/blob/{self.revision}/{quote(self.file)}"
        name = self.short or self.repository
        if self.file is not None:
            return f"{name}/{self.file}"
        return name if self.qtype is None else f"{name}:{self.qtype}"


@dataclass(frozen=True)
class Build:
    """A model in one type: its file in a repository, or its parts in order."""

    files: tuple[str, ...]
    qtype: str | None  # as the file's name says, in capitals

    @property
    def missing_parts(self) -> int:
        found = _PART.search(_stem(self.files[0]))
        return int(found["count"]) - len(self.files) if found else 0


def endpoint() -> str:
    """The hub's address, without a slash at its end."""
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def parse(text: str) -> Name:
    """A name as it was typed; ValueError for what is none."""
    found = _parse_short(text)
    if found is not None:
        return found
    rest, linked = _without_host(text)
    parts = (unquote(rest) if linked else rest).split("/")
    revision = "main"
    if linked and len(parts) > 4 and parts[2] in ("blob", "resolve", "raw"):
        revision, parts = parts[3], parts[:2] + parts[4:]
    elif linked and len(parts) == 4 and parts[2] == "tree":
        revision, parts = parts[3], parts[:2]
    if len(parts) < 2 or (len(parts) > 2 and not parts[-1].lower().endswith(".gguf")):
        raise _unknown(text)
    owner, (repo, colon, qtype) = parts[0], parts[1].partition(":")
    file = "/".join(parts[2:]) or None
    if colon and (file is not None or not _TYPE.fullmatch(qtype)):
        raise ValueError(f"{escape(text)}: {escape(qtype)!r} is no type such as Q4_K_M")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ValueError(f"{escape(text)}: {escape(revision)!r} is no revision")
    check_parts(owner, repo, file)
    return Name(owner, repo, qtype.upper() or None, file, revision)


def _parse_short(text: str) -> Name | None:
    """SHORT or SHORT:TYPE."""
    short, qtype = text.lower(), None
    if short not in SHORT_NAMES:
        short, _, rest = short.rpartition(":")
        if short not in SHORT_NAMES:
            return None
        if not _TYPE.fullmatch(rest):
            raise _unknown(text)
        qtype = rest.upper()
    owner, _, repo = SHORT_NAMES[short].partition("/")
    return Name(owner, repo, qtype, short=short)


def _without_host(text: str) -> tuple[str, bool]:
    """The path of a link, and whether it is one; ValueError for links to other places."""
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", host_of(endpoint())} - {""}
    if text.lower().startswith(("https://", "http://")):
        if host_of(text) not in hosts:
            raise ValueError(f"{escape(text)} is no link to {escape(endpoint())}")
        return urlsplit(text).path.strip("/"), True
    host, _, rest = text.partition("/")
    return (rest.strip("/"), True) if host.lower() in hosts else (text, False)


def host_of(link: str) -> str:
    """The host of a link, with its port if there is one; "" where there is none to find."""
    try:
        return urlsplit(link).netloc.lower()
    except ValueError:
        return ""


def _unknown(text: str) -> ValueError:
    near = close_to(text, SHORT_NAMES)
    meant = "near" if near else "there are OWNER/REPO[:TYPE] and the short names"
    known = ", ".join(near or SHORT_NAMES)
    return ValueError(f"{escape(text)} is no name of a model; {meant}: {known}")


def close_to(text: str, known: Iterable[str]) -> list[str]:
    """Those that `text` may be a misspelling of, whatever the case of the letters."""
    lowered = {name.lower(): name for name in known}
    return [lowered[near] for near in get_close_matches(text.lower(), lowered, n=4, cutoff=0.6)]


def check_parts(owner: str, repo: str, file: str | None) -> None:
    """ValueError for what must not become a part of a path or of an address."""
    for part in (owner, repo):
        if not _OWNER_OR_REPO.fullmatch(part) or _NOT_IN_NAME.search(part):
            raise ValueError(f"{escape(f'{owner}/{repo}')} is no name of a repository")
    for part in () if file is None else file.split("/"):
        if (
            not part.isprintable()
            or part.startswith(".")
            or part != part.strip()
            or any(character in part for character in '\\:*?"<>|')
            or len(part.encode()) > MAX_COMPONENT_BYTES
            or not part
        ):
            raise ValueError(f"{escape(str(file))} is no name of a file to keep")


# The files of a repository


def builds(files: Iterable[str]) -> list[Build]:
    """The models among the files of a repository, in the order of their names."""
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and not _BESIDE.search(file.rpartition("/")[2]):
            # Parts of one model have the same name but for their number.
            groups.setdefault(_PART.sub(r"-of-\g<count>", _stem(file)), []).append(file)
    return [Build(tuple(group), type_in(group[0])) for group in groups.values()]


def _stem(file: str) -> str:
    return file[: -len(".gguf")]


def type_in(file: str) -> str | None:
    """The type of the weights that the name of a GGUF file tells, in capitals."""
    found = _TYPE_IN_NAME.search(_PART.sub("", _stem(file)))
    return found[1].upper() if found else None


def computable(qtype: str | None) -> bool:
    """Whether models of this type can run here, as far as its name tells."""
    return qtype is None or not _FOREIGN_TYPE.match(qtype)


def choose(among: Sequence[Build], name: Name) -> Build:
    """The one that `name` asks for, or the preferred one; LookupError says what there is."""
    if name.file is not None:
        asked = [build for build in among if name.file in build.files]
        if not asked:
            raise LookupError(f"there is no {escape(name.file)}; there are {_listed(among)}")
        return asked[0]
    wanted = _PREFERRED if name.qtype is None else (name.qtype,)
    for qtype in wanted:
        found = [build for build in among if build.qtype == qtype]
        if len(found) > 1:
            names = ", ".join(f"{name.repository}/{escape(build.files[0])}" for build in found)
            raise LookupError(f"there is more than one of type {qtype}: {names}")
        if found:
            return found[0]
    if name.qtype is not None:
        raise LookupError(f"there is no type {name.qtype}; there are {_listed(among)}")
    return among[0]


def _listed(among: Sequence[Build]) -> str:
    return ", ".join(build.qtype or escape(build.files[0]) for build in among)
