"""A file that comes in pieces: cut connections, later pulls, parts of others (T20, T25)."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import child, run
from hub_server import DATA, FILE, REPOSITORY, Handler, Hub, keep_part, left, partial

from cpuinfer.hub import download, names, pull

pytest_plugins = ["hub_fixtures"]


@pytest.mark.parametrize("etag", ['"first"', None, 'W/"weak"'])
def test_a_cut_connection_goes_on_where_it_ended(
    etag: str | None, hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T20
    hub.cuts, hub.etag = [100_000, 50_000], etag
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == DATA
    ranges = [request.headers.get("range") for request in hub.of_files]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    strong = etag if etag == '"first"' else None
    assert [request.headers.get("if-range") for request in hub.of_files] == [None, strong, strong]


def test_a_bad_line_is_no_reason_to_give_up_while_something_comes(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.cuts = [10_000] * (len(download.WAITS) + 3)
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == DATA


def test_a_later_pull_goes_on_too(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T20
    hub.cuts = [100_000, 0, 0, 0]
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 74
    assert "100000 of 384004 bytes are kept for the next pull" in result.err
    assert left(target) == [f"{FILE}.partial", f"{FILE}.partial.json"]
    listed = run(capsys, "list")
    assert "incomplete" in listed.out and "97.7 KiB" in listed.out
    hub.requests.clear()
    report = json.loads(run(capsys, "pull", REPOSITORY, "--json").out)
    assert report["fetched"] == len(DATA) - 100_000
    assert target.read_bytes() == DATA and left(target) == [FILE, f"{FILE}.json"]
    headers = hub.of_files[0].headers
    assert (headers["range"], headers["if-range"]) == ("bytes=100000-", '"first"')


def test_what_has_come_whole_is_only_verified(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_part(target, DATA)
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == DATA and hub.of_files == []


def test_a_server_that_ignores_ranges_begins_again(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T21
    hub.cuts, hub.ranges = [100_000], False
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == DATA and len(hub.of_files) == 2


def test_progress_never_goes_backwards(hub: Hub, target: Path) -> None:
    from cpuinfer.hub import remote

    hub.cuts, hub.ranges = [300_000, 200_000], False
    seen: list[tuple[str, int, int]] = []
    model = remote.find(names.parse(REPOSITORY))
    pull.pull(model, lambda *report: seen.append(report), pytest.fail)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("download", len(DATA), len(DATA))


@pytest.mark.parametrize("honest", [True, False])
def test_a_part_of_another_file_is_thrown_away(
    honest: bool, hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T21: the etag changed
    keep_part(target, b"GGUF" + bytes(99_996), etag='"old"')
    if not honest:  # a server that does not look at If-Range

        def answer(handler: Handler, data: bytes) -> None:
            del handler.headers["If-Range"]
            Handler.send_file(handler, data)

        hub.answer = answer
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == DATA


def test_a_range_that_is_not_there_is_verified_and_removed(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_part(target, DATA[:100_000])
    hub.answer = lambda handler, data: handler.send(416, b"", {})
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 65 and "100000 bytes, not 384004" in result.err
    assert not target.parent.exists()


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (b"GGUF" + bytes(99_996), {"sha256": "0" * 64}),
        (b"GGUF" + bytes(99_996), {"size": 7}),
        (DATA + b"more", {}),
        (DATA + b"more", {"sha256": "0" * 64}),
        (b"GGUF" + bytes(99_996), {"surprise": 1}),
        (b"GGUF" + bytes(99_996), {"etag": 5}),
    ],
)
def test_parts_that_do_not_belong_are_thrown_away(
    data: bytes,
    changes: dict[str, Any],
    hub: Hub,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # T25
    keep_part(target, data, **changes)
    report = json.loads(run(capsys, "pull", REPOSITORY, "--json").out)
    assert report["fetched"] == len(DATA)
    assert target.read_bytes() == DATA and left(target) == [FILE, f"{FILE}.json"]
    assert "range" not in hub.of_files[0].headers


def test_a_part_without_a_record_is_thrown_away(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T25
    target.parent.mkdir(parents=True)
    partial(target).write_bytes(b"GGUF" + bytes(99_996))
    assert run(capsys, "pull", REPOSITORY).code == 0 and target.read_bytes() == DATA


@pytest.mark.parametrize(("size", "room"), [(len(DATA), 100_000), (5000, 3000)])
def test_a_disk_that_is_full(
    size: int, room: int, hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = hub.repositories[REPOSITORY][FILE] = DATA[:size]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    full = child("pull", REPOSITORY, first=limit)
    assert full.returncode == 74 and full.stderr.count(b"\n") == 1
    assert b"File too large; what has come is kept for the next pull" in full.stderr
    assert partial(target).read_bytes() == DATA[:room]
    assert run(capsys, "pull", REPOSITORY).code == 0 and target.read_bytes() == data
