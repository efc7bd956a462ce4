"""Messages typed with prompt_toolkit, key by key, in a pseudo-terminal."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

import pty
import termios
import time
import tty

from prompt_toolkit.application import create_app_session
from prompt_toolkit.buffer import Buffer

from cpuinfer.terminal.prompt import PromptReader
from cpuinfer.terminal.reader import LineReader, reader

CHOICES = {"": {"/set": "a setting", "/save": "save"}, "/set ": {"top_k": "a number", "top_p": ""}}


class Keyboard:
    """The other end of a terminal: types, and keeps what is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cleanup: ExitStack) -> None:
        self._monkeypatch = monkeypatch
        self._cleanup = cleanup
        self._end, self.terminal = pty.openpty()
        cleanup.callback(os.close, self._end)
        cleanup.callback(os.close, self.terminal)
        self.shown = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._end, 1000):
                self.shown += data
        except OSError:
            pass  # the terminal has been closed

    def plug_in(self, encoding: str = "utf-8") -> None:
        """Make the terminal standard input and output, which pytest sets anew for each test."""
        for name, mode in (("stdin", "r"), ("stdout", "w")):
            path = os.ttyname(self.terminal)
            stream = self._cleanup.enter_context(Path(path).open(mode, encoding=encoding))  # noqa: SIM115
            self._monkeypatch.setattr(sys, name, stream)

    def type(self, keys: str | bytes) -> None:
        os.write(self._end, keys.encode() if isinstance(keys, str) else keys)

    def type_later(
        self, lines: PromptReader, *steps: tuple[Callable[[Buffer], object], str]
    ) -> None:
        """Each text when the prompt, with what was typed before, is as the condition says."""
        buffer = lines._session.default_buffer

        def run() -> None:
            end = time.monotonic() + 10
            for condition, keys in steps:
                while not (lines._session.app.is_running and condition(buffer)):
                    if time.monotonic() > end:
                        self.type("\x03\x03")
                        return
                    time.sleep(0.01)
                self.type(keys)

        threading.Thread(target=run, daemon=True).start()

    def type_raw(self, keys: str | bytes) -> None:
        """Before there is a prompt, without the terminal making lines of it."""
        tty.setraw(self.terminal)
        self.type(keys)


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keyboard]:
    monkeypatch.setenv("TERM", "xterm-256color")
    with create_app_session(), ExitStack() as cleanup:
        yield Keyboard(monkeypatch, cleanup)


def prompt(keyboard: Keyboard, history: Path | None = None) -> PromptReader:
    keyboard.plug_in()
    return PromptReader(history, lambda before: CHOICES.get(before, {}), lambda: None)


def empty(buffer: Buffer) -> bool:
    return not buffer.text


def typed(keyboard: Keyboard, keys: str | bytes, draft: str = "") -> str:
    keyboard.type_raw(keys)
    return prompt(keyboard).read(draft)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("Hello\r", "Hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),  # Alt-Enter
        ("one\ntwo\r", "one\ntwo"),  # Ctrl-J
        ("one\\\rtwo\\\\\r\r", "one\ntwo\\\n"),
        ("a\\b\r", "a\\b"),
        ("\x1b[200~one\r\ntwo\n\nthree\x1b[201~\r", "one\ntwo\n\nthree"),
        ("half\x03whole\r", "whole"),  # Ctrl-C
        (b"caf\xe9 \xc3\xa9\r", "caf\ufffd é"),
    ],
)
def test_keys(keys: str | bytes, text: str, keyboard: Keyboard) -> None:
    assert typed(keyboard, keys) == text


def test_a_draft_is_there_to_be_edited(keyboard: Keyboard) -> None:
    assert typed(keyboard, "\x7f!\r", draft="Hello?") == "Hello!"


@pytest.mark.parametrize(("key", "error"), [("\x03", KeyboardInterrupt), ("\x04", EOFError)])
def test_leaving(key: str, error: type[BaseException], keyboard: Keyboard) -> None:
    with pytest.raises(error):
        typed(keyboard, key)


