"""sampling.py: each filter by hand-written probabilities and by llama.cpp's own, then the chain."""

import math
from typing import Any

import numpy as np
import pytest

from cpuinfer import sampling
from cpuinfer.sampling import NumericsError, Sampled, Sampler, SamplingParams

# 24 logits, what was generated before, and what llama.cpp's samplers made of them
# (llama-cpp-python 0.3.36, llama_sampler_apply on the candidates in this order).
NUMBERS = (
    "-2.0 -3.31 -0.62 1.05 2.84 0.27 -1.38 -1.96 1.87 4.09 0.68 -3.08 "
    "-2.4 4.0 0.51 -4.33 -0.21 -2.91 -1.57 -1.22 -1.78 1.38 -0.16 -1.47"
)
LOGITS = np.array(NUMBERS.split(), np.float32)
HISTORY = [3, 3, 3, 7, 9, 9, 0, 23]


def logits_of(*probs: float) -> np.ndarray:
    return np.log(np.array(probs)).astype(np.float32)


def plain(**changes: Any) -> SamplingParams:
    """Parameters with every filter off but those in `changes`."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7}
    return SamplingParams(**{**off, **changes})


def draw(params: SamplingParams, logits: np.ndarray, n: int, **kwargs: Any) -> list[int]:
    sampler = Sampler(params, len(logits), **kwargs)
    return [sampler.sample(logits, []).token for _ in range(n)]


# Filters, by hand


@pytest.mark.parametrize(
    ("p", "kept"), [(0.5, 1), (0.501, 2), (0.75, 2), (0.76, 3), (0.875, 3), (1e-9, 1), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, kept: int) -> None:
    probs = np.array([0.5, 0.25, 0.125, 0.125])
    assert sampling.keep_top_p(probs, p).tolist() == [True] * kept + [False] * (4 - kept)


@pytest.mark.parametrize(("p", "kept"), [(0.0, 4), (0.25, 4), (0.26, 2), (0.5, 2), (1.0, 1)])
def test_min_p_compares_with_the_most_likely(p: float, kept: int) -> None:
    probs = np.array([0.5, 0.25, 0.125, 0.125])
    assert sampling.keep_min_p(probs, p).tolist() == [True] * kept + [False] * (4 - kept)


def test_typical_p_drops_the_too_likely_first() -> None:
    # Entropy 1.75 bits; surprises 1, 2, 3, 3 bits lie 0.75, 0.25, 1.25, 1.25 from it.
    probs = np.array([0.5, 0.25, 0.125, 0.125])
    assert sampling.keep_typical_p(probs, 0.2).tolist() == [False, True, False, False]
    assert sampling.keep_typical_p(probs, 0.25).tolist() == [True, True, False, False]
    assert sampling.keep_typical_p(probs, 0.75).tolist() == [True, True, True, False]


def test_typical_p_survives_impossible_tokens() -> None:
    assert sampling.keep_typical_p(np.array([1.0, 0.0, 0.0]), 0.9).tolist() == [True, False, False]


@pytest.mark.parametrize("k", [0, 1, 2, 5, 63, 64, 1000])
def test_top_k_is_an_ordinary_sort(k: int) -> None:
    logits = np.random.default_rng(3).integers(-9, 9, 1000).astype(np.float64)  # many ties
    expected = sorted(range(1000), key=lambda token: (-logits[token], token))[: k or None]
    assert sampling.top_k(logits, k).tolist() == expected


@pytest.mark.parametrize("size", [1, 40, 63, 64, 65, 4097])
def test_top_k_of_any_size(size: int) -> None:
    logits = np.random.default_rng(size).normal(size=size)
    expected = sorted(range(size), key=lambda token: -logits[token])[:40]
    assert sampling.top_k(logits, 40).tolist() == expected


def test_penalties_by_formula() -> None:
    logits = np.array([2.0, -2.0, 0.0, 3.0])
    penalized = sampling.penalize(logits, np.array([0, 1, 1, 2]), 2.0, 0.25, 0.5)
    assert penalized.tolist() == [2 / 2 - 0.75, -2 * 2 - 1.0, -0.75, 3.0]
    assert logits.tolist() == [2.0, -2.0, 0.0, 3.0]


def test_softmax_at_a_temperature() -> None:
    np.testing.assert_allclose(
        sampling.softmax(np.log([0.8, 0.2]), 0.5), [0.64 / 0.68, 0.04 / 0.68], rtol=1e-12
    )
    assert sampling.softmax(np.array([3.0, 2.0, -9.0]), 1e-310).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("uniform", "index"),
    [(0.0, 0), (0.4999, 0), (0.5, 1), (0.7499, 1), (0.75, 3), (math.nextafter(1, 0), 3)],
)
def test_choice_is_the_inverse_of_the_distribution(uniform: float, index: int) -> None:
    assert sampling.choose(np.array([0.5, 0.25, 0.0, 0.25, 0.0]), uniform) == index


# Filters and chain, by llama.cpp


def test_filters_agree_with_llama_cpp() -> None:
    raw = LOGITS.astype(np.float64)
    order = sampling.top_k(raw, 0)
    probs = sampling.softmax(raw[order])
    assert sampling.top_k(raw, 7).tolist() == [9, 13, 4, 8, 21, 3, 10]
    assert order[sampling.keep_typical_p(probs, 0.6)].tolist() == [9, 13, 4]
    assert order[sampling.keep_typical_p(probs, 0.3)].tolist() == [13]
    assert order[sampling.keep_top_p(probs, 0.8)].tolist() == [9, 13, 4]
    assert order[sampling.keep_min_p(probs, 0.1)].tolist() == [9, 13, 4, 8]


def test_penalties_agree_with_llama_cpp() -> None:
    raw = LOGITS.astype(np.float64)
    penalized = sampling.penalize(raw, np.array(HISTORY), 1.3, 0.2, 0.5)
    changed = {0: -3.3, 3: -0.2923, 7: -3.248, 9: 2.2462, 23: -2.611}
    expected = [changed.get(token, float(raw[token])) for token in range(24)]
    np.testing.assert_allclose(penalized, expected, atol=1e-4)


def test_chain_agrees_with_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def choose(probs: np.ndarray, uniform: float) -> int:
        seen.append(probs)
        return 0

    monkeypatch.setattr(sampling, "choose", choose)
    params = SamplingParams(
        temperature=0.7,
        top_k=12,
        typical_p=0.95,
        top_p=0.9,
        min_p=0.06,
        repeat_penalty=1.3,
        frequency_penalty=0.2,
        presence_penalty=0.5,
    )
    assert Sampler(params, 24).sample(LOGITS, HISTORY).token == 13
    weights = np.exp(np.array([5.7143, 4.0571, 3.2088, 2.6714]))  # of tokens 13, 4, 9, 8
    np.testing.assert_allclose(seen[0], weights / weights.sum(), rtol=1e-3)


# Order of the chain


def test_filters_judge_probabilities_before_temperature() -> None:
    # At temperature 2 the first would hold 0.61 only, and top_p 0.7 would keep two.
    assert set(draw(plain(temperature=2.0, top_p=0.7), logits_of(0.71, 0.29), 200)) == {0}
    # At temperature 0.25 the second would be 0.04 times as likely, and min_p 0.3 would drop it.
    assert set(draw(plain(temperature=0.5, min_p=0.3), logits_of(0.7, 0.3), 200)) == {0, 1}


def test_top_p_sees_what_top_k_left() -> None:
    # 0.4 of what two tokens hold is 0.53; of all it is 0.4, which would not reach 0.5.
    logits = logits_of(0.4, 0.35, 0.25)
    assert set(draw(plain(top_k=2, top_p=0.5), logits, 200)) == {0}
    assert set(draw(plain(top_p=0.5), logits, 200)) == {0, 1}


def test_typical_p_comes_before_top_p() -> None:
    # Typical sampling leaves the second alone; after top_p it would have the first alone.
    logits = logits_of(0.5, 0.25, 0.125, 0.125)
    assert set(draw(plain(typical_p=0.2), logits, 200)) == {1}
    assert set(draw(plain(typical_p=0.2, top_p=0.5), logits, 200)) == {1}


def test_bias_comes_after_penalties() -> None:
    # (2 / 2) + 1.5 beats 2.2; (2 + 1.5) / 2 would not.
    params = plain(temperature=0, repeat_penalty=2.0, logit_bias={0: 1.5})
    assert Sampler(params, 2).sample(np.array([2.0, 2.2], np.float32), [0]).token == 0


# What penalties look back on


@pytest.mark.parametrize(("last_n", "token"), [(0, 0), (1, 0), (2, 1), (64, 1), (-1, 1)])
def test_repeat_last_n(last_n: int, token: int) -> None:
    params = plain(temperature=0, repeat_penalty=2.0, repeat_last_n=last_n)
    logits = np.array([2.0, 1.5, 0.0], np.float32)
    assert Sampler(params, 3).sample(logits, [0, 2]).token == token


# The greedy choice, ties, what is never chosen


def test_temperature_zero_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.zeros(300, np.float32)
    logits[[250, 17, 90]] = 4
    assert draw(SamplingParams(temperature=0), logits, 3) == [17, 17, 17]


def test_ties_at_the_edge_of_top_k_go_to_the_lower_ids() -> None:
    logits = np.zeros(300, np.float32)
    logits[299] = 1
    assert set(draw(plain(top_k=3), logits, 200)) == {0, 1, 299}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_chosen(temperature: float) -> None:
    logits = np.array([9.0, 8.0, 1.0, 0.5, 7.0], np.float32)
    params = plain(temperature=temperature, logit_bias={0: -math.inf}, ignore_eos=True)
    tokens = draw(params, logits, 200, n_tokens=4, eog_ids=[1])
    assert set(tokens) <= {2, 3}
    assert tokens[0] == 2 or temperature > 0


def test_without_ignore_eos_the_end_can_be_chosen() -> None:
    assert draw(plain(temperature=0), np.array([0.0, 1.0], np.float32), 1, eog_ids=[1]) == [1]


# Random numbers


def test_seed_decides_everything() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    first = draw(plain(seed=1), logits, 50)
    assert first == draw(plain(seed=1), logits, 50)
    assert first != draw(plain(seed=2), logits, 50)


def test_a_new_seed_is_told_and_can_be_used_again() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    samplers = [Sampler(plain(seed=None), 500) for _ in range(2)]
    assert samplers[0].seed != samplers[1].seed
    tokens = [samplers[0].sample(logits, []).token for _ in range(50)]
    assert tokens == draw(plain(seed=samplers[0].seed), logits, 50)


@pytest.mark.parametrize("first", [np.array([0.0, 99.0]), np.array([0.0, 0.0])])
def test_each_token_takes_one_random_number(first: np.ndarray) -> None:
    # However sure the first choice is, the second gets the generator's second number.
    second = np.random.default_rng(4).normal(size=2)
    expected = np.random.Generator(np.random.PCG64(7)).random(2)[1]
    sampler = Sampler(plain(top_p=0.9), 2)
    sampler.sample(first.astype(np.float32), [])
    order = sampling.top_k(second, 0)
    index = sampling.choose(sampling.softmax(second[order]), expected)
    assert sampler.sample(second.astype(np.float32), []).token == order[index]


def test_draws_follow_the_distribution() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
    n = 4000
    counts = np.bincount(draw(plain(seed=11), logits_of(*probs), n), minlength=5)
    chi_square = (((counts - n * probs) ** 2) / (n * probs)).sum()
    assert chi_square < 18.5  # 0.1 % of fair draws lie above, 4 degrees of freedom


# Numbers that are no numbers (R17)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([1.0, math.nan, 3.0], "NaN logits at token 1"),
        ([1.0, math.inf, 3.0], "infinite logits at token 1"),
        ([math.nan, math.inf, -math.inf], "NaN"),
        ([-math.inf] * 3, "all -inf"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bad_logits_end_the_request(logits: list[float], message: str, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 3)
    with pytest.raises(NumericsError, match=message):
        sampler.sample(np.array(logits, np.float32), [])


def test_some_minus_infinity_is_fine() -> None:
    logits = np.array([-math.inf, 1.0, -math.inf], np.float32)
    assert set(draw(plain(typical_p=0.9), logits, 20)) == {1}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_ban_on_everything_is_an_error(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, logit_bias={0: -math.inf, 1: -math.inf})
    with pytest.raises(NumericsError, match="logit_bias"):
        Sampler(params, 2).sample(np.zeros(2, np.float32), [])


def test_errors_count_the_tokens_of_the_request() -> None:
    sampler = Sampler(SamplingParams(), 2)
    sampler.sample(np.zeros(2, np.float32), [])
    sampler.sample(np.zeros(2, np.float32), [])
    with pytest.raises(NumericsError, match="at token 3"):
        sampler.sample(np.full(2, np.nan, np.float32), [])


# Log-probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0, logprobs=2, logit_bias={3: 50.0}, repeat_penalty=3.0)
    sampled = Sampler(params, 4).sample(logits_of(0.5, 0.25, 0.15, 0.1), [0, 1])
    assert sampled.token == 3
    assert sampled.logprob == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in sampled.top_logprobs] == [0, 1, 3]
    expected = [math.log(0.5), math.log(0.25), math.log(0.1)]
    assert [value for _, value in sampled.top_logprobs] == pytest.approx(expected, abs=1e-6)


def test_logprobs_zero_tells_the_chosen_token_alone() -> None:
    sampled = Sampler(SamplingParams(temperature=0, logprobs=0), 2).sample(logits_of(0.2, 0.8), [])
    assert sampled.top_logprobs == ((1, sampled.logprob),)


def test_no_logprobs_unless_asked() -> None:
    params = SamplingParams(temperature=0)
    assert Sampler(params, 2).sample(logits_of(0.2, 0.8), []) == Sampled(1, None, ())


# Parameters


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, math.nan, math.inf, 101, "hot", True, None]),
        ("top_k", [-1, 1.5, True, "40"]),
        ("top_p", [0, -0.1, 1.1, math.nan, "a"]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("typical_p", [0, 1.1, math.nan]),
        ("repeat_penalty", [0, -1, math.inf, math.nan]),
        ("repeat_last_n", [-2, 0.5, None]),
        ("frequency_penalty", [math.nan, -math.inf, "x"]),
        ("presence_penalty", [math.nan, math.inf, "x"]),
        ("logit_bias", [{0: math.nan}, {0: math.inf}, {0: False}, {0: "1"}, {0: None}]),
        ("logit_bias", [{-1: 0.0}, {"0": 1.0}, {1.0: 1.0}, [(0, 1.0)], None]),
        ("seed", [-1, 1.0, "1", True]),
        ("max_tokens", [0, -1, 1e300, None, True]),
        ("stop", ["", ["a", ""], [1], None, b"a"]),
        ("logprobs", [-1, 21, True, 1.0]),
        ("ignore_eos", [1, None, "yes"]),
    ],
)
def test_parameters_out_of_range_are_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}"):
            SamplingParams(**{name: value})


def test_parameters_at_their_ends_are_accepted() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, typical_p=1, repeat_last_n=-1)
    SamplingParams(seed=2**64, max_tokens=2**63, logprobs=20, logit_bias={5: -math.inf, 6: 100})


def test_one_stop_text_is_not_its_characters() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_bias.*\b4\b.*0\.\.3"):
        Sampler(SamplingParams(logit_bias={4: 1.0}), 4)
