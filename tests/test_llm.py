"""The class people import, with the bundled model."""

import random
import threading
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpuinfer
from cpuinfer import machine
from cpuinfer.completion import Completion
from cpuinfer.generate import ContextLengthExceeded
from cpuinfer.models.llama import Cancelled
from cpuinfer.sampling import NumericsError, Sampler
from cpuinfer.speculate import Costs
from cpuinfer.team import most_threads

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    with resources.as_file(resources.files("cpuinfer") / "data/demo.gguf") as path:
        yield path


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[cpuinfer.LLM]:
    with cpuinfer.LLM(path, context_length=2048, threads=1) as llm:
        yield llm


def test_a_completion_tells_everything(llm: cpuinfer.LLM) -> None:
    done = llm.generate(PROMPT, max_tokens=20, seed=1, ignore_eos=True)
    assert (done.finish_reason, done.completion_tokens, len(done.token_ids)) == ("length", 20, 20)
    assert done.prompt_tokens == len(llm.tokenizer.encode(PROMPT)) == 5
    assert done.seed == 1
    whole = llm.tokenizer.encode(PROMPT) + list(done.token_ids)
    assert llm.tokenizer.decode(whole) == PROMPT + done.text
    assert done.timings.prompt_seconds > 0 and done.timings.generation_seconds > 0


def test_a_stream_gives_the_same_text_in_pieces(llm: cpuinfer.LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=40, seed=3)
    stream = llm.stream(PROMPT, max_tokens=40, seed=3)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [t for chunk in chunks for t in chunk.token_ids] == list(whole.token_ids)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert stream.completion is not None and stream.completion.text == whole.text


def test_seed_threads_and_chunks_do_not_change_a_token(path: Path, llm: cpuinfer.LLM) -> None:
    prompt = llm.generate(PROMPT, max_tokens=300, seed=7, ignore_eos=True).text
    wanted = llm.generate(prompt, max_tokens=60, seed=11).token_ids
    assert llm.generate(prompt, max_tokens=60, seed=11).token_ids == wanted
    assert llm.generate(prompt, max_tokens=60, seed=12).token_ids != wanted
    with cpuinfer.LLM(path, threads=2) as other:
        assert other.generate(prompt, max_tokens=60, seed=11).token_ids == wanted
        other.model.chunk = 13  # the ring was made for more
        assert other.generate(prompt, max_tokens=60, seed=11).token_ids == wanted


def test_without_a_seed_one_is_drawn_and_told(llm: cpuinfer.LLM) -> None:
    first = llm.generate(PROMPT, max_tokens=30, ignore_eos=True)
    second = llm.generate(PROMPT, max_tokens=30, ignore_eos=True)
    assert first.seed != second.seed
    again = llm.generate(PROMPT, max_tokens=30, ignore_eos=True, seed=first.seed)
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize("split", [1, 2, 5])
def test_a_stop_string_over_several_tokens_is_never_shown(llm: cpuinfer.LLM, split: int) -> None:
    free = llm.generate(PROMPT, max_tokens=40, seed=5, ignore_eos=True)
    start = len(free.text) // 2
    stop = free.text[start : start + 2 * split + 1]
    pieces = [c.text for c in llm.stream(PROMPT, max_tokens=40, seed=5, stop=[stop, "\x00"])]
    assert "".join(pieces) == free.text[: free.text.index(stop)]
    done = llm.generate(PROMPT, max_tokens=40, seed=5, stop=stop)
    assert (done.text, done.finish_reason) == ("".join(pieces), "stop")


def test_text_that_only_began_like_a_stop_string_is_shown(llm: cpuinfer.LLM) -> None:
    free = llm.generate(PROMPT, max_tokens=25, seed=5, ignore_eos=True)
    stop = free.text[-3:] + "\x00"
    done = llm.generate(PROMPT, max_tokens=25, seed=5, ignore_eos=True, stop=stop)
    assert (done.text, done.finish_reason) == (free.text, "length")


