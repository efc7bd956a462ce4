"""The command `chat`: one message and its reply, sessions that come back, and what is refused."""

import io
import sys
from pathlib import Path

import pytest
from command import DEMO, Result, Stdin, run, variant

from cpuinfer import LLM, options
from cpuinfer.conversation import Conversation
from cpuinfer.llm import Message
from cpuinfer.sessions import Sessions

STORY = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sessions are kept in this test."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data/cpuinfer"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "story.jinja"
    path.write_text(STORY)
    return path


def piped(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    *argv: str | Path,
) -> Result:
    monkeypatch.setattr(sys, "stdin", Stdin(text.encode()))
    return run(capsys, "chat", *argv, "-n", "6", "--seed", "3")


def reply(template: Path, *messages: str) -> str:
    roles = ["user", "assistant"] * len(messages)
    told: list[Message] = [
        {"role": role, "content": text} for role, text in zip(roles, messages, strict=False)
    ]
    with LLM(DEMO, template=str(template)) as llm:
        return llm.chat(told, max_tokens=6, seed=3).text


@pytest.mark.parametrize("once", [[], ["-1"], ["--once", "--no-save"]])
def test_one_message_is_answered_and_nothing_is_kept(
    once: list[str],
    home: Path,
    template: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = piped(monkeypatch, capsys, "Tom was sad.\n", "--template", template, *once)
    assert result == Result(0, reply(template, "Tom was sad.") + "\n", "")
    assert not home.exists()


def test_a_session_is_gone_on_with(
    home: Path,
    template: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = home.parent / "model.gguf"
    home.mkdir(parents=True)
    model.write_bytes(DEMO.read_bytes())
    _save(home, model, "older", ["Once upon a time", "there was a dog."])
    older = home / "sessions/older.json"
    older.write_text(older.read_text().replace('"updated": "20', '"updated": "19'))
    _save(home, model, "trip", ["Hello", "Good day."])
    argv = ("--template", template, "--once")
    # The model is the session's; without a name the newest is taken.
    second = piped(monkeypatch, capsys, "And?", *argv, "--resume")
    assert second == Result(0, reply(template, "Hello", "Good day.", "And?") + "\n", "")
    kept = Sessions(home / "sessions").read("trip")
    assert [message["content"] for message in kept.messages[2:]] == ["And?", second.out[:-1]]
    assert kept.model == str(model.resolve()) and kept.params["max_tokens"] == 6
    before = older.read_bytes()
    third = piped(monkeypatch, capsys, "And?", *argv, "--no-save", "--resume", "older")
    assert third.out == reply(template, "Once upon a time", "there was a dog.", "And?") + "\n"
    assert older.read_bytes() == before


def _save(home: Path, model: Path, name: str, said: list[str]) -> None:
    from cpuinfer.conversation import Conversation

    with LLM(model) as llm:
        told = Conversation(llm)
        roles = ("user", "assistant")
        told.messages = [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)]
        Sessions(home / "sessions").save(name, told)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--resume"], 2, "no session has been saved yet"),
        (["--resume", "trip"], 66, "trip: no such session; there are: none"),
        (["--resume", "bad"], 65, "bad.json is left out: it is damaged"),
        (["--resume", str(DEMO)], 2, "name the model before --resume"),
    ],
)
def test_a_session_that_is_not_there(
    argv: list[str],
    code: int,
    words: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if code == 65:
        (home / "sessions").mkdir(parents=True)
        (home / "sessions/bad.json").write_bytes(b"{")
    result = piped(monkeypatch, capsys, "Hello", *argv)
    assert (result.code, result.out) == (code, "")
    assert words in result.err and result.err.count("\n") == 1


def test_instructions_and_several_lines_reach_the_model(
    template: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--template", template, "--system", "A story."]
    result = piped(monkeypatch, capsys, "Tom was\nsad.\n", *argv)
    told: list[Message] = [
        {"role": "system", "content": "A story."},
        {"role": "user", "content": "Tom was\nsad."},
    ]
    with LLM(DEMO, template=str(template)) as llm:
        assert result == Result(0, llm.chat(told, max_tokens=6, seed=3).text + "\n", "")


def test_what_is_given_now_takes_the_place_of_what_was_saved(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions = Sessions(home / "sessions")
    with LLM(DEMO) as llm:
        conversation = Conversation(llm, "Old.", {"top_k": 7, "temperature": 0.3})
        conversation.messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good day."},
        ]
        sessions.save("trip", conversation)
    argv = ["--resume", "trip", "--system", "New.", "--on-full", "shift", "--top-k", "5"]
    assert piped(monkeypatch, capsys, "And?", *argv).code == 0
    saved = sessions.read("trip")
    assert (saved.system, saved.on_full, len(saved.messages)) == ("New.", "shift", 4)
    assert saved.params == {"top_k": 5, "temperature": 0.3, "max_tokens": 6, "seed": 3}


def test_there_must_be_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = piped(monkeypatch, capsys, " \n", "-1")
    assert result == Result(2, "", "cpuinfer: there is no message on standard input\n")


def test_a_chat_without_a_place_for_sessions(
    home: Path,
    template: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home.parent.write_text("in the way")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    lines = iter(["Tom was sad.", "/save trip", "/list", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    result = run(capsys, "chat", "--template", template, "-n", "6", "--seed", "3")
    assert (result.code, result.out) == (0, reply(template, "Tom was sad.") + "\n")
    assert result.err.count("conversations cannot be saved") == 1
    assert result.err.count("there is no place") == 2 and "--resume" not in result.err


def test_numbers_below_zero_are_no_options() -> None:
    arguments = options.parse(
        ["chat", "--repeat-last-n", "-1", "--presence-penalty", "-.5", "--plain", "-1", "--resume"]
    )
    assert (arguments.repeat_last_n, arguments.presence_penalty) == (-1, -0.5)
    assert arguments.once and arguments.plain and arguments.resume is None
    assert not options.parse(["chat", "--seed", "-1"]).once


def test_a_chat_in_a_terminal(
    template: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    lines = iter(["Tom was sad.", "  ", "Then"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, None) or end())

    def end() -> str:
        raise EOFError

    result = run(capsys, "chat", "--template", template, "-n", "5", "--seed", "3")
    told = LLM(DEMO, template=str(template))
    messages = [{"role": "user", "content": "Tom was sad."}]
    first = told.chat(messages, max_tokens=5, seed=3).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Then"}]
    second = told.chat(messages, max_tokens=5, seed=3).text
    assert result.code == 0
    assert result.out == f"{first}\n{second}\n"
    assert result.err.startswith("demo.gguf: endless, with a window of 128 tokens, cache ")


def test_leaving_a_chat_with_ctrl_c(
    template: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def interrupted(*_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    monkeypatch.setattr("builtins.input", interrupted)
    assert run(capsys, "chat", "--template", template).code == 130


def test_a_model_without_a_template_is_known_before_the_first_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(tmp_path / "plain.gguf", {"tokenizer.chat_template": None})
    monkeypatch.setattr("cpuinfer.llm.prepare_kernels", lambda *_: pytest.fail("kernels"))
    monkeypatch.setattr(sys, "stdin", Stdin(terminal=True))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a message"))
    result = run(capsys, "chat", path)
    assert (result.code, result.out) == (2, "") and "plain.gguf has no chat template" in result.err
