"""Token ids in, token ids out: prefill, decode, and when to stop.  Knows nothing of text."""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from cpuinfer.cache import KVCache
from cpuinfer.models.llama import Span
from cpuinfer.sampling import Sampled, Sampler
from cpuinfer.speculate import Costs, Drafts

Floats = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]


class Model(Protocol):
    """What generation needs of a model: see models/llama.py."""

    chunk: int
    limit: int | None  # positions a text may have; None: a ring, which never ends

    def forward(self, spans: Sequence[Span], cancel: threading.Event | None = None) -> Floats: ...


class ContextLengthExceeded(ValueError):
    """A prompt leaves no room for a token; says both numbers."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the context is {context_length}: "
            "shorten the prompt or raise the context length"
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


@dataclass
class Generation:
    """A request on its way: its ids so far and, when it has ended by itself, why.

    Of `drafted` tokens `accepted` were what the sampler chose.
    """

    prompt: Sequence[int]
    tokens: list[int]
    finish_reason: FinishReason | None = None
    drafted: int = 0
    accepted: int = 0


def prefill(
    model: Model,
    prompt: Sequence[int],
    cache: KVCache,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
    n_logits: int = 1,
) -> Iterator[Floats]:
    """Append `prompt` to `cache` chunk by chunk and yield each chunk's logits.

    A chunk's logits are those of its tokens among the last `n_logits` of the prompt, (n, V) with n
    possibly 0.  `progress(done, total)` is called after each chunk.
    """
    for start in range(0, len(prompt), model.chunk):
        some = prompt[start : start + model.chunk]
        end = start + len(some)
        wanted = max(0, end - max(start, len(prompt) - n_logits))
        yield _append(model, some, cache, wanted, cancel)
        if progress is not None:
            progress(end, len(prompt))


def decode(
    model: Model, tokens: Sequence[int], cache: KVCache, cancel: threading.Event | None = None
) -> Floats:
    """Append some tokens; the logits (T, V) of what comes after each."""
    return _append(model, tokens, cache, len(tokens), cancel)


def generate(
    model: Model,
    generation: Generation,
    sampler: Sampler,
    eog_ids: Collection[int],
    cache: KVCache,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
    costs: Costs | None = None,
) -> Iterator[Sampled]:
    """Continue a prompt of which `cache` holds the beginning, if anything, but not all.

    Each token is yielded when it is chosen, and `generation` kept up to date: "stop" after an id
    of `eog_ids`, which is not yielded, "length" after max_tokens or when the context is full.
    With `costs` tokens are drafted where that is faster; the tokens chosen are the same.  The cache
    may hold more drafts than tokens were chosen whenever this is left.

    ValueError without a prompt, ContextLengthExceeded if it fills the context, NumericsError for
    logits that are not numbers.
    """
    prompt = generation.prompt
    if not len(prompt):
        raise ValueError("there is no prompt, and the model has no BOS token to begin with")
    left = sampler.params.max_tokens
    if model.limit is not None:
        if len(prompt) >= model.limit:
            raise ContextLengthExceeded(len(prompt), model.limit)
        left = min(left, model.limit - len(prompt))
    *_, rows = prefill(model, prompt[cache.offset :], cache, cancel, progress)
    history = list(prompt)
    # What a ring has lost is not quoted: an endless text takes no more memory than a long one.
    drafts = None if costs is None else Drafts(prompt[-cache.capacity :], costs)
    draft: list[int] = []
    while True:
        for logits, drafted in zip(rows, [*draft, None], strict=True):
            sampled = sampler.sample(logits, history)
            if sampled.token in eog_ids:
                generation.finish_reason = "stop"
                return
            if sampled.token != drafted:  # before the token is given away: nothing may follow that
                cache.rewind(len(history))
            history.append(sampled.token)
            generation.tokens.append(sampled.token)
            generation.accepted += sampled.token == drafted
            left -= 1
            if left == 0:
                generation.finish_reason = "length"
            yield sampled
            if left == 0:
                return
            if drafts is not None:
                drafts.append(sampled.token)
            if sampled.token != drafted:
                break
        if drafts is None:
            rows = decode(model, history[-1:], cache, cancel)
        else:
            draft, rows = _decode_draft(model, history, drafts, left, cache, cancel)
            generation.drafted += len(draft)


def _decode_draft(
    model: Model,
    history: Sequence[int],
    drafts: Drafts,
    left: int,
    cache: KVCache,
    cancel: threading.Event | None,
) -> tuple[list[int], Floats]:
    """Append the last token and those drafted to follow it, `left` together at most: the draft, and
    the logits of what comes after each."""
    draft = drafts.draft(min(left, model.chunk))
    start = drafts.costs.clock()
    rows = decode(model, [history[-1], *draft], cache, cancel)
    drafts.costs.record(len(rows), drafts.costs.clock() - start)
    return draft, rows


def _append(
    model: Model,
    tokens: Sequence[int],
    cache: KVCache,
    n_logits: int,
    cancel: threading.Event | None,
) -> Floats:
    return model.forward([Span(np.asarray(tokens, np.int32), cache, n_logits)], cancel)
