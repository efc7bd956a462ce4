"""From logits to a token: the parameters of a request and its chain of filters.

The chain is llama.cpp's: penalties, bias, top_k, typical_p, top_p, min_p, temperature, draw.
Temperature comes last, so the filters judge the probabilities the model gave. Ties are broken by
the lower id throughout. Text and stop strings are not known here.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class NumericsError(ArithmeticError):
    """What the model computed leaves no token to choose; the request cannot go on."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; ValueError names the parameter out of range."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    typical_p: float = 1.0  # 1: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # tokens that the three penalties look back on; 0: off, -1: all
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token; -inf: never
    seed: int | None = None  # None: a new one, which Sampler.seed tells
    max_tokens: int = 256
    stop: Sequence[str] = ()
    logprobs: int | None = None  # how many of the most likely tokens to report; None: nothing
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 100)
        _check_integer("top_k", self.top_k, 0)
        _check_fraction("top_p", self.top_p)
        _check_number("min_p", self.min_p, 0, 1)
        _check_fraction("typical_p", self.typical_p)
        _check_number("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _check_integer("repeat_last_n", self.repeat_last_n, -1)
        _check_number("frequency_penalty", self.frequency_penalty, -100, 100)
        _check_number("presence_penalty", self.presence_penalty, -100, 100)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        _check_integer("max_tokens", self.max_tokens, 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, 20)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be texts that are not empty, got {self.stop!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map tokens to numbers, got {self.logit_bias!r}")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias: a token", token, 0)
            if bias != -math.inf:
                _check_number(f"logit_bias of token {token}", bias, -1e9, 1e9)


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        span = f"from {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {span}, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def _check_fraction(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0, at most 1, got {value!r}")


