"""Exit codes, one line for each error, signals, and what happens to the standard streams."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import DEMO, PROMPT, child, environment, run, variant, warm
from conftest import SHARED

from cpuinfer import __version__, machine, ops
from cpuinfer.kernels import jit

SAMPLES = sorted(
    path
    for folder in ("gguf_samples", "vocab")
    for path in (SHARED / folder).rglob("*")
    if path.suffix in (".gguf", ".bin")
)


def assert_refused(result: object, code: int, *words: str) -> None:
    """The exit code, one line on standard error with these words, and no output."""
    out, err = result.out, result.err  # type: ignore[attr-defined]
    assert result.code == code, err  # type: ignore[attr-defined]
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("cpuinfer") and err[:-1].isprintable(), err
    for word in words:
        assert word in err


# Usage


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", ["COMMAND"]),
        ("frobnicate", ["frobnicate"]),
        ("generate --bogus", ["--bogus"]),
        ("generate --temp 1 -p x", ["--temp"]),
        ("generate -p x -f y", ["--file", "--prompt"]),
        ("generate -p x -n many", ["--max-tokens", "many"]),
        ("generate -p x -n 0", ["max_tokens", "0"]),
        ("generate -p x --temperature -1", ["temperature", "-1"]),
        ("generate -p x --temperature nan", ["temperature", "nan"]),
        ("generate -p x --top-p 0", ["top_p", "0"]),
        ("generate -p x --seed -3", ["seed", "-3"]),
        ("generate -p x --logit-bias 3", ["--logit-bias", "ID=BIAS", "3"]),
        ("generate -p x --logit-bias 2048=1", ["logit_bias", "2048"]),
        ("generate -p x --logprobs 3", ["--logprobs", "--json"]),
        ("generate -p x --threads 0", ["threads", "0"]),
        ("generate -p x --kv-type q9_0", ["--kv-type", "q8_0"]),
        ("generate -p x --sliding-window 0", ["sliding_window", "0"]),
        ("generate -p x --sliding-window on", ["--sliding-window", "on"]),
        ("generate -p x --context-length 1", ["context_length", "1"]),
        ("generate -p x --context-length 2049", ["context_length", "2049", "2048"]),
        ("chat --template no-such-template", ["no-such-template"]),
        ("inspect", ["MODEL"]),
        ("warmup --kv-type f8", ["f8"]),
    ],
)
def test_wrong_usage(
    argv: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpuinfer.chat_command.read_prompt", lambda path: "Hello")
    assert_refused(run(capsys, *argv.split()), 2, *words)


def test_a_stop_string_that_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(run(capsys, "generate", "-p", "x", "--stop", ""), 2, "stop")


def test_an_unknown_instruction_set() -> None:
    done = child("generate", "-p", "x", env=environment(CPUINFER_ISA="mmx"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"cpuinfer: CPUINFER_ISA is 'mmx'")


@pytest.mark.parametrize("length", [5, 4])
def test_R16_a_prompt_that_leaves_no_room(length: int, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "-p", PROMPT, "--context-length", str(length)]
    assert_refused(run(capsys, *argv), 2, "5 tokens", f"context is {length}")


def test_R16_a_prompt_that_leaves_room_for_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "-p", PROMPT, "--context-length", "6", "--json", "--ignore-eos"]
    document = json.loads(run(capsys, *argv).out)
    assert (document["completion_tokens"], document["finish_reason"]) == (1, "length")


def test_version_and_help_load_nothing_heavy() -> None:
    script = (
        "import sys; from cpuinfer.cli import main; code = main(sys.argv[1:])\n"
        "print(code, sorted({'numba', 'llvmlite', 'sentencepiece', 'numpy'} & set(sys.modules)))"
    )
    for argv, shown in (["--help"], "generate"), (["--version"], __version__):
        done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
        assert done.stdout.endswith("0 []\n") and shown in done.stdout, done


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "doctor", "warmup"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: cpuinfer {command}")


# Files


@pytest.mark.parametrize("command", ["generate", "inspect", "warmup"])
def test_G30_what_is_no_file(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    more = ["-p", "x"] if command == "generate" else []
    for path in (tmp_path / "missing.gguf", tmp_path, loop, Path("/dev/zero"), DEMO / "inside"):
        assert_refused(run(capsys, command, path, *more), 66, str(path))


def test_G30_a_pipe_with_a_name_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    done = child("inspect", tmp_path / "fifo.gguf", timeout=30)
    assert (done.returncode, done.stdout) == (66, b"")
    assert b"fifo.gguf: not a regular file" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_G30_an_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.touch(mode=0)
    assert_refused(run(capsys, "inspect", path), 66, str(path))


def test_a_prompt_file_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        assert_refused(run(capsys, "generate", "-f", path), 66, str(path))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"Hello \xff")
    assert_refused(run(capsys, "generate", "-f", binary), 65, str(binary), "UTF-8", "byte 6")


@pytest.mark.parametrize("size", [0, 3, 24, 1000, 40_000, DEMO.stat().st_size - 64])
def test_a_truncated_file(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(DEMO.read_bytes()[:size])
    for argv in (["generate", path, "-p", "x"], ["inspect", path], ["warmup", path]):
        assert_refused(run(capsys, *argv), 65, "cut.gguf: ")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", "gemma\x1b[31m\n", "not supported"),
        ("general.architecture", None, "missing"),
        ("tokenizer.ggml.model", "gpt2", "not supported"),
        ("llama.block_count", 5, "missing"),
        ("llama.attention.head_count", 0, "expected 1"),
        ("llama.rope.freq_base", float("nan"), "finite"),
    ],
)
def test_a_model_that_cannot_run(
    key: str,
    value: object,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = variant(tmp_path / "other.gguf", {key: value})
    field = "blk.4" if key == "llama.block_count" else key
    assert_refused(run(capsys, "generate", path, "-p", "x"), 65, "other.gguf", field, reason)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_files_made_by_others(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["inspect", path], ["generate", path, "-p", "x", "-n", "2"]):
        result = run(capsys, *argv)
        if result.code == 0:
            assert result.out and result.err.count("\n") == result.err.count("cpuinfer: warning")
        else:
            assert_refused(result, 65, path.name[:5])


def test_R17_weights_that_give_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(tmp_path / "nan.gguf", nan="output_norm.weight")
    assert_refused(run(capsys, "generate", path, "-p", "x"), 65, "NaN logits")


# Memory


def test_R01_a_model_larger_than_the_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 20)
    result = run(capsys, "generate", "-p", "x")
    assert_refused(result, 75, "1.0 MiB available", "needed", "smaller model")


def test_memory_that_runs_out_while_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pack(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cpuinfer.models.llama.pack", pack)
    assert_refused(run(capsys, "generate", "-p", "x"), 75, "not enough memory")


@pytest.mark.skipif(sys.platform != "linux", reason="others do not enforce RLIMIT_AS")
def test_R02_a_file_larger_than_the_address_space(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    shutil.copy(DEMO, path)
    os.truncate(path, 16 << 30)  # a hole, which takes no space
    limit = "import resource as r; r.setrlimit(r.RLIMIT_AS, (8 << 30, 8 << 30))"
    done = child("generate", path, "-p", "x", first=limit)
    assert (done.returncode, done.stdout) == (75, b""), done.stderr
    assert done.stderr.startswith(b"cpuinfer: ") and done.stderr.count(b"\n") == 1
    assert b"large.gguf" in done.stderr


# Signals


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_R13_a_signal_in_prefill(
    name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    silu_mul, sent = ops.silu_mul, []

    def interrupted(gate: ops.Floats, up: ops.Floats) -> ops.Floats:
        sent.append(len(gate))
        signal.raise_signal(getattr(signal, name))
        return silu_mul(gate, up)

    monkeypatch.setattr(ops, "silu_mul", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    result = run(capsys, "generate", "-p", "the cat " * 200)
    assert (result.code, result.out, result.err) == (code, "", "")
    assert sent == [256]  # the first layer of the first chunk
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_R13_a_signal_while_text_is_written(sent: signal.Signals, code: int) -> None:
    warm()
    argv = [sys.executable, "-m", "cpuinfer", "generate", "-p", PROMPT, "-n", "2000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*argv, "--ignore-eos"], env=environment(), **pipes) as process:
        assert process.stdout is not None
        start = process.stdout.read(len(PROMPT))
        process.send_signal(sent)
        rest, err = process.communicate(timeout=120)
    assert (process.returncode, start) == (code, PROMPT.encode())
    assert err == b"" and rest.endswith(b"\n")


# Standard streams


def test_T28_a_reader_that_leaves() -> None:
    warm()
    argv = [sys.executable, "-m", "cpuinfer", "generate", "-p", PROMPT, "-n", "500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*argv, "--ignore-eos"], env=environment(), **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("argv", [["inspect", DEMO], ["generate", "-p", "x"]])
def test_a_full_disk(argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = child(*argv, stdout=full)
    assert done.returncode == 74
    assert done.stderr.startswith(b"cpuinfer: ") and done.stderr.count(b"\n") == 1


def test_streams_that_are_closed() -> None:
    warm()
    script = 'exec "$0" -m cpuinfer generate -n 3 <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", script, sys.executable], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_text_is_utf8_whatever_the_locale() -> None:
    plain = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = child("generate", "-p", "é — 漢", "-n", "2", env=plain)
    assert done.returncode == 0 and done.stdout.startswith("é — 漢".encode())
    done = child("generate", b"no\xff\xc3\xa9\n\x1b.gguf", "-p", "x", env=plain)
    assert done.returncode == 66
    assert done.stderr.isascii() and done.stderr.count(b"\n") == 1


def test_bytes_that_are_no_text_on_the_command_line() -> None:
    done = child("generate", "-p", b"Hello \xff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"cpuinfer: --prompt is not UTF-8 text: Hello \\udcff\n"


# The directory of compiled kernels


def cached_kernels(cache_home: Path) -> Path:
    """A user's cache directory with all that this process has compiled."""
    assert jit.CACHE is not None
    directory = cache_home / "cpuinfer"
    shutil.copytree(jit.CACHE, directory / "kernels" / jit.CACHE.name)
    for path in (directory, directory / "kernels"):
        path.chmod(0o700)
    return directory / "kernels" / jit.CACHE.name


