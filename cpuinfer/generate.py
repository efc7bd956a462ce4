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

Floats = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]


class Model(Protocol):
    """What generation needs of a model: see models/llama.py."""

    chunk: int
    context_length: int

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
    """A request on its way: its ids so far and, when it has ended by itself, why."""

    prompt: Sequence[int]
    tokens: list[int]
    finish_reason: FinishReason | None = None


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
    ids = np.asarray(prompt, np.int32)
    for start in range(0, len(ids), model.chunk):
        some = ids[start : start + model.chunk]
        end = start + len(some)
        wanted = max(0, end - max(start, len(ids) - n_logits))
        yield model.forward([Span(some, cache, wanted)], cancel)
        if progress is not None:
            progress(end, len(ids))


def decode(
    model: Model, token: int, cache: KVCache, cancel: threading.Event | None = None
) -> Floats:
    """Append one token; the logits (V,) of what comes after it."""
    logits: Floats = model.forward([Span(np.array([token], np.int32), cache, 1)], cancel)[0]
    return logits


def generate(
    model: Model,
    generation: Generation,
    sampler: Sampler,
    eog_ids: Collection[int],
    cache: KVCache,
    cancel: threading.Event | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Sampled]:
    """Continue a prompt on an empty cache; each token is yielded when it is chosen.

    `generation` is kept up to date: "stop" after an id of `eog_ids`, which is not yielded,
    "length" after max_tokens or when the context is full.  ValueError without a prompt,
    ContextLengthExceeded if it fills the context, NumericsError for logits that are not numbers.
    """
    prompt = generation.prompt
    if not len(prompt):
        raise ValueError("there is no prompt, and the model has no BOS token to begin with")
    if len(prompt) >= model.context_length:
        raise ContextLengthExceeded(len(prompt), model.context_length)
    room = min(sampler.params.max_tokens, model.context_length - len(prompt))
    *_, last = prefill(model, prompt, cache, cancel, progress)
    logits = last[-1]
    history = list(prompt)
    for left in range(room - 1, -1, -1):
        sampled = sampler.sample(logits, history)
        if sampled.token in eog_ids:
            generation.finish_reason = "stop"
            return
        history.append(sampled.token)
        generation.tokens.append(sampled.token)
        if left == 0:
            generation.finish_reason = "length"
        yield sampled
        if left:
            logits = decode(model, sampled.token, cache, cancel)
