"""A conversation: what has been said, what of it the model reads, and the next reply.

Without a sliding window the context ends some day; `on_full` says what happens then.  Messages stay
in `messages` whatever it is: at most they are not read any more, and the person is told so.
"""

from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

from cpuinfer.completion import Completion, Stream
from cpuinfer.llm import LLM, Message

OnFull = Literal["stop", "shift", "summarize"]
ON_FULL: tuple[OnFull, ...] = ("stop", "shift", "summarize")

_CHOICES = "take something back, begin anew, or let on_full be shift or summarize"
_SUMMARIZE = (
    "Summarize our conversation so far for yourself: facts, names, decisions and open questions, "
    "in at most {words} words."
)


class ContextFull(ValueError):
    """There is no room for a reply; str() has the numbers and what can be done."""


class Conversation:
    """Messages in turns, the person's first.

    `system` and `params` (fields of SamplingParams) may be changed at any time.  `notice` is called
    with a line that the person should read.
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
        self.ids: list[int] = []  # what the model has read and written
        self.completion: Completion | None = None
        self._tries = 0

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and reply may have together; None: a window, and no end."""
        return None if self.llm.endless else self.llm.context_length

    def used(self) -> int:
        """Tokens of what has been said, as the model would read it."""
        return len(self._prompt(self.messages[self.unread :])) if self.messages else 0

    def say(self, text: str) -> Generator[str, None, None]:
        """The reply to `text`, piece by piece.

        Closed early, or by an exception, it is kept as far as it came; a message without any reply
        is not.  ContextFull where there is no room, and the errors of LLM.chat.
        """
        self._tries = 0
        yield from self._answer({"role": "user", "content": text}, None)

    def retry(self) -> Generator[str, None, None]:
        """Another reply to the last message; ValueError if there is none.

        With a seed among the settings, the one after the last is taken.
        """
        if not self.messages:
            raise ValueError("there is no reply to try again")
        message, old = self.messages[-2:]
        del self.messages[-2:]
        self._tries += 1
        yield from self._answer(message, old)

    def undo(self) -> str:
        """Take back the last message and its reply: the message; ValueError if there is none."""
        if not self.messages:
            raise ValueError("there is nothing to take back")
        text = str(self.messages[-2]["content"])
        del self.messages[-2:]
        self.unread = min(self.unread, len(self.messages))
        return text

    # --- a reply ---

    def _answer(self, message: Message, old: Message | None) -> Generator[str, None, None]:
        """A reply to `message`, in the place of `old`, which stays if there is none."""
        said, tokens = "", list[int]()
        prompt = self.ids
        try:
            prompt = self._fitting_prompt(message)
            while True:
                with closing(self._stream(prompt, tokens)) as stream:
                    for chunk in stream:
                        said += chunk.text
                        tokens += chunk.token_ids
                        yield chunk.text
                self.completion = stream.completion
                limit = self.context_length
                if limit is None or len(prompt) + len(tokens) < limit or self.on_full == "stop":
                    break
                try:
                    prompt = self._make_room(message, limit, len(tokens))
                except ContextFull:
                    break
        finally:
            if said:
                self.messages += [message, {"role": "assistant", "content": said}]
                self.ids = [*prompt, *tokens]
            elif old:
                self.messages += [message, old]
        self._warn(bool(said))

    def _stream(self, prompt: Sequence[int], said: Sequence[int]) -> Stream:
        room = self.context_length or self.llm.config.context_length + len(prompt)
        most = self.params.get("max_tokens", room - len(prompt)) - len(said)
        seeded = {"seed": self.params["seed"] + self._tries} if "seed" in self.params else {}
        return self.llm.stream_reply(prompt, said, **self.params | seeded | {"max_tokens": most})

    def _warn(self, said: bool) -> None:
        limit, used = self.context_length, len(self.ids)
        if not said:
            self.notice("the model has nothing to say to this; the message is not kept")
        elif limit is not None and used >= limit:
            self.notice(f"the reply ends here, the context of {limit} tokens is full")
        elif limit is not None and self.on_full == "stop" and used > limit - limit // 8:
            self.notice(f"{used} of {limit} tokens of the context are used; {_CHOICES}")

    # --- what the model reads ---

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        summary = self.summary and f"Summary of our conversation so far: {self.summary}"
        system = "\n\n".join(filter(None, (self.system, summary)))
        front: list[Message] = [{"role": "system", "content": system}] if system else []
        return self.llm.prompt_ids([*front, *messages], previous_ids=self.ids)

    def _fitting_prompt(self, message: Message) -> list[int]:
        """All that is read and `message`, or less where it leaves too little room for a reply."""
        prompt = self._prompt([*self.messages[self.unread :], message])
        limit = self.context_length
        if limit is None or len(prompt) + limit // (16 if self.on_full == "stop" else 4) <= limit:
            return prompt
        if self.on_full == "stop":
            raise ContextFull(
                f"with this message {len(prompt)} of {limit} tokens of the context would be used, "
                f"which leaves no room for a reply; {_CHOICES}"
            )
        return self._make_room(message, limit, 0)

    def _make_room(self, message: Message, limit: int, written: int) -> list[int]:
        """Leave out the oldest exchanges until half of the context is free: the prompt then, for a
        reply that has `written` tokens already.  ContextFull where that does not help."""
        summary = limit // 8 if self.on_full == "summarize" else 0
        starts = range(self.unread, len(self.messages) + 1, 2)

        def tokens(start: int) -> int:
            return len(self._prompt([*self.messages[start:], message])) + written + summary

        place = bisect_left(starts, -(limit // 2), key=lambda start: -tokens(start))
        start = starts[min(place, len(starts) - 1)]
        if (needed := tokens(start)) + limit // 16 > limit:
            raise ContextFull(
                f"the last message and its reply alone take {needed} of {limit} tokens of the "
                "context: ask for less at once, or begin anew"
            )
        if start > self.unread:
            left_out = f"{start - self.unread} earlier messages"
            if summary:
                self.notice(f"the context is full: {left_out} are being summarized")
                self.summary = self._summarized(start, limit)
                self.notice(f"instead of {left_out} the model reads: {self.summary}")
            else:
                self.notice(f"the context is full: {left_out} are not read by the model any more")
            self.unread = start
        return self._prompt([*self.messages[start:], message])

    def _summarized(self, end: int, limit: int) -> str:
        """The model's own summary of the messages before `end`, on one line."""
        ask = {"role": "user", "content": _SUMMARIZE.format(words=limit // 16)}
        begin, most = self.unread, limit // 8
        prompt = self._prompt([*self.messages[begin:end], ask])
        while len(prompt) + most > limit and begin < end:
            begin += 2
            prompt = self._prompt([*self.messages[begin:end], ask])
        if begin > self.unread:
            self.notice(f"the first {begin - self.unread} of them have no room in the summary")
        with closing(self.llm.stream_reply(prompt, temperature=0, max_tokens=most)) as stream:
            return " ".join("".join(chunk.text for chunk in stream).split())