def test_logprobs_are_the_models_own(llm: cpuinfer.LLM) -> None:
    done = llm.generate(PROMPT, max_tokens=4, temperature=0, logprobs=3, ignore_eos=True)
    ids = llm.tokenizer.encode(PROMPT) + list(done.token_ids)
    logits = llm.logits(ids)[4:-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert done.logprobs is not None and len(done.logprobs) == 4
    for row, reported in zip(expected, done.logprobs, strict=True):
        best = np.argsort(-row)[:3]
        assert reported.token == best[0]
        assert reported.logprob == pytest.approx(row[best[0]], abs=1e-6)
        assert [value for _, value in reported.top] == pytest.approx(row[best], abs=1e-6)
    assert llm.generate(PROMPT, max_tokens=1).logprobs is None


def test_logits_are_of_every_position_and_start_afresh(llm: cpuinfer.LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT * 100)
    assert len(ids) > 300  # more than the window, more than a chunk
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), llm.config.vocab_size)
    assert (llm.logits(ids[:7]) == logits[:7]).all()


@pytest.mark.parametrize(("extra", "tokens"), [(1, 1), (3, 3)])
def test_the_context_is_used_to_the_end(llm: cpuinfer.LLM, extra: int, tokens: int) -> None:
    prompt = [5] * (llm.context_length - extra)
    done = llm.generate(prompt, max_tokens=9, ignore_eos=True)
    assert (done.completion_tokens, done.finish_reason) == (tokens, "length")


@pytest.mark.parametrize("over", [0, 1])
def test_a_prompt_that_fills_the_context_is_refused(llm: cpuinfer.LLM, over: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=str(llm.context_length)):
        llm.generate([5] * (llm.context_length + over))


def test_a_window_makes_texts_endless(path: Path) -> None:
    """The model was trained on 2,048 positions and sees 128 in each of 4 layers: what is further
    away than 4 times that, and where the text begins, are nothing to it."""
    with cpuinfer.LLM(path, threads=1) as llm:
        assert llm.endless
        prompt = [llm.tokenizer.bos_id, *llm.tokenizer.encode(PROMPT * 800, add_bos=False)]
        assert len(prompt) > 3000
        far = llm.generate(prompt, max_tokens=100, temperature=0, ignore_eos=True)
        near = llm.generate(prompt[-600:], max_tokens=100, temperature=0, ignore_eos=True)
    assert far.completion_tokens == 100
    assert far.token_ids == near.token_ids


@pytest.mark.parametrize(
    "options", [{"context_length": 2048}, {"context_length": 100}, {"sliding_window": "off"}]
)
def test_texts_end_without_a_window_or_where_it_is_said(
    path: Path, options: dict[str, Any]
) -> None:
    with cpuinfer.LLM(path, threads=1, **options) as llm:
        assert not llm.endless
        with pytest.raises(ContextLengthExceeded):
            llm.generate([5] * 2048)


def test_a_window_as_long_as_the_context_does_not_make_texts_endless(path: Path) -> None:
    with cpuinfer.LLM(path, threads=1, sliding_window=1900) as llm:
        assert not llm.endless


@pytest.mark.parametrize("prompt", [[-1], [10**6], [2**40]])
def test_ids_outside_the_vocabulary_are_refused(llm: cpuinfer.LLM, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="token"):
        llm.generate(prompt)
    assert llm.generate(PROMPT, max_tokens=1).completion_tokens == 1


def test_two_threads_at_once_get_what_each_gets_alone(llm: cpuinfer.LLM) -> None:
    seeds = [1, 2, 3]
    alone = [llm.generate(PROMPT, max_tokens=30, seed=seed).token_ids for seed in seeds]
    together: dict[int, tuple[int, ...]] = {}

    def work(seed: int) -> None:
        together[seed] = llm.generate(PROMPT, max_tokens=30, seed=seed).token_ids

    workers = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [together[seed] for seed in seeds] == alone


