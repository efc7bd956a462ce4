"""What the commands print when all goes well."""

import json
import sys
from pathlib import Path

import pytest
from command import DEMO, PROMPT, Result, Stdin, run

from cpuinfer import LLM, machine
from cpuinfer.gguf import open_gguf
from cpuinfer.kernels import jit
from cpuinfer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO)


def document(result: Result) -> dict[str, object]:
    """The one JSON document on standard output."""
    assert result.code == 0 and result.out.count("\n") == 1, result
    found = json.loads(result.out)
    assert isinstance(found, dict)
    return found


# generate


def test_the_prompt_and_its_continuation(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "generate", DEMO, "-p", PROMPT, "-n", "30", "--seed", "1")
    expected = llm.generate(PROMPT, max_tokens=30, seed=1)
    assert result == Result(0, f"{PROMPT}{expected.text}\n", "")


def test_a_text_that_ends_its_line_gets_no_second_one(capsys: pytest.CaptureFixture[str]) -> None:
    newline = LLM(DEMO).tokenizer.encode("a\n", add_bos=False)[-1]
    bias = f"--logit-bias={newline}=1e9"
    assert run(capsys, "generate", "-p", "Hello", "-n", "2", bias).out == "Hello\n\n"


@pytest.mark.parametrize("given", ["file", "dash", "pipe"])
def test_a_prompt_from_a_file_or_a_pipe(
    given: str,
    llm: LLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "The old man’s house\n\nwas"
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"{text}\n".encode())
    monkeypatch.setattr(sys, "stdin", Stdin(b"" if given == "file" else path.read_bytes()))
    argv = {"file": ["-f", str(path)], "dash": ["-f", "-"], "pipe": []}[given]
    result = run(capsys, "generate", *argv, "-n", "9", "--seed", "2")
    assert result.out == f"{text}{llm.generate(text, max_tokens=9, seed=2).text}\n"


def test_without_a_prompt_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    assert run(capsys, "generate", "-n", "3").out.startswith("Once upon a time")
    result = run(capsys, "generate", DEMO, "-n", "3")
    assert (result.code, result.out) == (2, "") and "no prompt" in result.err


def test_generate_as_json(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", DEMO, "-p", PROMPT, "-n", "12", "--seed", "4", "--json"]
    found = document(run(capsys, *argv))
    timings = found.pop("timings")
    assert isinstance(timings, dict) and set(timings) == {"prompt_seconds", "generation_seconds"}
    drafted, accepted = found.pop("drafted_tokens"), found.pop("accepted_tokens")
    assert isinstance(drafted, int) and isinstance(accepted, int) and 0 <= accepted <= drafted
    expected = llm.generate(PROMPT, max_tokens=12, seed=4)
    assert found == {
        "text": expected.text,
        "token_ids": list(expected.token_ids),
        "finish_reason": expected.finish_reason,
        "prompt_tokens": 5,
        "completion_tokens": expected.completion_tokens,
        "cached_tokens": 0,
        "seed": 4,
        "model": str(DEMO),
    }
    logprobs = document(run(capsys, *argv, "--logprobs", "2"))["logprobs"]
    reported = llm.generate(PROMPT, max_tokens=12, seed=4, logprobs=2).logprobs
    assert isinstance(logprobs, list) and reported is not None
    assert [entry["token"] for entry in logprobs] == list(expected.token_ids)
    assert logprobs[0] == {
        "token": reported[0].token,
        "text": reported[0].text,
        "logprob": reported[0].logprob,
        "top": [list(pair) for pair in reported[0].top],
    }


def test_a_seed_gives_the_same_tokens_with_any_number_of_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["generate", "-p", "the cat " * 150, "-n", "40", "--seed", "6", "--json"]
    texts = [
        document(run(capsys, *argv, *more))["token_ids"]
        for more in ([], [], ["--threads", "1"], ["--threads", "2"])
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert document(run(capsys, *argv, "--seed", "7"))["token_ids"] != texts[0]


def test_the_sampling_options_reach_the_sampler(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "-p", PROMPT, "-n", "30", "--temperature", "0", "--json"]
    found = document(run(capsys, *argv, "--repeat-penalty", "1.3", "--stop", "she", "--stop", "."))
    expected = llm.generate(
        PROMPT, max_tokens=30, temperature=0, repeat_penalty=1.3, stop=["she", "."]
    )
    assert (found["text"], found["finish_reason"]) == (expected.text, expected.finish_reason)


def test_stats_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "-p", PROMPT, "-n", "4", "--seed", "1", "--ignore-eos"]
    result, without = run(capsys, *argv, "--stats"), run(capsys, *argv)
    assert result.out == without.out
    speed, setup = result.err.splitlines()
    assert "prompt 5 tokens" in speed and "generation 4 tokens" in speed and "GB/s" in speed
    for word in ("endless", "window of 128", "f16", machine.instruction_set(), "threads"):
        assert word in setup


def test_what_is_saved_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt = "The dog was very happy to see the girl. " * 20

    def cached(question: str, *more: str) -> object:
        argv = ["generate", "-p", prompt + question, "-n", "3", "--json", *more]
        return document(run(capsys, *argv))["cached_tokens"]

    assert cached("Why?") == cached("Why?") == 0
    assert not list(tmp_path.glob("*/prefixes"))
    assert cached("Why?", "--save") == 0
    shared = len(load_tokenizer(open_gguf(DEMO)).encode(prompt))
    assert cached("And then what?", "--save") >= shared - 2


def test_what_cannot_be_saved_is_said_after_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("cpuinfer.prefixes._write", refuse)
    result = run(capsys, "generate", "-p", PROMPT, "-n", "3", "--json", "--save")
    assert result.code == 73 and json.loads(result.out)["completion_tokens"] == 3
    assert "keys and values are not saved: No space left on device" in result.err


def test_what_is_odd_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "longer.gguf"
    path.write_bytes(DEMO.read_bytes() + b"tail")
    result = run(capsys, "generate", path, "-p", "x", "-n", "2")
    assert result.code == 0
    assert result.err == (
        "cpuinfer: warning: longer.gguf: 4 bytes after the last tensor are ignored\n"
    )
    # As much memory as half the context needs: 1 KiB a position and more than 150 MiB of scratch.
    full = run(capsys, "inspect", "--json", "--sliding-window", "off", DEMO)
    total = json.loads(full.out)["memory"]["total"]
    monkeypatch.setattr(machine, "memory_available", lambda: total - 1000)
    result = run(capsys, "generate", "-p", "x", "-n", "2", "--sliding-window", "off")
    assert result.code == 0 and result.err.startswith("cpuinfer: warning: the context is 1792")
    assert run(capsys, "generate", "-p", "x", "-n", "2").err == ""


# warmup


def test_warmup_of_a_model_and_of_the_common_types(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(run(capsys, "warmup", DEMO, "--json"))
    cache = None if jit.CACHE is None else str(jit.CACHE)
    assert set(found) == {"kernels", "compiled", "cache_directory"}
    assert (found["kernels"], found["cache_directory"]) == (8, cache)
    # A second time there is nothing left to do.
    assert document(run(capsys, "warmup", DEMO, "--json"))["compiled"] == 0
    result = run(capsys, "warmup", DEMO)
    assert result.code == 0 and result.out.startswith("0 of 8 kernels compiled, kept ")
