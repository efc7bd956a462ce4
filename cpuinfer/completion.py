"""What a request gives back, whole and in pieces."""

from collections.abc import Iterator
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
    """A finished text.  `token_ids` are all tokens chosen, those of a cut-off stop string too."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass
class Stream:
    """An iterator of Chunk; when it has ended, `completion` is the whole."""

    _chunks: Iterator[Chunk] = field(repr=False)
    completion: Completion | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the request now."""
        self._chunks.close()  # type: ignore[attr-defined]
