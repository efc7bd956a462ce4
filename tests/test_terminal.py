"""The chat: what a person types, what happens to the conversation, and what is said."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_conversation import Scripted

from cpuinfer.conversation import Conversation
from cpuinfer.llm import LLM
from cpuinfer.progress import Progress
from cpuinfer.sessions import Sessions
from cpuinfer.terminal import report, settings, slash
from cpuinfer.terminal.editor import edited
from cpuinfer.terminal.loop import Chat
from cpuinfer.terminal.reader import LineReader
from cpuinfer.terminal.screen import RawScreen
from cpuinfer.terminal.talk import Talk


class Model(Scripted):
    """A scripted model with what sessions and reports ask for; a token is a character."""

    key = "k"
    path = Path("/models/scripted.gguf")

    def __init__(self, *replies: Sequence[str | None], room: int | None = 1000) -> None:
        super().__init__(*replies, room=room)
        self.remembered = 0
        self.full = False  # the disk

    def remember(self) -> None:
        if self.full:
            raise OSError(28, "No space left on device", "/cache/prefixes")
        self.remembered += 1


class Typist:
    """Types given lines, None being Ctrl-C; looks at the drafts it is offered."""

    def __init__(self, *lines: str | None) -> None:
        self._lines = iter(lines)
        self.drafts: list[str] = []

    def read(self, draft: str = "") -> str:
        self.drafts.append(draft)
        line = next(self._lines, "/exit")
        if line is None:
            raise KeyboardInterrupt
        return line

    def listening(self) -> nullcontext[None]:
        return nullcontext()


def made(llm: Model, directory: Path, **options: Any) -> Chat:
    talk = Talk(lambda: RawScreen(sys.stdout), Progress(io.StringIO()))
    conversation = Conversation(cast(LLM, llm), notice=talk.tell)
    return Chat(conversation, talk, Sessions(directory, talk.tell), **options)


def said(chat: Chat) -> list[str]:
    return [str(message["content"]) for message in chat.conversation.messages]


# messages


def test_replies_are_shown_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = Model(["Good ", "day."], ["Yes."])
    chat = made(llm, tmp_path)
    chat.run(Typist("Hello", "  \n ", "And?"))
    assert llm.asked == ["Hello>", "Hello|Good day.|And?>"]
    out, err = capsys.readouterr()
    assert out == "Good day.\nYes.\n"
    assert err.splitlines() == [
        "9 tokens, - tok/s, context 15 of 1,000",
        "4 tokens, - tok/s, context 25 of 1,000",
        f"to go on with this: cpuinfer chat --resume {chat.name}",
    ]
    again = made(Model(), tmp_path)
    slash.run(again, "load", str(chat.name))
    assert said(again) == ["Hello", "Good day.", "And?", "Yes."]
    assert llm.remembered == 2


def test_nothing_is_saved_where_that_is_not_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = Model(["Yes."])
    made(llm, tmp_path / "sessions", autosave=False).run(Typist("Hello"))
    assert llm.remembered == 0 and not (tmp_path / "sessions").exists()
    assert "resume" not in capsys.readouterr().err


def test_a_full_disk_is_said_once_and_does_not_end_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = Model(["1"], ["2"])
    llm.full = True
    made(llm, tmp_path).run(Typist("a", "b"))
    out, err = capsys.readouterr()
    assert out == "1\n2\n"
    assert err.count("will be read again: /cache/prefixes: No space left on device") == 1
    assert len(list(tmp_path.glob("*.json"))) == 1  # the messages are saved


def test_taking_back_the_only_message_is_saved(tmp_path: Path) -> None:
    chat = made(Model(["Yes."]), tmp_path)
    chat.run(Typist("A secret", "/undo"))
    (session,) = Sessions(tmp_path).names()
    assert Sessions(tmp_path).read(session).messages == []


def test_ctrl_c_stops_a_reply_and_not_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm, typist = Model(["Good ", None], [None], ["Yes."]), Typist("Hello", "And?", "And!")
    chat = made(llm, tmp_path)
    chat.run(typist)
    assert said(chat) == ["Hello", "Good ", "And!", "Yes."]
    out, err = capsys.readouterr()
    assert out.startswith("Good \n") and err.startswith("stopped, context 11 of 1,000\n")
    # What got no reply at all can be sent again.
    assert typist.drafts == ["", "", "And?", ""]


def test_a_file_waits_for_a_message_that_is_answered(tmp_path: Path) -> None:
    document = tmp_path / "notes.txt"
    document.write_text("Notes.")
    llm = Model([None], ["Yes."], ["No."])
    made(llm, tmp_path / "s").run(Typist(f"/file {document}", "What?", "What?", "And?"))
    assert llm.asked == ["Notes.\n\nWhat?>"] * 2 + ["Notes.\n\nWhat?|Yes.|And?>"]


def test_a_file_longer_than_the_window_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "notes.txt"
    document.write_text("Notes.")
    llm = Model(room=None)
    for window, told in ((5, True), (6, False)):
        llm.config = SimpleNamespace(context_length=1000, sliding_window=window)
        made(llm, tmp_path / "s").run(Typist(f"/file {document}"))
        assert ("the model sees 5 tokens at once" in capsys.readouterr().err) is told


def test_what_ctrl_c_kept_from_being_saved_is_saved_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = made(Model(["Yes."]), tmp_path)

    def interrupted() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.run(Typist("Hello", None))
    assert len(Sessions(tmp_path).names()) == 1


def test_commands_that_take_nothing_refuse_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = made(Model(["Yes."]), tmp_path)
    chat.run(Typist("Hello", "/clear the table please", "/exit now"))
    assert said(chat) == ["Hello", "Yes."]
    assert "/clear takes nothing behind it" in capsys.readouterr().err


def test_ctrl_c_instead_of_a_message_leaves(tmp_path: Path) -> None:
    chat = made(Model(["Yes."]), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        chat.run(Typist("Hello", None, "And?"))
    assert said(chat) == ["Hello", "Yes."]


def test_ctrl_c_while_a_session_is_saved_does_not_end_the_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    llm = Model(["1"], ["2"])
    monkeypatch.setattr(llm, "remember", interrupted)
    chat = made(llm, tmp_path)
    chat.run(Typist("Hello", "And?"))
    assert said(chat) == ["Hello", "1", "And?", "2"]


def test_a_message_that_does_not_fit_does_not_end_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm, typist = Model(["Yes."], room=100), Typist("x" * 200, "Hello")
    chat = made(llm, tmp_path)
    chat.run(typist)
    assert "cpuinfer: with this message 201 of 100 tokens" in capsys.readouterr().err
    assert typist.drafts[1] == "x" * 200
    assert said(chat) == ["Hello", "Yes."]


def test_a_notice_in_the_middle_of_a_reply_is_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = made(Model(), tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    def reply() -> Iterator[str]:
        yield "one "
        chat.conversation.notice("the \x1b context")
        yield "two"

    assert chat.talk.show(cast(Any, (piece for piece in reply())))
    out, err = capsys.readouterr()
    assert (out, err) == ("one \ntwo\n", "the \\x1b context\n")


@pytest.mark.parametrize(
    ("params", "room", "end"),
    [
        ({}, 1000, "4 tokens, - tok/s, context 7 of 1,000"),
        ({"max_tokens": 2}, 1000, "context 5 of 1,000, stopped after 2 tokens: /set max_tokens"),
        ({}, None, "context 7, window of 128"),
    ],
)
def test_what_is_said_of_a_reply(
    params: dict[str, Any],
    room: int | None,
    end: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = Model(["Yes."], room=room)
    llm.config = SimpleNamespace(context_length=1000, sliding_window=128)
    chat = made(llm, tmp_path)
    chat.conversation.params = params
    chat.run(Typist("Hi"))
    assert capsys.readouterr().err.splitlines()[0].endswith(end)


# commands


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("/help", "help", ""),
        (" /Set  top_k  4 ", "set", "top_k  4"),
        ("/system two\nlines", "system", "two\nlines"),
        ("/", "", ""),
    ],
)
def test_what_is_a_command(text: str, name: str, argument: str) -> None:
    assert slash.parse(text) == (name, argument)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("/etc/hosts says", "/etc/hosts says"),
        ("// a comment", "// a comment"),
        ("//help me", "/help me"),
        ("1/2", "1/2"),
    ],
)
def test_what_is_a_message_although_it_has_a_slash(text: str, sent: str, tmp_path: Path) -> None:
    llm = Model(["Yes."])
    made(llm, tmp_path).run(Typist(text))
    assert llm.asked == [f"{sent}>"]


def test_an_unknown_command_says_what_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(Model(), tmp_path).run(Typist("/sistem x"))
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("cpuinfer: there is no command /sistem, did you mean /system")
    assert "//sistem" in line
    names = "help system set show clear undo retry save load list file tokens stats exit"
    assert f"There are /{names.replace(' ', ', /')} (" in line


def test_undo_gives_the_words_back(tmp_path: Path) -> None:
    typist = Typist("Hello", "And?", "/undo", "Or?")
    chat = made(Model(["1"], ["2"], ["3"]), tmp_path)
    chat.run(typist)
    assert typist.drafts[3] == "And?"
    assert said(chat) == ["Hello", "1", "Or?", "3"]


def test_retry_and_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = made(Model(["1"], ["2"], ["3"]), tmp_path)
    chat.run(Typist("/retry", "Hello", "/retry", "/clear", "/undo", "Again"))
    assert said(chat) == ["Again", "3"]
    out, err = capsys.readouterr()
    assert out == "1\n2\n3\n"
    assert "cpuinfer: there is no reply to try again" in err
    assert "cpuinfer: there is nothing to take back" in err
    # What was there before /clear stays saved.
    assert [entry.messages for entry in Sessions(tmp_path).entries()] == [2, 2]


def test_save_load_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = made(Model(["1"], ["2"]), tmp_path)
    chat.run(Typist("/save", "Hello", "/save trip", "And?", "/clear", "/load trip", "/list"))
    assert chat.name == "trip"
    assert said(chat) == ["Hello", "1", "And?", "2"]
    err = capsys.readouterr().err
    assert "cpuinfer: there is nothing to save yet" in err
    assert "> And?\n  2\n" in err
    assert "* trip  " in err and "4 messages  scripted.gguf  Hello" in err
    other = made(Model(["3"]), tmp_path)
    other.run(Typist("Hi", "/save trip", "/save ../trip", "/load nowhere", "/load"))
    assert other.name not in ("trip", "../trip")
    err = capsys.readouterr().err
    assert "there is a session trip already" in err and ".. cannot" not in err
    assert "../trip cannot name a session" in err
    assert "there is no session nowhere" in err and "/load NAME" in err
    assert "trip" in made(Model(), tmp_path).choices("/load ")


def test_a_session_of_another_model_is_loaded_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(Model(["1"]), tmp_path, name="trip").run(Typist("Hello"))
    other = Model()
    other.path = Path("/models/other.gguf")
    made(other, tmp_path).run(Typist("/load trip"))
    assert "it was held with /models/scripted.gguf" in capsys.readouterr().err


def test_the_system_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = Model(["1"], ["2"])
    made(llm, tmp_path).run(Typist("/system Be brief.", "Hello", "/system", "/system none", "And?"))
    assert llm.asked == ["Be brief.|Hello>", "Hello|1|And?>"]
    assert capsys.readouterr().err.count("system prompt: Be brief.") == 2


def test_a_file_goes_before_the_next_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a b.txt").write_text("Some\ntext.\n")
    llm = Model(["1"], ["2"])
    directory = tmp_path / "sessions"
    made(llm, directory).run(Typist(f"/file {tmp_path}/a b.txt", "/tokens", "Why?", "And?"))
    assert llm.asked == ["Some\ntext.\n\nWhy?>", "Some\ntext.\n\nWhy?|1|And?>"]
    err = capsys.readouterr().err
    assert "a b.txt: 10 tokens, put before your next message" in err
    assert "file           10 tokens" in err and "room left      1,000 tokens" in err
    made(llm := Model(["1"]), directory).run(Typist(f"/file {tmp_path}/a b.txt", "/file", "Why?"))
    assert llm.asked == ["Why?>"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"caf\xe9", "it is not UTF-8 text (byte 3)"),
        (b"PK\0", "it is not text (byte 2)"),
        (b"x" * 1000, "1,000 tokens are more than the context of 1,000"),
        (None, "it is no file"),
    ],
)
def test_what_is_no_text_is_refused(
    data: bytes | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.mkdir() if data is None else path.write_bytes(data)
    chat = made(Model(), tmp_path / "sessions")
    chat.run(Typist(f"/file {path}", f"/file {tmp_path}/missing"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"cpuinfer: {path}: {problem}"
    assert second == f"cpuinfer: {tmp_path}/missing: No such file or directory"
    assert chat.waiting == []


def test_stats_sum_up_the_replies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(Model(["Good"], ["Yes."]), tmp_path).run(Typist("Hello", "And?", "/stats"))
    lines = capsys.readouterr().err.splitlines()
    assert "replies  2" in lines
    assert "read     22 tokens, - tok/s (0 more were known already)" in lines
    assert "written  8 tokens, - tok/s" in lines


def test_help_names_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(Model(), tmp_path).run(Typist("/help"))
    err = capsys.readouterr().err
    for name, command in slash.COMMANDS.items():
        assert f"/{name} {command.takes}" in err and command.does in err


def test_what_may_be_typed_next(tmp_path: Path) -> None:
    chat = made(Model(), tmp_path)
    assert set(chat.choices("")) == {f"/{name}" for name in slash.COMMANDS}
    assert {"temperature", "on_full"} <= set(chat.choices("/set "))
    assert set(chat.choices("/set on_full ")) == {"stop", "shift", "summarize"}
    assert chat.choices("/help ") == {} and chat.choices("/load ") == {}


# settings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top-k", "3", 3),
        ("stop", "'a b' c", ["a b", "c"]),
        ("logit_bias", "5=1 6=-inf", {5: 1.0, 6: float("-inf")}),
        ("ignore_eos", "on", True),
        ("repeat_last_n", "-1", -1),
        ("seed", "4", 4),
    ],
)
def test_settings_are_typed_as_they_are_shown(name: str, text: str, value: object) -> None:
    told = Conversation(cast(LLM, Model()), params={"max_tokens": 5})
    settings.change(told, name, text)
    name = name.replace("-", "_")
    assert told.params == {"max_tokens": 5, name: value}
    shown = settings.shown(told.params)[name]
    settings.change(told, name, shown)
    assert told.params[name] == value
    settings.change(told, name, "default")
    assert told.params == {"max_tokens": 5}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("temprature", "1", "there is no setting temprature, did you mean temperature?"),
        ("logprobs", "1", "there is no setting logprobs"),
        ("max_tokens", "many", "max_tokens cannot be 'many'"),
        ("top_p", "2", "top_p must be a number above 0, at most 1, got 2.0"),
        ("ignore_eos", "maybe", "ignore_eos cannot be 'maybe': on"),
        ("on_full", "burst", "on_full must be one of stop, shift, summarize, got 'burst'"),
        ("stop", "'a", "stop cannot be"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(name: str, text: str, problem: str) -> None:
    told = Conversation(cast(LLM, Model()))
    with pytest.raises(ValueError) as error:
        settings.change(told, name, text)
    assert str(error.value).startswith(problem)
    assert (told.params, told.on_full) == ({}, "stop")


def test_settings_are_set_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = made(Model(), tmp_path)
    chat.run(
        Typist("/set top_k 7", "/set on_full shift", "/set top-k", "/set", "/set x", "/set x 1")
    )
    assert (chat.conversation.params, chat.conversation.on_full) == ({"top_k": 7}, "shift")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["top_k 7", "on_full shift"]
    assert lines[2].startswith("top_k 7  (choose among")
    for line in ("temperature 0.8  (", "max_tokens default  (", "on_full shift  ("):
        assert sum(shown.startswith(line) for shown in lines) == 1
    assert sum("there is no setting x" in line for line in lines) == 2


# a terminal that cannot do more


def test_lines_are_joined_where_they_end_in_a_backslash(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one\\", "two\\", "three", "four"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    reader = LineReader()
    assert [reader.read(), reader.read("draft")] == ["one\ntwo\nthree", "four"]


def test_bytes_that_are_no_text_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xc3\xa9\n"), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", stdin)
    reader = LineReader()
    assert reader.read() == "caf\ufffd é"
    with pytest.raises(EOFError):
        reader.read()


# an editor


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_message_in_an_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\nprintf " more\\n\\377\\n" >> "$2"\n')
    editor.chmod(0o700)
    monkeypatch.setenv("EDITOR", f"'{editor}' -x")
    monkeypatch.delenv("VISUAL", raising=False)
    assert edited("some é") == "some é more\n\ufffd"
    monkeypatch.setenv("VISUAL", "false")
    assert edited("some") == "some"
    monkeypatch.setenv("VISUAL", f"{tmp_path}/missing")
    with pytest.raises(OSError):
        edited("some")
    monkeypatch.setenv("VISUAL", "'")
    with pytest.raises(ValueError, match="EDITOR"):
        edited("some")


# reports


def test_a_recap_is_short() -> None:
    assert report.short("a\n b\tc") == "a b c"
    assert report.short("x" * 1000) == "x" * 300 + "..."