@pytest.mark.skipif(jit.CACHE is None, reason="this user has no cache directory")
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("nbi", lambda raw: b""),
        ("nbi", lambda raw: b"\x80\x05" + b"x" * len(raw)),
        ("nbc", lambda raw: raw[: len(raw) // 2]),
        ("nbc", lambda raw: b"\x00" * len(raw)),
    ],
    ids=["index-empty", "index-foreign", "code-cut", "code-zeros"],
)
def test_R07_a_damaged_cache_is_made_anew(
    suffix: str,
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = run(capsys, "generate", "-p", PROMPT, "-n", "5", "--seed", "1")
    # Copies of this repository in other places have files of their own there.
    files = list(cached_kernels(tmp_path).rglob(f"*rms_norm*.{suffix}"))
    damaged = damage(files[0].read_bytes())
    for file in files:
        file.write_bytes(damaged)
    argv = ["generate", "-p", PROMPT, "-n", "5", "--seed", "1"]
    done = child(*argv, env=environment(XDG_CACHE_HOME=str(tmp_path)))
    assert (done.returncode, done.stdout.decode()) == (0, expected.out), done.stderr
    assert any(file.read_bytes() != damaged for file in files)
    done = child("warmup", DEMO, "--json", env=environment(XDG_CACHE_HOME=str(tmp_path)))
    assert json.loads(done.stdout)["compiled"] == 0


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "HOME"])
def test_R05_no_place_for_a_cache(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # root could write into any directory
    done = child(
        "doctor", "--json", env=environment(**{"XDG_CACHE_HOME": "", name: f"{tmp_path}/file"})
    )
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["cache_directory"] is None
    assert done.stderr.count(b"kernels are compiled anew at every start") == 1
    assert len(document["warnings"]) == 1 and str(tmp_path) in document["warnings"][0]


def test_R06_a_cache_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    directory = tmp_path / "cpuinfer"
    directory.mkdir()
    directory.chmod(0o777)
    done = child("doctor", "--json", env=environment(XDG_CACHE_HOME=str(tmp_path)))
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["cache_directory"] is None
    assert done.stderr.count(b"(mode 777)") == 1
    assert not any(directory.iterdir())


@pytest.mark.skipif(jit.CACHE is None, reason="this user has no cache directory")
def test_R08_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "-p", PROMPT, "-n", "5", "--seed", "1"]
    expected = run(capsys, *argv)
    for file in cached_kernels(tmp_path).rglob("*silu_mul*"):
        file.unlink()

    # Python ignores SIGXFSZ: what is too large to write raises OSError.
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (2000, 2000))"
    done = child(*argv, first=limit, env=environment(XDG_CACHE_HOME=str(tmp_path)))
    assert (done.returncode, done.stdout.decode()) == (0, expected.out), done.stderr
    assert b"cannot keep a compiled kernel" in done.stderr
