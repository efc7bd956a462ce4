"""A conversation: what has been said, what of it the model reads, and the next reply.

Without a sliding window the context ends some day; `on_full` says what happens then.  Messages stay
in `messages` whatever it is: at most they are not read any more, and the person is told so.
"""

from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from cpuinfer.completion import Completion, Stream
from cpuinfer.llm import LLM, Message

OnFull = Literal["stop", "shift", "summarize"]
ON_FULL: tuple[OnFull, ...] = ("stop", "shift", "summarize")

_CHOICES = (
    "take something back (/undo), begin anew (/clear), or let the oldest go "
    "(/set on_full shift, or summarize)"
)
_SUMMARIZE = (
    "Summarize our conversation so far for yourself: facts, names, decisions and open questions, "
    "in at most {words} words."
)

# Parts of the context.  A message is answered if a SHORT reply fits behind it.  Where older ones
# may be left out, a quarter is wanted for the reply, and if there is less, half of the context is
# made free: so that all is read again once in a while and not with every message.
_SHORT, _WANTED, _KEPT = 1 / 16, 1 / 4, 1 / 2
_SUMMARY = 1 / 8
_NEARLY_FULL = 7 / 8


class ContextFull(ValueError):
    """There is no room for a reply; str() has the numbers and what can be done."""


@dataclass(frozen=True)
class _Reading:
    """What the model reads for a reply: `prompt`, which leaves out the first `unread` messages and
    has a summary of them, if any."""

    prompt: list[int]
    unread: int
    summary: str | None


