"""What the hub tells of a repository: nonsense, refusals, and what it must not say (T24)."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import run
from hub_server import COMMIT, DATA, FILE, REPOSITORY, SHA256, Hub

from cpuinfer.hub import names, remote

pytest_plugins = ["hub_fixtures"]


@pytest.mark.parametrize(
    "sha256",
    ["sha256:../../x", SHA256[:-1], SHA256 + "0", SHA256.upper(), "", f" {SHA256}", 12, [SHA256]],
)
def test_sums_that_are_none(
    sha256: Any, hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T24
    def told(document: dict[str, Any]) -> Any:
        document["siblings"][1]["lfs"]["sha256"] = sha256
        return document

    hub.told = told
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (65, 1) and "no SHA-256" in result.err
    assert hub.of_files == [] and not target.parent.exists()


@pytest.mark.parametrize(
    "file",
    [
        "../../../x.gguf",
        "/tmp/x.gguf",
        "a/../x.gguf",
        "a//x.gguf",
        "a\\x.gguf",
        "a\nb.gguf",
        "\x1b[2J.gguf",
        "x" * 300 + ".gguf",
        "\ud800.gguf",
    ],
)
def test_names_of_files_that_are_refused(
    file: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T24
    def told(document: dict[str, Any]) -> Any:
        document["siblings"][1]["rfilename"] = file
        return document

    hub.told = told
    before = sorted(tmp_path.rglob("*"))
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (65, 1) and "no name of a file" in result.err
    assert "\x1b" not in result.err
    made = set(tmp_path.rglob("*")) - set(before)
    assert {path.name for path in made} <= {"data", "cpuinfer", "models"}


@pytest.mark.parametrize("size", [-1, 0, "many", None, 1.5])
def test_sizes_that_are_none(size: Any, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    def told(document: dict[str, Any]) -> Any:
        document["siblings"][1]["lfs"]["size"] = size
        return document

    hub.told = told
    assert run(capsys, "pull", REPOSITORY).code == 65


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "text",
        None,
        {"id": 1},
        {"siblings": None},
        {"siblings": [{}]},
        {"siblings": 4},
        {"siblings": [{"rfilename": 5}]},
        {"siblings": [{"rfilename": "a.gguf", "lfs": 5}]},
    ],
)
def test_answers_of_the_hub_that_make_no_sense(
    answer: Any, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.told = lambda document: answer
    result = run(capsys, "pull", REPOSITORY)
    assert result.code in (65, 74) and result.err.count("\n") == 1
    assert hub.of_files == []


def test_without_a_sum_the_size_is_verified_and_that_is_said(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(document: dict[str, Any]) -> Any:
        del document["siblings"][1]["lfs"]
        return document

    hub.told = told
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 0 and "no SHA-256" in result.err and target.read_bytes() == DATA


def test_a_short_name_is_one_certain_file(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner_repo = names.SHORT_NAMES["mistral:v0.2"]
    file = "mistral-7b-instruct-v0.2.Q4_K_M.gguf"
    hub.repositories[owner_repo] = {file: DATA}
    result = run(capsys, "pull", "mistral:v0.2")
    assert result.code == 65 and f"cpuinfer pull {owner_repo}:Q4_K_M" in result.err
    assert hub.of_files == []
    monkeypatch.setitem(names.KNOWN_SHA256, file, SHA256)
    assert run(capsys, "pull", "mistral:v0.2").code == 0


@pytest.mark.parametrize(
    ("error", "of_file", "code", "said"),
    [
        ((401, "GatedRepo"), False, 66, "accept the licence at http://127.0.0.1"),
        ((403, "GatedRepo"), True, 66, "HF_TOKEN"),
        ((401, ""), True, 66, "HF_TOKEN"),
        ((403, ""), False, 66, "HF_TOKEN"),
        ((404, "RepoNotFound"), False, 66, "no such repository"),
        ((401, "RepoNotFound"), False, 66, "it is private"),
        ((404, "RevisionNotFound"), False, 66, "no revision"),
        ((500, ""), False, 74, "HTTP status 500"),
        ((429, ""), False, 74, "HTTP status 429"),
    ],
)
def test_refusals_of_the_hub(
    error: tuple[int, str],
    of_file: bool,
    code: int,
    said: str,
    hub: Hub,
    target: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if of_file:
        hub.file_error = error
    else:
        hub.api_error = error
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (code, 1) and said in result.err
    assert not target.parent.exists()


def test_a_repository_without_gguf_files(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories["o/r"] = {"model.safetensors": b"x"}
    result = run(capsys, "pull", "o/r")
    assert result.code == 66 and "cpuinfer convert" in result.err


def test_an_answer_without_end(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "_MAX_ANSWER_BYTES", 10_000)
    assert run(capsys, "pull", REPOSITORY).code == 0
    hub.told = lambda document: document | {"tags": ["x" * 20_000]}
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (74, 1) and "does not end" in result.err


def test_a_token_that_is_not_valid_any_more(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.api_error = (401, "")
    hub.error_message = "Invalid credentials in Authorization header"
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (66, 1)
    assert "is your token (HF_TOKEN" in result.err and "still valid" in result.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_ü"),
        ("HF_TOKEN", "hf_\x1b"),
        ("HF_ENDPOINT", "nonsense"),
        ("HF_ENDPOINT", "ftp://127.0.0.1"),
        ("HF_ENDPOINT", "http://["),
        ("HF_ENDPOINT", "https://"),
    ],
)
def test_settings_that_cannot_be_used(
    name: str,
    value: str,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"cpuinfer: {name} ") and hub.requests == []


def test_a_revision_is_asked_for_and_fetched(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.told = lambda document: document | {"sha": None}
    link = f"https://huggingface.co/{REPOSITORY}/tree/v1"
    report = json.loads(run(capsys, "pull", link, "--json").out)
    assert report["name"] == f"{REPOSITORY}:Q4_K_M"
    assert [request.path for request in hub.requests[:2]] == [
        f"/api/models/{REPOSITORY}/revision/v1",
        f"/{REPOSITORY}/resolve/v1/{FILE}",
    ]


def test_a_repository_that_moved(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.moved["/api/models/Old/Name"] = f"/api/models/{REPOSITORY}"
    hub.moved[f"/Old/Name/resolve/{COMMIT}/{FILE}"] = f"/{REPOSITORY}/resolve/{COMMIT}/{FILE}"
    assert run(capsys, "pull", "Old/Name").code == 0
    hub.moved["/api/models/To/Strangers"] = f"http://localhost:{hub.port}/api/models/{REPOSITORY}"
    hub.repositories["To/Strangers"] = hub.repositories[REPOSITORY]
    hub.requests.clear()
    assert run(capsys, "pull", "To/Strangers").code == 0
    first, second = hub.requests[:2]
    assert (first.host, second.host) == ("127.0.0.1", "localhost")
    assert "authorization" in first.headers and "authorization" not in second.headers