def test_commands_are_completed(keyboard: Keyboard) -> None:
    lines = prompt(keyboard)
    keyboard.type_later(lines, (empty, "/sa\t"), (lambda b: b.text == "/save", "\r"))
    assert lines.read() == "/save"


def test_enter_takes_what_is_chosen_in_the_menu(keyboard: Keyboard) -> None:
    lines = prompt(keyboard)
    keyboard.type_later(
        lines,
        (empty, "/set t\t"),
        (lambda b: b.complete_state, "\t"),
        (lambda b: b.text == "/set top_k", "\r 1\r"),
    )
    assert lines.read() == "/set top_k 1"


def test_paths_are_completed(keyboard: Keyboard, tmp_path: Path) -> None:
    (tmp_path / "a long name.txt").touch()
    lines = prompt(keyboard)
    found = f"/file {tmp_path}/a long name.txt"
    keyboard.type_later(lines, (empty, f"/file {tmp_path}/a\t"), (lambda b: b.text == found, "\r"))
    assert lines.read() == found


@pytest.mark.parametrize("keys", ["\x07", "\x18\x05"])  # Ctrl-G, Ctrl-X Ctrl-E
def test_an_editor(
    keys: str, keyboard: Keyboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf more >> "$1"\n')
    editor.chmod(0o700)
    monkeypatch.setenv("VISUAL", str(editor))
    lines = prompt(keyboard)
    keyboard.type_later(lines, (empty, f"some{keys}"), (lambda b: b.text == "somemore", "!\r"))
    assert lines.read() == "somemore!"


def test_messages_come_back_in_the_next_run(
    keyboard: Keyboard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = tmp_path / "history"
    keyboard.type_raw("one\x1b\rtwo\r")
    lines = prompt(keyboard, history)
    lines.read()
    assert history.stat().st_mode & 0o777 == 0o600
    keyboard.type_raw("\x1b[A\r")
    assert PromptReader(history, lambda _: {}, lambda: None).read() == "one\ntwo"
    history.unlink()
    history.mkdir()  # one that can be neither read nor written is no reason to stop
    keyboard.type_raw("three\r")
    assert PromptReader(history, lambda _: {}, lambda: None).read() == "three"
    assert b"rror" not in keyboard.shown and not caplog.records


def test_what_is_typed_during_a_reply_is_the_next_messages(keyboard: Keyboard) -> None:
    lines = prompt(keyboard)
    before = termios.tcgetattr(keyboard.terminal)
    with lines.listening():
        keyboard.type("one\rtwo\r\x1b[200~three\rfour\x1b[201~\r")
        time.sleep(0.1)  # an echo would come at once
        assert b"one" not in keyboard.shown
        assert [lines.read() for _ in range(3)] == ["one", "two", "three\nfour"]
        time.sleep(0.1)
        assert keyboard.shown.endswith(b"\x1b[?2004h")  # a paste is still marked as one
    assert termios.tcgetattr(keyboard.terminal) == before


@pytest.mark.parametrize(
    ("term", "encoding", "kind"),
    [
        ("xterm", "utf-8", PromptReader),
        ("dumb", "utf-8", LineReader),
        ("xterm", "iso-8859-1", LineReader),
    ],
)
def test_the_best_that_the_terminal_allows(
    term: str, encoding: str, kind: type, keyboard: Keyboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    keyboard.plug_in(encoding)
    assert isinstance(reader(None, lambda _: {}, lambda: None), kind)


def test_what_waits_for_a_prompt_is_called_once(keyboard: Keyboard) -> None:
    called = threading.Semaphore(0)
    keyboard.plug_in()
    lines = PromptReader(None, lambda _: {}, called.release)
    for text in ("one", "two"):
        keyboard.type_raw(f"{text}\r")
        assert lines.read() == text
    assert called.acquire(timeout=10)
    assert not called.acquire(timeout=0.1)
