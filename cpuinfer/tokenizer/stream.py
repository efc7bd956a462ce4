"""Ids -> text, one id at a time: only whole characters, every space once, no stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpuinfer.tokenizer import Tokenizer


class StreamDecoder:
    """The text of a sequence of ids as it grows.

    `StreamDecoder(tokenizer)` starts a text: joined, the results of `add` and `finish` are
    `tokenizer.decode(ids)`. `StreamDecoder(tokenizer, prompt_ids)` continues the text of
    `prompt_ids`, which is not given out again: the results, put behind it, are
    `tokenizer.decode(prompt_ids + ids)`, so the space before the first word stays if the prompt
    had any text. A reply in a chat starts a text.

    One to three bytes of an unfinished character are held back. Bytes that no further byte can
    make into a character become U+FFFD at once (those of a surrogate with its third byte),
    unfinished ones in `finish`.
    """

    def __init__(self, tokenizer: "Tokenizer", previous_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.add_space_prefix
        self._text(b"".join([tokenizer.token_bytes(token) for token in previous_ids]))

    def add(self, token: int) -> str:
        """The text that is complete with this token and was not before; often "" within bytes."""
        return self._text(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What was held back: "" or one U+FFFD. Nothing may be added afterwards."""
        return self._characters.decode(b"", final=True)

    def _text(self, data: bytes) -> str:
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._characters.decode(data)


class StopStrings:
    """Holds text back as long as its end may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What is safe to show. A complete stop string sets `found` and is not shown."""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if places:
            self.found = True
            shown, self._held = self._held[: min(places)[0]], ""
            return shown
        longest = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._ends_with(stop[:n])),
            default=0,
        )
        cut = len(self._held) - longest
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The rest: it can no longer become a stop string."""
        return self._held

    def _ends_with(self, beginning: str) -> bool:
        return self._held.endswith(beginning)