class Conversation:
    """Messages in turns, the person's first.

    `system` and `params` (fields of SamplingParams) may be changed at any time; a reply that no
    `max_tokens` limits has all the room there is, of an endless context as much as the model was
    trained for.  `notice` is called with a line that the person should read.
    """

    def __init__(
        self,
        llm: LLM,
        system: str | None = None,
        params: Mapping[str, Any] | None = None,
        on_full: OnFull = "stop",
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.llm = llm
        self.system = system
        self.params = dict(params or {})
        self.on_full = on_full
        self.notice = notice
        self.clear()

    def clear(self) -> None:
        """Begin anew, with the same instructions and settings."""
        self.messages: list[Message] = []
        self.unread = 0  # messages at the beginning that the model does not read any more
        self.summary: str | None = None  # of these
        self.ids: list[int] = []  # what the model has read and written last
        self.tries = 0  # replies to the last message before the one that there is
        self.completion: Completion | None = None

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and reply may have together; None: a window, and no end."""
        return None if self.llm.endless else self.llm.context_length

    def used(self) -> int:
        """Tokens of what has been said, as the model would read it."""
        if not self.messages:
            return 0
        *before, reply = self.messages[self.unread :]
        # Not every template takes a conversation that ends with a reply.
        written = self.llm.tokenizer.encode(str(reply["content"]), add_bos=False)
        return len(self._prompt(before, self.summary)) + len(written)

    def say(self, text: str) -> Generator[str, None, None]:
        """The reply to `text`, piece by piece.

        Closed early, or by an exception, it is kept as far as it came; a message without any reply
        is not.  ContextFull where there is no room, and the errors of LLM.chat.
        """
        yield from self._answer({"role": "user", "content": text}, tries=0)

    def retry(self) -> Generator[str, None, None]:
        """Another reply to the last message, in the place of the one there is as soon as it begins;
        ValueError if there is none.

        With a seed among the settings, the one after the last is taken.
        """
        if not self.messages:
            raise ValueError("there is no reply to try again")
        exchange, reading = self.messages[-2:], (self.unread, self.summary)
        self._cut()
        before = len(self.messages)
        try:
            yield from self._answer(exchange[0], self.tries + 1)
        finally:
            if len(self.messages) == before:
                self.messages += exchange
                self.unread, self.summary = reading

    def undo(self) -> str:
        """Take back the last message and its reply: the message; ValueError if there is none."""
        if not self.messages:
            raise ValueError("there is nothing to take back")
        text = str(self.messages[-2]["content"])
        self._cut()
        return text

    # --- a reply ---

    def _cut(self) -> None:
        """Take out the last exchange; where nothing is read any more then, all is read again."""
        del self.messages[-2:]
        if self.unread >= len(self.messages):
            self.unread, self.summary = 0, None

    def _answer(self, message: Message, tries: int) -> Generator[str, None, None]:
        reading = self._reading(message)
        said, tokens = "", list[int]()
        self.completion = None
        try:
            with closing(self._stream(reading.prompt, tries)) as stream:
                for chunk in stream:
                    said += chunk.text
                    tokens += chunk.token_ids
                    yield chunk.text
            self.completion = stream.completion
        finally:
            if said:
                self.messages += [message, {"role": "assistant", "content": said}]
                self.unread, self.summary = reading.unread, reading.summary
                self.ids = [*reading.prompt, *tokens]
                self.tries = tries
        self._warn(bool(said))

    def _stream(self, prompt: Sequence[int], tries: int) -> Stream:
        room = self.context_length or len(prompt) + self.llm.config.context_length
        params = {"max_tokens": room - len(prompt), **self.params}
        if params.get("seed") is not None:
            params["seed"] += tries
        return self.llm.stream_reply(prompt, **params)

    def _warn(self, said: bool) -> None:
        limit, used = self.context_length, len(self.ids)
        if not said:
            self.notice("the model has nothing to say to this")
        elif limit is not None and used >= limit:
            self.notice(f"the reply ends here, the context of {limit} tokens is full")
        elif limit is not None and self.on_full == "stop" and used > _NEARLY_FULL * limit:
            self.notice(f"{used} of {limit} tokens of the context are used; {_CHOICES}")

    # --- what the model reads ---

    def _prompt(self, messages: Sequence[Message], summary: str | None) -> list[int]:
        told = summary and f"Summary of our conversation so far: {summary}"
        system = "\n\n".join(filter(None, (self.system, told)))
        front: list[Message] = [{"role": "system", "content": system}] if system else []
        return self.llm.prompt_ids([*front, *messages], previous_ids=self.ids)

    def _reading(self, message: Message) -> _Reading:
        """All that is read so far and `message`, or less where that leaves too little room."""
        prompt = self._prompt([*self.messages[self.unread :], message], self.summary)
        limit = self.context_length
        room = _SHORT if self.on_full == "stop" else _WANTED
        if limit is None or len(prompt) <= (1 - room) * limit:
            return _Reading(prompt, self.unread, self.summary)
        if self.on_full == "stop":
            raise ContextFull(
                f"with this message {len(prompt)} of {limit} tokens of the context would be used, "
                f"which leaves no room for a reply; {_CHOICES}"
            )
        return self._shorter(message, limit)

    def _shorter(self, message: Message, limit: int) -> _Reading:
        """The newest exchanges and `message`, with a summary of the others if there is to be one;
        ContextFull where the message alone is too long."""
        summary = None if self.on_full == "summarize" else self.summary
        reserved = _SUMMARY * limit if self.on_full == "summarize" else 0.0

        def prompt(start: int) -> list[int]:
            return self._prompt([*self.messages[start:], message], summary)

        starts = range(self.unread + 2, len(self.messages) + 1, 2)
        most = _KEPT * limit - reserved
        place = bisect_left(starts, -most, key=lambda start: -len(prompt(start)))
        start = starts[min(place, len(starts) - 1)] if starts else self.unread
        if (needed := len(prompt(start))) > (1 - _SHORT) * limit:
            raise ContextFull(
                f"the system prompt and this message alone take {needed} of {limit} tokens of the "
                "context: ask for less at once"
            )
        if start == self.unread:
            return _Reading(prompt(start), start, summary)
        left_out = f"{start - self.unread} earlier messages"
        if reserved and needed + reserved <= (1 - _SHORT) * limit:
            self.notice(f"the context is full: {left_out} are being summarized")
            summary = self._summarized(start, limit) or self.summary
        if summary and reserved:
            self.notice(f"instead of {left_out} the model reads: {summary}")
        else:
            self.notice(f"the context is full: {left_out} are not read by the model any more")
        return _Reading(prompt(start), start, summary)

    def _summarized(self, end: int, limit: int) -> str:
        """The model's own summary of the messages before `end`, on one line; "" if none of them
        have room, or it says nothing."""
        ask = {"role": "user", "content": _SUMMARIZE.format(words=limit // 16)}
        most = int(_SUMMARY * limit)
        for begin in range(self.unread, end, 2):
            prompt = self._prompt([*self.messages[begin:end], ask], self.summary)
            if len(prompt) + most <= limit:
                break
        else:
            return ""
        if begin > self.unread:
            self.notice(f"the first {begin - self.unread} of them have no room in the summary")
        with closing(self.llm.stream_reply(prompt, temperature=0, max_tokens=most)) as stream:
            return " ".join("".join(chunk.text for chunk in stream).split())