def test_a_stream_closed_from_another_thread_stops_between_layers(llm: cpuinfer.LLM) -> None:
    wanted = llm.generate(PROMPT, max_tokens=10, seed=1).token_ids
    stream = llm.stream(PROMPT, max_tokens=1500, seed=2, ignore_eos=True)
    next(stream)
    closer = threading.Timer(0.05, stream.close)
    closer.start()
    with pytest.raises(Cancelled):
        for _ in stream:
            pass
    closer.join()
    assert stream.completion is None
    assert llm.generate(PROMPT, max_tokens=10, seed=1).token_ids == wanted


def test_a_closed_model_says_so(path: Path) -> None:
    llm = cpuinfer.LLM(path)
    stream = llm.stream(PROMPT, max_tokens=5)
    next(stream)
    llm.close()
    llm.close()
    stream.close()
    assert llm._caches._spare is None
    with pytest.raises(ValueError, match=r"demo\.gguf has been closed"):
        llm.generate(PROMPT)


def test_more_threads_than_there_are_is_said(path: Path) -> None:
    with cpuinfer.LLM(path, threads=10**6) as llm:
        assert llm.threads == most_threads()


def test_logits_and_caches_beyond_memory_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cpuinfer.LLM(path) as llm:
        wanted = llm.generate(PROMPT, max_tokens=2, seed=1).token_ids
        monkeypatch.setattr(machine, "memory_available", lambda: 300 << 10)
        with pytest.raises(machine.NotEnoughMemory):
            llm.logits([5] * 100)  # 800 KiB
        stream = llm.stream(PROMPT, max_tokens=5)
        next(stream)  # has the one cache there is
        with pytest.raises(machine.NotEnoughMemory):
            llm.generate(PROMPT)
        stream.close()
        assert llm.generate(PROMPT, max_tokens=2, seed=1).token_ids == wanted


def test_an_abandoned_stream_leaves_the_next_request_unharmed(llm: cpuinfer.LLM) -> None:
    wanted = llm.generate(PROMPT, max_tokens=10, seed=1).token_ids
    stream = llm.stream("The king", max_tokens=100, seed=2)
    next(stream)
    stream.close()
    assert llm.generate(PROMPT, max_tokens=10, seed=1).token_ids == wanted


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"context_length": 1}, "context_length"),
        ({"context_length": 10**9}, "context_length"),
        ({"threads": 0}, "threads"),
        ({"kv_type": "q9"}, "kv_type"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"template": "no such template"}, "template"),
    ],
)
def test_bad_arguments_are_named(path: Path, arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        cpuinfer.LLM(path, **arguments)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_with_the_numbers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 10 << 20)
    with pytest.raises(machine.NotEnoughMemory, match=r"MiB needed.*10.0 MiB available"):
        cpuinfer.LLM(path)


def test_forced_it_runs_without_the_memory(
    path: Path, llm: cpuinfer.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = llm.generate(PROMPT, max_tokens=5, seed=1).token_ids
    monkeypatch.setattr(machine, "memory_available", lambda: 1000)
    with cpuinfer.LLM(path, context_length=64, force=True) as forced:
        assert forced.generate(PROMPT, max_tokens=5, seed=1).token_ids == wanted
        (warning,) = forced.warnings
    assert "MiB more memory than is free: it may swap" in warning
    monkeypatch.undo()
    with cpuinfer.LLM(path, context_length=64, force=True) as enough:
        assert enough.warnings == ()


# --- drafts ---


def test_speculation_changes_no_text(path: Path, llm: cpuinfer.LLM) -> None:
    drafted = accepted = 0
    with cpuinfer.LLM(path, threads=1, speculation=False) as plain:
        for seed, prompt in enumerate([PROMPT, "The cat sat on the mat. " * 8]):
            for more in (
                {"temperature": 0},
                {},
                {"stop": ["cat", "."]},
                {"frequency_penalty": 0.1},
            ):
                wanted = plain.generate(prompt, seed=seed, logprobs=1, **more)  # type: ignore[arg-type]
                done = llm.generate(prompt, seed=seed, logprobs=1, **more)  # type: ignore[arg-type]
                assert said(done) == said(wanted)
                assert (wanted.drafted_tokens, wanted.accepted_tokens) == (0, 0)
                drafted += done.drafted_tokens
                accepted += done.accepted_tokens
    assert 0 < accepted <= drafted


# --- what is left of the last request ---


def said(done: Completion) -> tuple[object, ...]:
    """All that must not depend on what has been asked before."""
    return (done.text, done.token_ids, done.finish_reason, done.prompt_tokens, done.logprobs)


def fresh(llm: cpuinfer.LLM, prompt: str | Sequence[int], **params: Any) -> Completion:
    """The completion from an empty cache."""
    llm._caches.forget()
    done = llm.generate(prompt, logprobs=2, **params)
    assert done.cached_tokens == 0
    return done


def ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(300, 2048), k=count)


