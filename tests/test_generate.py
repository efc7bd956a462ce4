"""Prefill, decode and stopping, with a model whose logits are written down."""

import itertools
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, llama_tensors, load_llama
from numpy.typing import NDArray

from cpuinfer.cache import KVCache
from cpuinfer.generate import ContextLengthExceeded, Generation, generate, prefill
from cpuinfer.models.llama import Llama, Span
from cpuinfer.sampling import NumericsError, Sampled, Sampler, SamplingParams
from cpuinfer.speculate import Costs
from quant.ggml_types import GGMLType

VOCAB, EOS = 16, 2


class Counting:
    """A model that always wants the next id, and remembers what it was given."""

    chunk = 4
    limit = 12

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
    cache = KVCache(1, 1, 16, model.limit)
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


def test_what_the_cache_holds_of_the_prompt_is_not_computed_again() -> None:
    model, cache = Counting(), KVCache(1, 1, 16, 12)
    cache.advance(5)
    seen: list[tuple[int, int]] = []
    generation = Generation([3, 4, 5, 6, 7, 8, 9], [])
    sampler = Sampler(SamplingParams(temperature=0, max_tokens=2), VOCAB)
    for _ in generate(
        model, generation, sampler, {EOS}, cache, progress=lambda *of: seen.append(of)
    ):
        pass
    assert (generation.tokens, model.passes) == ([10, 11], [[8, 9], [10]])
    assert seen == [(2, 2)]


# --- drafts ---

WINDOW, CHUNK = 24, 12


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """A model that repeats itself, but not always."""
    path = tmp_path_factory.mktemp("windowed") / "model.gguf"
    config = replace(TINY, sliding_window=WINDOW)
    return load_llama(
        path, config, llama_tensors(config, GGMLType.Q8_0, GGMLType.Q8_0), chunk=CHUNK
    )


def free() -> Costs:
    """Every pass takes a second: whatever is found is drafted, and often wrong."""
    return Costs(itertools.count().__next__)


def written(
    model: Llama,
    prompt: list[int],
    costs: Costs | None,
    eog_ids: Collection[int] = (),
    cache: KVCache | None = None,
    **params: object,
) -> tuple[list[Sampled], Generation]:
    generation = Generation(prompt, [])
    sampler = Sampler(
        SamplingParams(seed=3, logprobs=2, **params),  # type: ignore[arg-type]
        TINY.vocab_size,
    )
    cache = cache or model.make_cache()
    found = list(generate(model, generation, sampler, eog_ids, cache, costs=costs))
    return found, generation


PHRASE = [5, 9, 13, 17, 21, 6, 8, 30, 31, 32]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.4},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.4, "repeat_penalty": 1.1, "frequency_penalty": 0.2, "repeat_last_n": 9},
        {"temperature": 0.4, "typical_p": 0.9, "logit_bias": {13: 3.0, 17: 2.0}},
    ],
    ids=["greedy", "cool", "warm", "penalties", "bias"],
)
def test_drafts_change_no_bit(windowed: Llama, params: dict[str, object]) -> None:
    """Tokens and log-probabilities, the ring going round again and again."""
    drafted = accepted = 0
    for start in range(8):
        prompt = PHRASE[start:] + PHRASE * 2
        want, plain = written(windowed, prompt, None, **params)
        got, generation = written(windowed, prompt, free(), **params)
        assert len(want) > 90  # to the end of the context
        assert got == want
        assert generation.tokens == plain.tokens == [sampled.token for sampled in want]
        assert generation.finish_reason == plain.finish_reason == "length"
        assert (plain.drafted, plain.accepted) == (0, 0)
        drafted += generation.drafted
        accepted += generation.accepted
    assert 0 < accepted < drafted


@pytest.mark.parametrize("max_tokens", range(1, 40))
def test_drafts_end_where_the_text_does(windowed: Llama, max_tokens: int) -> None:
    want, _ = written(windowed, PHRASE * 2, None, temperature=0, max_tokens=max_tokens)
    cache = windowed.make_cache()
    got, generation = written(
        windowed, PHRASE * 2, free(), cache=cache, temperature=0, max_tokens=max_tokens
    )
    assert (got, generation.finish_reason) == (want, "length")
    assert cache.offset < 2 * len(PHRASE) + max_tokens


def test_a_drafted_end_of_generation_ends(windowed: Llama) -> None:
    ended = 0
    for eog in range(TINY.vocab_size):
        want, plain = written(windowed, PHRASE * 2, None, {eog}, temperature=0.4)
        got, generation = written(windowed, PHRASE * 2, free(), {eog}, temperature=0.4)
        assert (got, generation.finish_reason) == (want, plain.finish_reason)
        ended += plain.finish_reason == "stop" and len(want) > 5
    assert ended > 3


class Quoting(Counting):
    """Wants what stands five places back in the text; a scripted model that quotes for ever."""

    limit = 300
    chunk = 8

    def forward(
        self, spans: Sequence[Span], cancel: threading.Event | None = None
    ) -> NDArray[np.float32]:
        (span,) = spans
        text = [t for some in self.passes for t in some][: span.cache.offset]
        self.passes = [[*text, *span.tokens.tolist()]]
        self.count = getattr(self, "count", 0) + 1
        span.cache.advance(len(span.tokens))
        known = self.passes[0]
        wanted = [known[max(0, len(known) - i - 5)] for i in range(span.n_logits)][::-1]
        return np.eye(VOCAB, dtype=np.float32)[wanted]


def test_a_text_that_quotes_takes_few_passes() -> None:
    model, generation = Quoting(), Generation([3, 4, 5, 6, 7, 8] * 2, [])
    sampler = Sampler(SamplingParams(temperature=0, max_tokens=200), VOCAB)
    cache = KVCache(1, 1, 16, model.limit)
    assert len(list(generate(model, generation, sampler, {EOS}, cache, costs=free()))) == 200
    assert generation.accepted >= 150
    assert model.count == 2 + 199 - generation.accepted  # the prompt is two chunks
    assert cache.offset == 12 + 199


def test_drafted_tokens_are_yielded_one_by_one(windowed: Llama) -> None:
    """Whoever stops listening finds the tokens so far, and no more."""
    want, _ = written(windowed, PHRASE * 2, None, temperature=0)
    for count in range(1, 30):
        generation = Generation(PHRASE * 2, [])
        sampler = Sampler(SamplingParams(temperature=0, logprobs=2), TINY.vocab_size)
        stream = generate(windowed, generation, sampler, (), windowed.make_cache(), costs=free())
        assert list(itertools.islice(stream, count)) == want[:count]
        assert generation.tokens == [sampled.token for sampled in want[:count]]
        assert generation.finish_reason is None
