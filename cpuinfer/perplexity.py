"""How well a model predicts a text, and how far its predictions are from another model's.

llama.cpp's definition: the text becomes tokens once, in chunks that do not overlap, and the first
token of each gives way to BOS where the model adds one. A model reads a chunk from an empty cache;
what its first half says of the second half's tokens is not counted, for too little is known there,
so each token after the first of the second half is scored by -log of its probability, in nats.
Perplexity is e to the mean of these.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from cpuinfer import progress
from cpuinfer.generate import prefill
from cpuinfer.llm import LLM
from cpuinfer.sampling import NumericsError
from cpuinfer.tokenizer import Tokenizer

CONTEXT_LENGTH = 512  # tokens of a chunk in the tables that people publish

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Report = dict[str, Any]
#: Figures of n scored tokens by name, (n,) each.
Scores = dict[str, Doubles]
#: Called with the tokens scored, of how many, and the perplexity so far; of none at first, NaN.
OnScored = Callable[[int, int, float], None]

_ROWS = 16  # tokens scored at a time: in double precision few megabytes, whatever the vocabulary


class Unsuitable(Exception):
    """A text that is too short, or that two models do not read as the same tokens."""


def examine(
    loaded: LLM,
    text: str,
    chunks: int | None = None,
    base: LLM | None = None,
    on_scored: OnScored = lambda done, total, perplexity: None,
) -> Report:
    """The perplexity of a text in chunks of the model's context length, the first `chunks` of them.

    With `base`, loaded with the same context length, also how far the model is from that one.
    Raises Unsuitable, ValueError for a number out of range, NumericsError.
    """
    rows = split(loaded.tokenizer, text, loaded.context_length)
    if base is not None:
        _check_agreement(loaded, base, rows, split(base.tokenizer, text, base.context_length))
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    scores = _score_chunks(loaded, base, rows[:chunks], on_scored)
    report = {
        "model": str(loaded.path),
        "kv_type": loaded.kv_type,
        "context_length": loaded.context_length,
        "chunks": len(rows[:chunks]),
        "tokens": len(scores["nll"]),
        "perplexity": perplexity(scores["nll"]),
    }
    if base is None:
        return report
    against = {
        "model": str(base.path),
        "kv_type": base.kv_type,
        "perplexity": perplexity(scores["base_nll"]),
    }
    return {**report, "base": against, **divergence(scores)}


def split(tokenizer: Tokenizer, text: str, length: int, least: int = 2) -> npt.NDArray[np.int32]:
    """A text's whole chunks (n, length), each with BOS for its first token if the model adds one.

    Unsuitable for less than `least` of them, ValueError for a length that leaves next to nothing to
    score.
    """
    if length < 8:
        raise ValueError(f"a chunk must have at least 8 tokens, got {length}")
    ids = np.array(tokenizer.encode(text), np.int32)
    if len(ids) < least * length:
        raise Unsuitable(
            f"the text has {len(ids)} tokens, but chunks of {length} take at least "
            f"{least * length}: take a longer text or shorter chunks"
        )
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        rows[:, 0] = tokenizer.bos_id
    return rows


def _check_agreement(
    loaded: LLM, base: LLM, rows: npt.NDArray[np.int32], base_rows: npt.NDArray[np.int32]
) -> None:
    sizes = loaded.config.vocab_size, base.config.vocab_size
    if sizes[0] != sizes[1]:
        raise Unsuitable(f"the models cannot be compared: of {sizes[0]} and {sizes[1]} tokens")
    if not np.array_equal(rows, base_rows):
        raise Unsuitable("the models cannot be compared: their tokenizers split this text unalike")


def _score_chunks(
    loaded: LLM, base: LLM | None, chunks: npt.NDArray[np.int32], on_scored: OnScored
) -> Scores:
    """The scores of all chunks (n, length); both models read a chunk before either goes on."""
    tokens = chunks[:, chunks.shape[1] // 2 + 1 :].reshape(-1)
    others = repeat(None) if base is None else _passes(base, chunks)
    found: list[Scores] = []
    done, nats = 0, 0.0
    on_scored(done, len(tokens), math.nan)
    for logits, base_logits in zip(_passes(loaded, chunks), others, strict=base is not None):
        for start in range(0, len(logits), _ROWS):
            some = slice(start, start + _ROWS)
            expected = tokens[done : done + len(logits)][some]
            if base_logits is None:
                found.append(score(logits[some], expected))
            else:
                found.append(compare(logits[some], base_logits[some], expected))
            nats += found[-1]["nll"].sum()
        done += len(logits)
        on_scored(done, len(tokens), _exp(nats / done))
    return {name: np.concatenate([scores[name] for scores in found]) for name in found[0]}


def _passes(loaded: LLM, chunks: npt.NDArray[np.int32]) -> Iterator[Floats]:
    """The logits (T, V) before each scored token, pass by pass; NumericsError for NaN and inf."""
    cache = loaded.model.make_cache()
    for i, chunk in enumerate(chunks):
        cache.reset()
        scored = len(chunk) - len(chunk) // 2 - 1
        for logits in prefill(loaded.model, chunk[:-1], cache, n_logits=scored):
            if not np.isfinite(logits).all():
                raise NumericsError(f"the model produced logits that are no numbers in chunk {i}")
            if len(logits):
                yield logits


# Formulae


def score(logits: Floats, tokens: npt.NDArray[np.int32]) -> Scores:
    """`nll`, the nats by which each of n tokens is a surprise after its logits (n, V)."""
    return {"nll": -_log_probs(logits)[np.arange(len(tokens)), tokens]}


def compare(logits: Floats, base_logits: Floats, tokens: npt.NDArray[np.int32]) -> Scores:
    """`nll` and `base_nll`; `kl`, the nats of KL(base || model) over the whole vocabulary;
    `same_top`, 1 where both find the same token likeliest, else 0."""
    log_probs, base_log_probs = _log_probs(logits), _log_probs(base_logits)
    places = np.arange(len(tokens)), tokens
    same = logits.argmax(axis=1) == base_logits.argmax(axis=1)
    return {
        "nll": -log_probs[places],
        "base_nll": -base_log_probs[places],
        "kl": (np.exp(base_log_probs) * (base_log_probs - log_probs)).sum(axis=1),
        "same_top": same.astype(np.float64),
    }


def perplexity(nll: Doubles) -> Report:
    """Its value, and the standard error of the mean carried through the exponential."""
    nats = _mean(nll)
    value = _exp(nats["value"])
    return {"value": value, "uncertainty": value * nats["uncertainty"]}


def divergence(scores: Scores) -> Report:
    """How far a model is from the base, in nats; `probability_change` is of the text's tokens."""
    kl = scores["kl"]
    spread = {
        "median": float(np.median(kl)),
        "percentile_99": float(np.percentile(kl, 99)),
        "maximum": float(kl.max()),
    }
    return {
        "kl_divergence": {**_mean(kl), **spread},
        "same_top": _mean(scores["same_top"]),
        "probability_change": _mean(np.exp(-scores["nll"]) - np.exp(-scores["base_nll"])),
    }


