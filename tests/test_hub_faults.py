"""Servers that send something else than the file: pages, other files, endless bodies (T21, T22)."""

import os
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from command import run
from hub_server import DATA, FILE, REPOSITORY, SHA256, Handler, Hub, keep_part, partial

from cpuinfer.hub import network

pytest_plugins = ["hub_fixtures"]


def wrong_length(handler: Handler, data: bytes) -> None:
    handler.send(200, data[:1000], {"ETag": '"first"'})


def wrong_part(handler: Handler, data: bytes) -> None:
    handler.send(206, data[5:], {"Content-Range": f"bytes 5-{len(data) - 1}/{len(data)}"})


def gzipped(handler: Handler, data: bytes) -> None:
    handler.send(200, data, {"Content-Encoding": "gzip"})


def gone(handler: Handler, data: bytes) -> None:
    handler.send(404, b"", {})


def teapot(handler: Handler, data: bytes) -> None:
    handler.send(418, b"", {})


def busy(handler: Handler, data: bytes) -> None:
    handler.send(503, b"", {})


def page(handler: Handler, data: bytes) -> None:
    body = b"<!DOCTYPE html><title>Welcome to the hotel</title>"
    handler.send(200, body, {"Content-Type": "text/html; charset=utf-8"})


def hidden_page(handler: Handler, data: bytes) -> None:
    body = b"<!DOCTYPE html><title>Welcome to the hotel</title>".ljust(len(data))
    handler.send(200, body, {})


def other_format(handler: Handler, data: bytes) -> None:
    handler.send(200, b"PK\x03\x04".ljust(len(data)), {})


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (wrong_length, 74, "384004 bytes, and tells of 1000"),
        (wrong_part, 74, "a part of another file"),
        (gzipped, 74, "gzip encoding"),
        (gone, 66, "any more"),
        (teapot, 74, "HTTP status 418"),
        (busy, 74, "HTTP status 503"),
        (page, 65, "web page"),
        (hidden_page, 65, "web page"),
        (other_format, 65, "ZIP archive"),
    ],
)
def test_answers_that_are_not_the_file(
    answer: Callable[[Handler, bytes], None],
    code: int,
    said: str,
    hub: Hub,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # T21
    hub.answer = answer
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1)
    assert said in result.err
    assert not target.parents[1].exists()  # nothing stays behind


@pytest.mark.parametrize("answer", [page, wrong_length, gzipped, teapot])
def test_a_page_in_place_of_the_rest_does_not_cost_what_has_come(
    answer: Callable[[Handler, bytes], None],
    hub: Hub,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep_part(target, DATA[:100_000])
    hub.answer = answer
    assert run(capsys, "pull", REPOSITORY).code in (65, 74)
    assert partial(target).read_bytes() == DATA[:100_000]


def test_what_is_no_model_is_known_by_its_first_bytes(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPOSITORY][FILE] = b"PK\x03\x04".ljust(100_000)
    hub.cuts = [1000]
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 65 and "ZIP archive" in result.err and len(hub.of_files) == 1


def test_a_body_without_end_is_not_read_to_its_end(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T21
    sent = 0

    def endless(handler: Handler, data: bytes) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for sent in range(0, 2 * 10**8, 100_000):
                body = data[sent : sent + 100_000].ljust(100_000)
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(body), body))
        except OSError:
            handler.close_connection = True

    hub.answer = endless
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == DATA and sent < 10**8


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1", "/Some-One/x/resolve/main/x"],
)
def test_redirections_that_are_not_followed(
    location: str, hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T21
    hub.location = location
    if location.startswith("/"):  # in a circle
        hub.location = f"/{REPOSITORY}/resolve/main/{FILE}"
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (74, 1) and "sends us on" in result.err
    assert not target.parent.exists()


def test_https_does_not_lead_to_http() -> None:
    secure = httpx2.URL("https://hub.example/x")
    with pytest.raises(OSError, match="refused"):
        network._next(secure, "http://hub.example/y")
    assert str(network._next(secure, "//u:p@cdn.example/y")) == "https://cdn.example/y"


def test_a_server_without_tls(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # T21
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("http:", "https:"))
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 74 and "SSL" in result.err


def test_the_token_goes_to_the_hub_alone(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # T21
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run(capsys, "pull", REPOSITORY).code == 0
    sent = {request.host: "authorization" in request.headers for request in hub.requests}
    assert sent == {"127.0.0.1": True, "localhost": False}
    assert "hf_secret" not in str(hub.of_files)


def test_a_wrong_sum(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # T22
    named: list[str] = []
    replace = os.replace

    def watched(old: Path, new: Path) -> None:
        named.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", watched)
    hub.answer = lambda handler, data: handler.send(200, data[:-1] + b"!", {})
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 65 and SHA256 in result.err and "pulled again" in result.err
    assert FILE not in named and not target.parent.exists()


def test_no_directories_stay_behind(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPOSITORY] = {"sub/a.Q8_0.gguf": DATA}
    hub.answer = teapot
    assert run(capsys, "pull", REPOSITORY).code == 74
    assert not target.parents[1].exists()