@dataclass(frozen=True)
class Sampled:
    """A chosen token and, where asked for, natural logarithms of probabilities before the chain."""

    token: int
    logprob: float | None
    # The most likely tokens in order, and after them the chosen one where it is not among them.
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request; its random numbers are nobody else's.

    Every token drawn takes exactly one number from the generator, and the greedy choice
    (temperature 0) none, so the numbers a token gets depend on its place alone.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        n_tokens: int | None = None,
        eog_ids: Iterable[int] = (),
    ) -> None:
        """`n_tokens`: ids from there on have no token and are never chosen. `eog_ids`: what ends a
        generation, never chosen under `ignore_eos`. ValueError for a bias on an id outside."""
        bias = dict(params.logit_bias)
        if params.ignore_eos:
            bias |= dict.fromkeys(eog_ids, -math.inf)
        if outside := [token for token in bias if token >= vocab_size]:
            raise ValueError(f"logit_bias: token {outside[0]} is outside 0..{vocab_size - 1}")
        self.params = params
        self.vocab_size = vocab_size
        self.seed = int.from_bytes(os.urandom(4)) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._n_sampled = 0
        self._n_tokens = vocab_size if n_tokens is None else n_tokens
        self._biased = np.array(list(bias), np.int64)
        self._bias = np.array(list(bias.values()), np.float64)

    def sample(self, logits: np.ndarray, history: Sequence[int] | np.ndarray) -> Sampled:
        """logits (V,) float32 and the tokens so far, prompt included -> the next token

        NumericsError where a logit is NaN or +inf, or where no token may be chosen.
        """
        self._check_logits(logits)
        scores = self._adjusted(logits, history)
        best = int(scores.argmax())
        if scores[best] == -math.inf:
            raise NumericsError(f"no token may be chosen {self._place()}: logit_bias rules out all")
        token = best if self.params.temperature == 0 else self._draw(scores)
        self._n_sampled += 1
        if self.params.logprobs is None:
            return Sampled(token, None, ())
        return report(logits, token, self.params.logprobs)

    def _check_logits(self, logits: np.ndarray) -> None:
        assert logits.shape == (self.vocab_size,), logits.shape
        highest = logits.max()  # NaN if there is one anywhere
        if math.isfinite(highest):
            return
        if highest == -math.inf:
            raise NumericsError(f"the model's logits are all -inf {self._place()}")
        name = "NaN" if math.isnan(highest) else "infinite"
        raise NumericsError(f"the model produced {name} logits {self._place()}")

    def _place(self) -> str:
        return f"at token {self._n_sampled + 1} of this text"

    def _adjusted(self, logits: np.ndarray, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """(V,) -> (V,) float64 with penalties and bias, -inf for what must not be chosen."""
        params = self.params
        scores = logits.astype(np.float64)
        factors = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
        if factors != (1, 0, 0) and params.repeat_last_n != 0:
            recent = history if params.repeat_last_n == -1 else history[-params.repeat_last_n :]
            scores = penalize(scores, np.asarray(recent, np.int64), *factors)
        scores[self._biased] += self._bias
        scores[self._n_tokens :] = -math.inf
        return scores

    def _draw(self, scores: np.ndarray) -> int:
        """One token by the chain from top_k on; the only place a random number is taken.

        Tokens at -inf may pass the filters; their probability of 0 is never drawn.
        """
        params = self.params
        ids = top_k(scores, params.top_k)
        if params.typical_p < 1:
            ids = ids[keep_typical_p(softmax(scores[ids]), params.typical_p)]
        if params.top_p < 1:
            ids = ids[keep_top_p(softmax(scores[ids]), params.top_p)]
        if params.min_p > 0:
            ids = ids[keep_min_p(softmax(scores[ids]), params.min_p)]
        probs = softmax(scores[ids], params.temperature)
        return int(ids[choose(probs, self._random.random())])


def penalize(
    logits: np.ndarray, recent: np.ndarray, repeat: float, frequency: float, presence: float
) -> np.ndarray:
    """(V,) float64 -> (V,): lower the logits of the tokens in `recent` (n,).

    Once for each distinct token: positive logits are divided by `repeat`, others multiplied by it;
    then count * frequency + presence is taken off (llama_sampler_penalties_apply).
    """
    ids, counts = np.unique(recent, return_counts=True)
    old = logits[ids]
    penalized = logits.copy()
    penalized[ids] = np.where(old > 0, old / repeat, old * repeat) - counts * frequency - presence
    return penalized


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """(V,) -> the ids of the k highest logits, highest first; 0 means all."""
    n_groups = len(logits) // 64
    if not 0 < k <= n_groups:
        return np.argsort(-logits, kind="stable")[: k or None]
    # The k-th highest of all is no lower than the k-th of the groups' highest. Finding that is far
    # cheaper than ordering everything, and leaves little more than k ids to order.
    highest = logits[: n_groups * 64].reshape(64, n_groups).max(axis=0)
    ids: np.ndarray = np.flatnonzero(logits >= np.partition(highest, -k)[-k])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids[:k]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(n,) float64, highest first -> (n,) probabilities at a temperature above 0."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature leaves only the highest
        weights: np.ndarray = np.exp((logits - logits[0]) / temperature)
    probs: np.ndarray = weights / weights.sum()
    return probs


def keep_typical_p(probs: np.ndarray, p: float) -> np.ndarray:
    """(n,) highest first -> (n,) bool: the tokens whose surprise is nearest to the expected one
    (locally typical sampling, arXiv 2202.00666), the fewest that hold more than `p`."""
    surprise = -np.log(np.maximum(probs, np.finfo(np.float64).tiny))
    entropy = (probs * surprise).sum()
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    count = int(np.searchsorted(np.cumsum(probs[order]), p, side="right")) + 1
    keep = np.zeros(len(probs), np.bool_)
    keep[order[:count]] = True
    return keep


def keep_top_p(probs: np.ndarray, p: float) -> np.ndarray:
    """(n,) highest first -> (n,) bool: the fewest most likely tokens that hold at least `p`."""
    count = int(np.searchsorted(np.cumsum(probs), p, side="left")) + 1
    return np.arange(len(probs)) < count


def keep_min_p(probs: np.ndarray, p: float) -> np.ndarray:
    """(n,) highest first -> (n,) bool: the tokens at least `p` times as likely as the first."""
    likely: np.ndarray = probs >= p * probs[0]
    return likely


def choose(probs: np.ndarray, uniform: float) -> int:
    """(n,) probabilities and a number in [0, 1) -> an index, by the inverse of the distribution."""
    cumulative = np.cumsum(probs)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def report(logits: np.ndarray, token: int, n: int) -> Sampled:
    """`token` with its log-probability and those of the `n` most likely, from raw logits (V,)."""
    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= math.log(np.exp(logprobs).sum())
    listed: list[int] = top_k(logprobs, n).tolist() if n else []
    if token not in listed:
        listed.append(token)
    top = tuple((other, float(logprobs[other])) for other in listed)
    return Sampled(token, float(logprobs[token]), top)
