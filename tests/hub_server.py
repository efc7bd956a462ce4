"""A server on this computer that plays the Hugging Face hub and the place its files lie at.

The hub is http://127.0.0.1:PORT, the place of the files http://localhost:PORT: two hosts to a
client, as they are two in truth. Paths, headers and redirections are those of huggingface.co.
At the end: what a pull from it leaves in the store.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "cafe"

# What the tests ask for most.
REPOSITORY = "Some-One/Tiny-GGUF"
FILE = "tiny.Q4_K_M.gguf"
DATA = b"GGUF" + bytes(range(256)) * 1500  # enough to be sent in several pieces
SHA256 = hashlib.sha256(DATA).hexdigest()


@dataclass
class Request:
    """What a client asked for."""

    path: str
    headers: dict[str, str]  # names in small letters
    host: str


@dataclass
class Hub:
    """Repositories and their files; how the server fails is set by the tests."""

    port: int = 0
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)  # addresses of the hub that lead elsewhere
    requests: list[Request] = field(default_factory=list)
    # Changes of what the hub tells of a file, or of a whole repository.
    told: Callable[[dict[str, Any]], Any] = lambda document: document
    # Status and X-Error-Code instead of an answer, of the hub and of the files.
    api_error: tuple[int, str] | None = None
    error_message: str | None = None  # its X-Error-Message
    file_error: tuple[int, str] | None = None
    # Where the hub sends for a file, None: to the place of the files.
    location: str | None = None
    # Connections to cut, each after so many bytes of the body.
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    etag: str | None = '"first"'
    # Instead of sending a file.
    answer: Callable[["Handler", bytes], None] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def of_files(self) -> list[Request]:
        """What was asked of the place of the files."""
        return [request for request in self.requests if request.path.startswith("/lfs/")]

    def document(self, repository: str) -> Any:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
                "lfs": {
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 135,
                },
            }
            for name, data in self.repositories[repository].items()
        ]
        return self.told({"id": repository, "sha": COMMIT, "siblings": siblings, "tags": []})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(path, headers, headers["host"].partition(":")[0]))
        if path in self.hub.moved:
            self.send(307, b"", {"Location": self.hub.moved[path]})
        elif path.startswith("/api/models/"):
            self.tell(path.removeprefix("/api/models/"))
        elif path.startswith("/lfs/"):
            _, _, owner, repo, name = path.split("/", 4)
            data = self.hub.repositories[f"{owner}/{repo}"][name]
            (self.hub.answer or Handler.send_file)(self, data)
        else:
            owner, repo, _, _, name = path[1:].split("/", 4)
            self.redirect(f"{owner}/{repo}", name)

    def tell(self, repository: str) -> None:
        repository = repository.partition("/revision/")[0]
        if self.hub.api_error is not None:
            self.fail(*self.hub.api_error)
        elif repository not in self.hub.repositories:
            self.fail(401, "RepoNotFound")
        else:
            document = self.hub.document(repository)
            self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def redirect(self, repository: str, name: str) -> None:
        if self.hub.file_error is not None:
            self.fail(*self.hub.file_error)
            return
        data = self.hub.repositories[repository][name]
        place = f"http://localhost:{self.hub.port}/lfs/{repository}/{name}"
        headers = {
            "Location": self.hub.location or place,
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
        }
        self.send(302, b"", headers)

    def send_file(self, data: bytes) -> None:
        """The file, or the part of it that was asked for, and perhaps not to its end."""
        hub, start = self.hub, 0
        wanted = self.headers.get("Range")
        if wanted and hub.ranges and self.headers.get("If-Range", hub.etag) == hub.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Type": "binary/octet-stream"}
        if hub.etag is not None:
            headers["ETag"] = hub.etag
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = hub.cuts.pop(0) if hub.cuts else None
        self.send(206 if start else 200, data[start:], headers, cut)

    def fail(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code}
        if self.hub.error_message is not None:
            headers["X-Error-Message"] = self.hub.error_message
        self.send(status, b'{"error": "no"}', headers)

    def send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that goes away is none of our business."""
        if not isinstance(sys.exception(), ConnectionError):
            raise


@contextmanager
def running() -> Iterator[Hub]:
    """The hub, as long as the block lasts."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# What a pull leaves


def partial(target: Path) -> Path:
    return target.with_name(FILE + ".partial")


def left(target: Path) -> list[str]:
    """What is in the directory of the repository."""
    return sorted(path.name for path in target.parent.glob("*"))


def keep_part(target: Path, data: bytes, **changes: Any) -> None:
    """What an interrupted pull leaves, with changes of its record."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial(target).write_bytes(data)
    record = {"url": "x", "size": len(DATA), "sha256": SHA256, "etag": '"first"'} | changes
    partial(target).with_name(f"{FILE}.partial.json").write_text(json.dumps(record))