# The ring of the bundled model keeps 383 positions, and a token sees 128.
@pytest.mark.parametrize("length", [2, 100, 382, 500, 900])
def test_the_same_prompt_is_computed_once(llm: cpuinfer.LLM, length: int) -> None:
    prompt = ids(length)
    first = fresh(llm, prompt, max_tokens=30, seed=1)
    again = llm.generate(prompt, max_tokens=30, seed=1, logprobs=2)
    assert said(again) == said(first)
    assert (again.cached_tokens, again.prompt_tokens) == (length - 1, length)


@pytest.mark.parametrize("length", [10, 200, 600])
def test_a_prompt_goes_on_where_the_last_text_ended(llm: cpuinfer.LLM, length: int) -> None:
    first = fresh(llm, ids(length), max_tokens=40, seed=1, ignore_eos=True)
    prompt = [*ids(length), *first.token_ids, *ids(60, seed=1)]
    second = llm.generate(prompt, max_tokens=20, seed=2, logprobs=2)
    assert second.cached_tokens in (length + 39, length + 40)
    assert said(second) == said(fresh(llm, prompt, max_tokens=20, seed=2))


@pytest.mark.parametrize(
    ("length", "shared", "cached"),
    [
        (300, 0, 0),
        (300, 1, 1),
        (300, 299, 299),
        (300, 40, 40),  # 340 positions in all: nothing has been overwritten
        (600, 599, 599),
        (600, 450, 450),
        (600, 384, 384),  # 640 positions, from 257 on they are kept; 384 sees 257
        (600, 383, 0),
        (600, 5, 0),  # nothing is cut off: they are gone
    ],
)
def test_a_prompt_that_takes_another_turn(
    llm: cpuinfer.LLM, length: int, shared: int, cached: int
) -> None:
    first = ids(length)
    other = [*first[:shared], 299, *ids(200, seed=2)]
    wanted = fresh(llm, other, max_tokens=10, seed=3)
    llm._caches.forget()
    done = fresh(llm, first, max_tokens=41, seed=3, ignore_eos=True)
    assert done.completion_tokens == 41  # of which the last is not in the cache
    done = llm.generate(other, max_tokens=10, seed=3, logprobs=2)
    assert (done.cached_tokens, said(done)) == (cached, said(wanted))


