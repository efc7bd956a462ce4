"""Models on this computer: where they are, their names, and two processes at once (T23)."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from command import DEMO, environment, run
from hub_server import DATA, FILE, REPOSITORY, Hub, keep_part, left, partial

from cpuinfer import directories
from cpuinfer.hub import names, store

pytest_plugins = ["hub_fixtures"]


def test_no_path_leaves_the_store(hub: Hub, target: Path, tmp_path: Path) -> None:
    assert store.path_of(REPOSITORY, FILE) == target.resolve()
    for file in ("../x.gguf", "/x.gguf", "a/../../../x.gguf", "a\0.gguf", ""):
        with pytest.raises(ValueError):
            store.path_of(REPOSITORY, file)
    (tmp_path / "data/cpuinfer/models/away").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leaves"):
        store.path_of("away/x", "x.gguf")


def test_the_data_directory_is_the_users_alone(tmp_path: Path, hub: Hub) -> None:
    assert directories.data_directory() == tmp_path / "data/cpuinfer"
    for path in (directories.data_directory(), store.directory()):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_file_runs_in_place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mistral").write_bytes(b"x")  # a path goes before a name
    assert store.resolve("mistral") == Path("mistral")
    assert store.resolve(str(DEMO)) == DEMO


def test_pulled_models_are_found_by_their_names(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[REPOSITORY]["tiny.Q8_0.gguf"] = DATA
    mistral = names.SHORT_NAMES["mistral:v0.1"]
    hub.repositories[mistral] = {"mistral-7b.Q8_0.gguf": DATA}
    for name in (REPOSITORY, f"{REPOSITORY}:q8_0", "mistral:v0.1"):
        assert run(capsys, "pull", name).code == 0
    models = target.parents[2]
    for name, path in {
        REPOSITORY: REPOSITORY + "/" + FILE,
        REPOSITORY.lower() + ":q4_k_m": REPOSITORY + "/" + FILE,
        REPOSITORY + ":Q8_0": REPOSITORY + "/tiny.Q8_0.gguf",
        f"https://hf.co/{REPOSITORY}/blob/main/tiny.Q8_0.gguf": REPOSITORY + "/tiny.Q8_0.gguf",
        "mistral:v0.1": mistral + "/mistral-7b.Q8_0.gguf",
        "mistral:v0.1:Q8_0": mistral + "/mistral-7b.Q8_0.gguf",
        mistral: mistral + "/mistral-7b.Q8_0.gguf",
    }.items():
        assert store.resolve(name) == models / path
    requests = len(hub.requests)
    store.resolve(REPOSITORY)
    assert len(hub.requests) == requests  # nobody is asked for what is here


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mistrl", ["no such file or model", "near: mistral,", "cpuinfer pull mistral"]),
        ("mistral:v0.2", ["not on this computer", "`cpuinfer pull mistral:v0.2` fetches"]),
        ("mistral:Q8_0", ["`cpuinfer pull mistral:Q8_0` fetches"]),
        ("Some-One/Tiny-GUF", ["cpuinfer pull Some-One/Tiny-GUF", f"near: {REPOSITORY}:Q4_K_M"]),
        ("dir/modle.gguf", ["No such file or directory; near: dir/model.gguf"]),
        ("dir/medal.gguf", ["No such file or directory; near: dir/model.gguf\n"]),  # a dead link
        ("dir/other", ["cpuinfer pull dir/other"]),
        ("/nowhere/at/all", ["No such file or directory"]),
        ("Half/Half", ["the download is not complete; `cpuinfer pull Half/Half` goes on"]),
        ("dir", ["Is a directory\n"]),
        ("mistral", ["Is a directory, and not pulled yet (cpuinfer pull mistral)"]),
        ("Tiny-GGUF", [f"near: {REPOSITORY}:Q4_K_M; `cpuinfer list`"]),
    ],
)
def test_models_that_are_not_there(
    name: str,
    said: list[str],
    hub: Hub,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target.parent.mkdir(parents=True)
    target.write_bytes(DATA)
    half = target.parents[2] / "Half/Half/a.gguf.partial"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    Path("dir").mkdir()
    Path("mistral").mkdir()
    Path("dir/model.gguf").write_bytes(b"x")
    Path("dir/medal.gguf").symlink_to("nowhere")
    for argv in (
        ["generate", name, "-p", "x"],
        ["inspect", name],
        ["show", name],
        ["warmup", name],
    ):
        result = run(capsys, *argv)
        assert (result.code, result.out, result.err.count("\n")) == (66, "", 1)
        for words in said:
            assert words in result.err, result.err
    assert hub.requests == []  # nothing is fetched without being asked for


def test_two_pulls_of_the_same_file(hub: Hub, target: Path) -> None:  # T23
    script = "import sys; from cpuinfer.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "pull", REPOSITORY, "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen(command, env=environment(), **pipes) for _ in range(2)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    fetched = sorted(json.loads(out)["fetched"] for out, _ in outputs)
    assert fetched == [0, len(DATA)]
    assert target.read_bytes() == DATA and left(target) == [FILE, f"{FILE}.json"]


def test_who_comes_second_waits(hub: Hub, target: Path) -> None:  # T23
    order: list[str] = []
    first = store.locked(target.parent, lambda: pytest.fail("there is nobody to wait for"))
    first.__enter__()

    def end() -> None:
        order.append("first ends")
        first.__exit__(None, None, None)

    timer = threading.Timer(0.1, end)
    with store.locked(target.parent, timer.start):
        order.append("second begins")
    timer.join()
    assert order == ["first ends", "second begins"]


def test_what_is_being_pulled_is_not_removed(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # T23
    keep_part(target, DATA[:1000])
    with store.locked(target.parent, lambda: None):
        result = run(capsys, "rm", REPOSITORY)
    assert result.code == 74 and "being pulled" in result.err and partial(target).exists()


def test_who_waited_for_a_directory_that_is_gone_makes_it_anew(hub: Hub, target: Path) -> None:
    first = store.locked(target.parent, lambda: pytest.fail("there is nobody to wait for"))
    first.__enter__()

    def end() -> None:
        store.remove_empty(target.parent)
        first.__exit__(None, None, None)

    def third() -> None:
        raise BlockingIOError

    with store.locked(target.parent, end):
        assert target.parent.is_dir()
        with pytest.raises(BlockingIOError), store.locked(target.parent, third):
            pass


def test_a_store_on_another_disk_stays(
    hub: Hub, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk/models"
    disk.mkdir(parents=True)
    (tmp_path / "data/cpuinfer").mkdir(parents=True)
    (tmp_path / "data/cpuinfer/models").symlink_to(disk)
    assert run(capsys, "pull", REPOSITORY).code == 0
    assert (disk / REPOSITORY / FILE).exists()
    assert run(capsys, "rm", REPOSITORY).code == 0
    assert list(disk.iterdir()) == []


def test_directories_with_nothing_in_them_are_removed(hub: Hub, target: Path) -> None:
    for directory in (target.parent / "sub/deeper", target.parents[1] / "Other"):
        directory.mkdir(parents=True)
    store.remove_empty(target.parent / "sub/deeper")
    assert left(target.parent) == ["Other"]
    store.remove_empty(target.parents[1] / "Other/never/made")
    assert target.parents[2].is_dir() and not target.parents[1].exists()


def test_names_of_files_in_capitals_are_models_too(hub: Hub, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.with_name("MODEL-Q8_0.GGUF").write_bytes(DATA)
    assert [model.name for model in store.models()] == [f"{REPOSITORY}:Q8_0"]