def _mean(x: Doubles) -> dict[str, float]:
    """The mean and its standard error."""
    return {"value": float(x.mean()), "uncertainty": float(x.std(ddof=1) / np.sqrt(len(x)))}


def _exp(nats: float) -> float:
    with np.errstate(over="ignore"):  # a model that is certain of the wrong tokens: infinity
        return float(np.exp(nats))


def _log_probs(logits: Floats) -> Doubles:
    """(n, V) float64, in nats."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


# For people


@dataclass(frozen=True)
class Estimate(progress.Stage):
    """What a terminal shows meanwhile: the perplexity of the `done` tokens, and the time left."""

    perplexity: float

    def line(self, now: float) -> str:
        left = (now - self.start) * (self.total - self.done) / self.done
        return (
            f"perplexity {self.perplexity:.4f} of {self.done}/{self.total} tokens  "
            f"ETA {timedelta(seconds=round(left))}"
        )


def shown_on(shown: progress.Progress) -> OnScored:
    """What draws an estimate on each call but the first, from which the time is reckoned."""
    start = 0.0

    def draw(done: int, total: int, perplexity: float) -> None:
        nonlocal start
        now = time.monotonic()
        if done == 0:
            start = now
        else:
            shown.draw(Estimate("perplexity", done, total, start, now, perplexity), now)

    return draw


def text(report: Report) -> Iterator[str]:
    """The report, a line for each fact."""
    facts = {
        "perplexity": _shown(report["perplexity"], 4),
        "scored": f"{report['tokens']} tokens of {report['chunks']} x {report['context_length']}",
    }
    if "base" in report:
        base, kl = report["base"], report["kl_divergence"]
        facts |= {
            "base": f"{_shown(base['perplexity'], 4)}, {base['model']}",
            "KL": f"{_shown(kl, 6)} nats; median {kl['median']:.6f}, "
            f"99th percentile {kl['percentile_99']:.6f}, maximum {kl['maximum']:.6f}",
            "same top": f"{_shown(report['same_top'], 3, 100)} % of the likeliest tokens",
            "change of p": f"{_shown(report['probability_change'], 3, 100)} % of the text's tokens",
        }
    for name, fact in facts.items():
        yield f"{name:<13}{fact}"


def _shown(figure: dict[str, float], digits: int, unit: float = 1) -> str:
    value, uncertainty = unit * figure["value"], unit * figure["uncertainty"]
    return f"{value:.{digits}f} +/- {uncertainty:.{digits + 1}f}"
