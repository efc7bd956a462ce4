"""The chat in a terminal: a line is read, the reply is streamed, and both are remembered."""

import io
import itertools
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from importlib import import_module
from typing import Any

from cpuinfer.generate import ContextLengthExceeded
from cpuinfer.llm import LLM, Message
from cpuinfer.progress import Progress

_PROMPT = "> "


class Conversation:
    """What has been said so far, and how the next reply is chosen."""

    def __init__(
        self, llm: LLM, system: str | None, params: Mapping[str, Any], progress: Progress
    ) -> None:
        self._llm = llm
        self._params = params
        self._progress = progress
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._first = len(self.messages)  # what comes before is never forgotten

    def say(self, text: str) -> None:
        """Stream the reply to `text` to standard output; both become part of the conversation.

        An interrupted reply (KeyboardInterrupt) is kept as far as it was shown; a message without
        any reply is not kept. Where the conversation outgrows the context, its oldest exchange is
        forgotten; ContextLengthExceeded when the message alone does.
        """
        self.messages.append({"role": "user", "content": text})
        while True:
            try:
                return self._reply()
            except ContextLengthExceeded:
                if len(self.messages) - self._first < 3:
                    self.messages.pop()
                    raise
                del self.messages[self._first : self._first + 2]
                print("cpuinfer: the oldest exchange no longer fits the context", file=sys.stderr)

    def _reply(self) -> None:
        reply = ""
        try:
            with closing(self._llm.stream_chat(self.messages, **self._params)) as stream:
                with self._progress:
                    first = next(stream)
                for chunk in itertools.chain([first], stream):
                    reply += chunk.text
                    _write(chunk.text)
        except KeyboardInterrupt:
            if reply:
                self._remember(reply)
            else:
                self.messages.pop()
            _write("\n")
            raise
        self._remember(reply)
        _write("\n")

    def _remember(self, reply: str) -> None:
        self.messages.append({"role": "assistant", "content": reply})


def chat(conversation: Conversation) -> None:
    """Messages from the terminal until its end (Ctrl-D); KeyboardInterrupt where Ctrl-C is typed
    instead of a message."""
    with suppress(ImportError):  # input() edits lines and remembers them where this is loaded
        import_module("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = _read_line()
        except EOFError:
            _write("\n")
            return
        if not line.strip():
            continue
        try:
            conversation.say(line)
        except KeyboardInterrupt:
            continue
        except ContextLengthExceeded as error:
            print(f"cpuinfer: {error}", file=sys.stderr)


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
