"""What a request gives back, whole and in pieces."""

import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from cpuinfer.generate import FinishReason


@dataclass(frozen=True)
class Timings:
    """Seconds from the request to the first token, and from there to the last."""

    prompt_seconds: float
    generation_seconds: float


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's natural log-probability, and those of the likeliest, by (text, logprob)."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed text: whole characters, and on the last one why it ended."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A finished text.  `token_ids` are all tokens chosen, those of a cut-off stop string too.

    `cached_tokens` of the prompt were still there from the request before and not computed again.
    `drafted_tokens` were guessed ahead and computed in one pass with the token before them, and
    `accepted_tokens` of these were what the sampler chose.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass
class Stream:
    """An iterator of Chunk; when it has ended, `completion` is the whole."""

    _chunks: Generator[Chunk, None, Completion] = field(repr=False)
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)
    completion: Completion | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        try:
            return next(self._chunks)
        except StopIteration as end:
            self.completion = self.completion or end.value
            raise

    def close(self) -> None:
        """End the request now; a thread that waits for the next chunk gets models.llama.Cancelled
        between two layers."""
        self._cancel.set()
        with suppress(ValueError):  # the generator is at work in that thread
            self._chunks.close()
