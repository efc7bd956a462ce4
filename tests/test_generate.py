"""Prefill, decode and stopping, with a model whose logits are written down."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from cpuinfer.cache import KVCache
from cpuinfer.generate import ContextLengthExceeded, Generation, generate, prefill
from cpuinfer.models.llama import Span
from cpuinfer.sampling import NumericsError, Sampler, SamplingParams

VOCAB, EOS = 16, 2


class Counting:
    """A model that always wants the next id, and remembers what it was given."""

    chunk = 4
    context_length = 12

    def __init__(self, eos_after: int | None = None) -> None:
        self.passes: list[list[int]] = []
        self.eos_after = eos_after

    def forward(
        self, spans: Sequence[Span], cancel: threading.Event | None = None
    ) -> NDArray[np.float32]:
        (span,) = spans
        self.passes.append(span.tokens.tolist())
        span.cache.advance(len(span.tokens))
        rows = span.tokens[len(span.tokens) - span.n_logits :]
        wanted = (rows + 1) % VOCAB
        if self.eos_after is not None:
            wanted = np.where(rows == self.eos_after, EOS, wanted)
        return np.eye(VOCAB, dtype=np.float32)[wanted]


def run(model: Counting, prompt: list[int], **params: object) -> tuple[list[int], Generation]:
    generation = Generation(prompt, [])
    sampler = Sampler(SamplingParams(temperature=0, **params), VOCAB)  # type: ignore[arg-type]
    cache = KVCache(1, 1, 16, model.context_length)
    tokens = [s.token for s in generate(model, generation, sampler, {EOS}, cache)]
    assert tokens == generation.tokens
    return tokens, generation


def test_the_prompt_goes_in_chunks_and_the_last_token_is_not_fed() -> None:
    model = Counting()
    tokens, generation = run(model, [3, 4, 5, 6, 7], max_tokens=3)
    assert tokens == [8, 9, 10]
    assert generation.finish_reason == "length"
    assert model.passes == [[3, 4, 5, 6], [7], [8], [9]]


def test_an_end_of_generation_token_ends_and_is_not_given_out() -> None:
    tokens, generation = run(Counting(eos_after=6), [3, 4], max_tokens=9)
    assert (tokens, generation.finish_reason) == ([5, 6], "stop")


@pytest.mark.parametrize(("length", "left"), [(11, 1), (9, 3)])
def test_a_full_context_ends_with_length(length: int, left: int) -> None:
    tokens, generation = run(Counting(), [3] * length, max_tokens=50)
    assert (len(tokens), generation.finish_reason) == (left, "length")


@pytest.mark.parametrize("length", [12, 13])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(length: int) -> None:
    model = Counting()
    with pytest.raises(ContextLengthExceeded, match=rf"{length} tokens.*12") as caught:
        run(model, [3] * length)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (length, 12)
    assert model.passes == []


def test_no_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt"):
        run(Counting(), [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_end_the_request(value: float) -> None:
    class Broken(Counting):
        def forward(
            self, spans: Sequence[Span], cancel: threading.Event | None = None
        ) -> NDArray[np.float32]:
            logits = super().forward(spans, cancel)
            if len(self.passes) == 3:
                logits[:, 1] = value
            return logits

    with pytest.raises(NumericsError, match="token 3"):
        run(Broken(), [3])
    assert run(Counting(), [3], max_tokens=2)[0] == [4, 5]


@pytest.mark.parametrize("n_logits", [0, 1, 3, 4, 5, 9, 10])
def test_prefill_yields_the_logits_of_the_last_tokens(n_logits: int) -> None:
    cache = KVCache(1, 1, 16, 12)
    seen: list[tuple[int, int]] = []
    prompt = list(range(3, 13))
    chunks = prefill(
        Counting(), prompt, cache, progress=lambda *of: seen.append(of), n_logits=n_logits
    )
    logits = np.concatenate(list(chunks))
    assert logits.argmax(1).tolist() == [t + 1 for t in prompt[len(prompt) - n_logits :]]
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert cache.offset == 10
