"""pull, list, rm and show, as a person uses them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import DEMO, Result, environment, run
from hub_server import COMMIT, DATA, FILE, REPOSITORY, Hub, keep_part, left, running

import cpuinfer
from cpuinfer import machine

pytest_plugins = ["hub_fixtures"]


def test_a_pull(hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{REPOSITORY}:Q4_K_M is here: 375.0 KiB, {target.resolve()}\n"
    assert target.read_bytes() == DATA and left(target) == [FILE, f"{FILE}.json"]
    told, asked, fetched = hub.requests  # and nothing else is told to anybody
    agents = {request.headers["user-agent"] for request in hub.requests}
    assert agents == {f"cpuinfer/{cpuinfer.__version__}"}
    assert told.path == f"/api/models/{REPOSITORY}"
    assert asked.path == f"/{REPOSITORY}/resolve/{COMMIT}/{FILE}"
    assert fetched.headers["accept-encoding"] == "identity" and "range" not in fetched.headers
    # What is complete is not fetched again.
    report = json.loads(run(capsys, "pull", REPOSITORY, "--json").out)
    assert report == {
        "name": f"{REPOSITORY}:Q4_K_M",
        "files": [str(target.resolve())],
        "type": "Q4_K_M",
        "bytes": len(DATA),
        "fetched": 0,
        "verified": True,
    }
    assert len(hub.of_files) == 1


def test_the_choice_is_said(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[REPOSITORY]["tiny.Q2_K.gguf"] = DATA
    assert run(capsys, "pull", REPOSITORY).err == "cpuinfer: Q4_K_M is taken; there are also Q2_K\n"
    assert run(capsys, "pull", f"{REPOSITORY}:Q2_K").err == ""
    result = run(capsys, "pull", f"{REPOSITORY}:Q5_0")
    assert result.code == 66 and "no type Q5_0; there are Q2_K, Q4_K_M" in result.err


def test_a_file_that_changed_on_the_hub_is_pulled_again(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "pull", REPOSITORY)
    new = DATA[:-1] + b"!"
    hub.repositories[REPOSITORY][FILE] = new
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert target.read_bytes() == new


def test_a_split_model_is_pulled_whole_and_runs(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "demo.Q8_0"
    assert run(capsys, "split", DEMO, prefix, "--max-size", "2M").code == 0
    parts = sorted(tmp_path.glob("demo*.gguf"))
    assert len(parts) == 3
    hub.repositories[REPOSITORY] = {f"Q8_0/{part.name}": part.read_bytes() for part in parts}
    report = json.loads(run(capsys, "pull", REPOSITORY, "--json").out)
    assert [Path(file).name for file in report["files"]] == [part.name for part in parts]
    argv = ["-p", "Once upon", "-n", "8", "--seed", "1"]
    pulled, whole = run(capsys, "generate", REPOSITORY, *argv), run(capsys, "generate", DEMO, *argv)
    assert pulled == whole and whole.code == 0
    shown = json.loads(run(capsys, "show", REPOSITORY, "--json").out)
    assert shown["sha256"] == [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
    del hub.repositories[REPOSITORY][f"Q8_0/{parts[1].name}"]
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 66 and "1 parts" in result.err


def test_a_disk_that_is_too_small(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = len(DATA) - 1
    usage = shutil.disk_usage(".")._replace
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=free))
    result = run(capsys, "pull", REPOSITORY)
    assert (
        result.code == 74
        and "375.0 KiB are still to be pulled" in result.err
        and "XDG_DATA_HOME" in result.err
    )
    assert hub.of_files == [] and not target.parent.exists()
    keep_part(target, DATA[:100_000])  # then less is enough
    free = len(DATA) - 100_000
    assert run(capsys, "pull", REPOSITORY).code == 0


def test_a_memory_that_is_too_small(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_total", lambda: len(DATA) - 1)
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 75 and "more than the memory of this computer" in result.err
    assert hub.of_files == []
    result = run(capsys, "pull", REPOSITORY, "--force")
    assert result.code == 0 and "warning: the model has 375.0 KiB, more than" in result.err
    monkeypatch.setattr(machine, "memory_total", lambda: len(DATA))
    monkeypatch.setattr(machine, "memory_available", lambda: len(DATA) - 1)
    result = run(capsys, "pull", REPOSITORY)
    assert result.code == 0 and "warning" in result.err and "free now" in result.err


def test_offline(
    hub: Hub, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPOSITORY][FILE] = DEMO.read_bytes()
    assert run(capsys, "pull", REPOSITORY).code == 0
    with running() as gone:
        nobody = gone.endpoint
    for reason, name, value in (
        ("cannot be reached", "HF_ENDPOINT", nobody),
        ("HF_HUB_OFFLINE", "HF_HUB_OFFLINE", "1"),
    ):
        monkeypatch.setenv(name, value)
        script = "import sys; from cpuinfer.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", script, "pull", "mistral"]
        child = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert (child.returncode, child.stderr.count("\n")) == (74, 1) and reason in child.stderr
        assert f"; on this computer there is {REPOSITORY}:Q4_K_M\n" in child.stderr
        command[-1] = REPOSITORY.lower()
        child = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert child.returncode == 74
        assert f"; {REPOSITORY.lower()} is on this computer and runs without it\n" in child.stderr
    result = run(capsys, "generate", REPOSITORY, "-p", "Once upon", "-n", "3")
    assert (result.code, result.err) == (0, "")


def test_list(hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "list")
    assert (result.code, result.out) == (0, "") and "cpuinfer pull mistral" in result.err
    assert json.loads(run(capsys, "list", "--json").out) == []
    run(capsys, "pull", REPOSITORY)
    os.utime(target, (1_700_000_000, 1_700_000_000))
    result = run(capsys, "list")
    assert result.out.startswith(f"{REPOSITORY}:Q4_K_M  Q4_K_M    375.0 KiB  2023-11-1")
    (entry,) = json.loads(run(capsys, "list", "--json").out)
    assert entry.pop("modified").startswith("2023-11-1")
    assert entry == {
        "name": f"{REPOSITORY}:Q4_K_M",
        "type": "Q4_K_M",
        "bytes": len(DATA),
        "complete": True,
        "files": [str(target)],
    }


def test_names_of_strangers_in_the_store_are_escaped(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.parent.mkdir(parents=True)
    (target.parent / "\x1b[2Jx.gguf").write_bytes(b"x")
    (target.parent / "gone.gguf").symlink_to("nowhere")
    result = run(capsys, "list")
    assert result.code == 0 and "\\x1b[2Jx.gguf" in result.out and "\x1b" not in result.out


def test_rm(hub: Hub, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[REPOSITORY]["tiny.Q8_0.gguf"] = DATA
    run(capsys, "pull", REPOSITORY)
    run(capsys, "pull", f"{REPOSITORY}:Q8_0")
    result = run(capsys, "rm", REPOSITORY)
    assert result.code == 2 and f"{REPOSITORY}:Q4_K_M, {REPOSITORY}:Q8_0" in result.err
    keep_part(target, DATA[:1000])
    result = run(capsys, "rm", f"{REPOSITORY}:Q4_K_M")
    assert result == Result(0, result.out, "") and "KiB are free again" in result.out
    assert left(target) == ["tiny.Q8_0.gguf", "tiny.Q8_0.gguf.json"]
    freed = json.loads(run(capsys, "rm", target.parent / "tiny.Q8_0.gguf", "--json").out)["freed"]
    assert freed > len(DATA) and not target.parents[1].exists()
    assert run(capsys, "rm", REPOSITORY).code == 66
    other = tmp_path / "mine.gguf"
    other.write_bytes(DATA)
    result = run(capsys, "rm", other)
    assert result.code == 2 and "left there" in result.err and other.exists()
    assert run(capsys, "rm", "../mine.gguf").code == 66


@pytest.mark.parametrize(
    ("name", "near"),
    [("tiny-GUF", True), (f"{REPOSITORY}:Q4_K_S", True), ("mistral", False), ("thing", False)],
)
def test_rm_of_what_is_not_there(
    name: str, near: bool, hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "pull", REPOSITORY)
    result = run(capsys, "rm", name)
    assert (result.code, result.err.count("\n")) == (66, 1) and target.exists()
    assert (f"; near: {REPOSITORY}:Q4_K_M; " in result.err) == near
    assert "`cpuinfer list` shows" in result.err


def test_a_type_that_does_not_run_here(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repositories[REPOSITORY]["tiny.IQ4_XS.gguf"] = DATA
    result = run(capsys, "pull", f"{REPOSITORY}:IQ4_XS")
    assert (result.code, result.err.count("\n")) == (2, 1) and hub.of_files == []
    assert "do not run here; there are Q4_K_M; --force" in result.err
    assert run(capsys, "pull", f"{REPOSITORY}:IQ4_XS", "--force").code == 0


def test_a_store_that_cannot_be_made(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    result = run(capsys, "pull", REPOSITORY)
    assert (result.code, result.err.count("\n")) == (73, 1)
    assert "models cannot be kept here" in result.err and "XDG_DATA_HOME" in result.err


def test_show(hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DEMO.read_bytes()
    hub.repositories[REPOSITORY] = {"demo.Q8_0.gguf": data}
    run(capsys, "pull", REPOSITORY)
    report = json.loads(run(capsys, "show", REPOSITORY, "--json").out)
    path = target.with_name("demo.Q8_0.gguf")
    assert report == {
        "name": "cpuinfer demo",
        "architecture": "llama",
        "parameters": 3_541_248,
        "context_length": 2048,
        "sliding_window": 128,
        "embedding_length": 256,
        "quantization": "Q8_0",
        "template": "the file's own",
        "license": "apache-2.0",
        "runs": True,
        "reason": None,
        "files": [str(path)],
        "bytes": len(data),
        "sha256": [hashlib.sha256(data).hexdigest()],
    }
    path.write_bytes(data + b"other")
    assert json.loads(run(capsys, "show", REPOSITORY, "--json").out)["sha256"] == [None]
    lines = run(capsys, "show", DEMO).out.splitlines()
    assert "license           apache-2.0" in lines
    assert "sha256            not known, since it was not pulled" in lines
