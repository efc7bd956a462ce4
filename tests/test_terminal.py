"""What a conversation remembers."""

import io
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from command import environment, warm

from cpuinfer.completion import Chunk, Stream
from cpuinfer.generate import ContextLengthExceeded
from cpuinfer.llm import LLM
from cpuinfer.progress import Progress
from cpuinfer.terminal import Conversation, chat


class Scripted:
    """Answers with given pieces, None being Ctrl-C; has room for so many characters."""

    def __init__(self, *replies: Sequence[str | None], room: int = 1000) -> None:
        self._replies = iter(replies)
        self._room = room
        self.asked: list[list[str]] = []

    def stream_chat(self, messages: Sequence[dict[str, Any]], **params: Any) -> Stream:
        said = [message["content"] for message in messages]
        return Stream(self._chunks(said))

    def _chunks(self, said: list[str]) -> Iterator[Chunk]:
        if len("".join(said)) > self._room:
            raise ContextLengthExceeded(len("".join(said)), self._room)
        self.asked.append(said)
        for piece in next(self._replies):
            if piece is None:
                raise KeyboardInterrupt
            yield Chunk(piece)


def conversation(llm: Scripted, system: str | None = None) -> Conversation:
    return Conversation(cast(LLM, llm), system, {}, Progress(io.StringIO()))


def said(told: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in told.messages]


def test_replies_are_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    llm = Scripted(["Good ", "day."], [""])
    told = conversation(llm, "Be brief.")
    told.say("Hello")
    told.say("And?")
    assert llm.asked == [["Be brief.", "Hello"], ["Be brief.", "Hello", "Good day.", "And?"]]
    assert said(told)[-2:] == [("user", "And?"), ("assistant", "")]
    assert capsys.readouterr().out == "Good day.\n\n"


def test_an_interrupted_reply_is_kept_as_far_as_it_went(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = conversation(Scripted(["Good ", None], [None]))
    with pytest.raises(KeyboardInterrupt):
        told.say("Hello")
    assert said(told) == [("user", "Hello"), ("assistant", "Good ")]
    with pytest.raises(KeyboardInterrupt):
        told.say("And?")
    assert said(told) == [("user", "Hello"), ("assistant", "Good ")]
    assert capsys.readouterr().out == "Good \n\n"


def test_the_oldest_exchange_is_forgotten_when_the_context_is_full(
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = Scripted(["1" * 10], ["2" * 10], ["3"], room=40)
    told = conversation(llm, "S")
    for text in ("a" * 10, "b" * 10, "c" * 10):
        told.say(text)
    assert llm.asked[-1] == ["S", "b" * 10, "2" * 10, "c" * 10]
    assert capsys.readouterr().err == "cpuinfer: the oldest exchange no longer fits the context\n"
    before = said(told)
    with pytest.raises(ContextLengthExceeded):
        told.say("d" * 100)
    assert said(told) == before[:1]


def test_a_message_that_is_too_long_does_not_end_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = Scripted([None], ["Yes."], room=40)
    lines = ["first", "x" * 50, "Still there?"]

    def read(*_: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    chat(conversation(llm))
    assert llm.asked == [["first"], ["Still there?"]]
    out, err = capsys.readouterr()
    assert out == "\nYes.\n\n"
    assert "50 tokens" in err


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_in_a_real_terminal(tmp_path: Path) -> None:
    warm()
    template = tmp_path / "story.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    ours, theirs = os.openpty()
    script = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from cpuinfer.cli import main; sys.exit(main())"
    )
    argv = [sys.executable, "-c", script, "chat", "--template", str(template)]
    process = subprocess.Popen(
        [*argv, "-n", "1900", "--ignore-eos"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,  # so that the terminal can become its own, and send it Ctrl-C
        env=environment(TERM="dumb"),
    )
    os.close(theirs)

    unread = b""

    def read_until(words: bytes) -> bytes:
        """What is shown up to these words; the rest waits for the next call."""
        nonlocal unread
        while words not in unread:
            assert select.select([ours], [], [], 60)[0], unread
            unread += os.read(ours, 1000)
        shown, unread = unread.split(words, 1)
        return shown + words

    with process, ExitStack() as cleanup:
        cleanup.callback(process.kill)  # or leaving would wait for it
        assert b"demo.gguf: context 2048" in read_until(b"\n> ")
        os.write(ours, b"Once \xff upon\n")
        read_until(b"\n")  # the echo
        read_until(b" ")  # of the reply
        os.write(ours, b"\x03")
        read_until(b"\n> ")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            # Between its prompt and its select(), readline does not notice a signal: type again.
            os.write(ours, b"\x03")
            time.sleep(0.2)
        assert process.wait(timeout=1) == 130
    os.close(ours)