def test_only_the_new_part_of_a_prompt_is_progress(path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "prompt":
            seen.append((done, total))

    with cpuinfer.LLM(path, on_progress=on_progress) as llm:
        llm.generate(ids(400), max_tokens=1)
        llm.generate([*ids(400), *ids(300, seed=1)], max_tokens=1)
    assert seen == [(0, 400), (256, 400), (400, 400), (0, 300), (256, 300), (300, 300)]


class SetAfter(threading.Event):
    """An event that is set when it is looked at for the n-th time."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def cancelled(llm: cpuinfer.LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up in the middle of its first pass, when two layers of it are written."""
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Event", lambda: SetAfter(3))
        stream = llm.stream(prompt)
    with pytest.raises(Cancelled):
        next(stream)


def failed(llm: cpuinfer.LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A NumericsError at the ninth token."""
    sample = Sampler.sample

    def broken(sampler: Sampler, logits: Any, history: Sequence[int]) -> Any:
        return sample(
            sampler, logits * np.nan if len(history) > len(prompt) + 8 else logits, history
        )

    with monkeypatch.context() as patch, pytest.raises(NumericsError):
        patch.setattr(Sampler, "sample", broken)
        llm.generate(prompt, temperature=0, ignore_eos=True)


def left(llm: cpuinfer.LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = llm.stream(prompt, max_tokens=200, temperature=0, ignore_eos=True)
    for _ in range(60):
        next(stream)
    stream.close()


def stopped(llm: cpuinfer.LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    free = llm.generate(prompt, max_tokens=60, temperature=0, ignore_eos=True)
    done = llm.generate(prompt, max_tokens=60, temperature=0, stop=free.text[40:45])
    assert done.finish_reason == "stop"


def refused(llm: cpuinfer.LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate([*prompt, *ids(2048)])


def all_logits(llm: cpuinfer.LLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    llm.logits(prompt)


@pytest.mark.parametrize("end", [cancelled, failed, left, stopped, refused, all_logits])
@pytest.mark.parametrize("repeated", [False, True], ids=["random", "repeated"])
@pytest.mark.parametrize("kept", [20, 250, 390, 500])
def test_however_a_request_ends_the_next_one_is_right(
    llm: cpuinfer.LLM, monkeypatch: pytest.MonkeyPatch, end: Any, repeated: bool, kept: int
) -> None:
    """Two requests before, of which the second goes on from the first, and a third that shares
    some of its beginning with both."""
    first = ids(12) * 40 if repeated else ids(480)
    second = [*first[:400], *ids(200, seed=4)]
    third = [*second[:kept], *ids(30, seed=5)]
    wanted = fresh(llm, third, max_tokens=20, temperature=0)
    fresh(llm, first[:460], max_tokens=20, temperature=0)
    end(llm, second, monkeypatch)
    done = llm.generate(third, max_tokens=20, temperature=0, logprobs=2)
    assert said(done) == said(wanted)
    again = llm.generate(third, max_tokens=20, temperature=0, logprobs=2)
    assert said(again) == said(wanted)
    assert again.cached_tokens == len(third) - 1


def test_requests_at_the_same_time_do_not_share(llm: cpuinfer.LLM) -> None:
    prompt = ids(50)
    wanted = fresh(llm, prompt, max_tokens=20, seed=1, ignore_eos=True)
    one = llm.stream(prompt, max_tokens=20, seed=1, ignore_eos=True, logprobs=2)
    two = llm.stream(prompt, max_tokens=20, seed=1, ignore_eos=True, logprobs=2)
    for _ in zip(one, two, strict=True):
        pass
    assert one.completion is not None and two.completion is not None
    next(two, None)
    assert (one.completion.cached_tokens, two.completion.cached_tokens) == (49, 0)
    assert said(one.completion) == said(two.completion) == said(wanted)


@pytest.mark.parametrize("seed", range(6))
def test_a_reader_that_leaves_at_a_wrong_draft_leaves_a_right_cache(
    seed: int, llm: cpuinfer.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of a draft that was not chosen must not pass for those of the token that was."""
    monkeypatch.setattr(
        Costs, "best_rows", lambda self, chance, limit: max(n for n in (1, 2, 4, 8) if n <= limit)
    )
    prompt = llm.tokenizer.encode("The cat sat on the mat. " * 8)
    for tokens in range(1, 20):
        llm._caches.forget()
        stream = llm.stream(prompt, max_tokens=60, temperature=1, seed=seed, ignore_eos=True)
        said_so_far = [token for _ in range(tokens) for token in next(stream).token_ids]
        stream.close()
        longer = [*prompt, *said_so_far, 500, 501]
        got = llm.generate(longer, max_tokens=3, temperature=0, logprobs=2)
        assert got.cached_tokens >= len(prompt)
        assert said(got) == said(fresh(llm, longer, max_tokens=3, temperature=0))
