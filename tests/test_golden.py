"""A trained model of 260,000 weights writes the text that llama2.c writes with it."""

import json
from typing import Any

import numpy as np
import pytest
from conftest import shared

from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile, open_gguf
from cpuinfer.models.llama import Llama, Span
from cpuinfer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def file() -> GGUFFile:
    return open_gguf(shared("models/stories260K.gguf"))


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    expected: dict[str, Any] = json.loads(
        shared("models/stories260K_expected.json").read_text(encoding="utf-8")
    )
    return expected


def greedy(model: Llama, token: int, length: int) -> list[int]:
    """`length` ids from `token` on, each the likeliest after those before."""
    cache, ids = model.make_cache(), [token]
    while len(ids) < length:
        (row,) = model.forward([Span(np.array(ids[-1:], np.int32), cache, 1)])
        ids.append(int(row.argmax()))
    return ids


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_text(file: GGUFFile, known: dict[str, Any], kv_type: str, threads: int) -> None:
    tokenizer = load_tokenizer(file)
    model = Llama(file, ModelConfig.from_gguf(file), kv_type, threads)
    ids = greedy(model, known["greedy_ids"][0], len(known["greedy_ids"]))
    assert tokenizer.decode(ids)[:400] == known["greedy_text"][:400]
    assert len(known["greedy_text"]) >= 400
    assert ids == known["greedy_ids"]


def test_largest_logits(file: GGUFFile, known: dict[str, Any]) -> None:
    model = Llama(file, ModelConfig.from_gguf(file), "f32")
    top = known["top5"]
    ids = np.array(known["greedy_ids"][: len(top)], np.int32)
    logits = model.forward([Span(ids, model.make_cache(), len(ids))])
    want = np.array(top)  # (positions, 5, id and logit)
    largest = np.argsort(-logits, axis=1)[:, :5]
    np.testing.assert_array_equal(largest, want[:, :, 0])
    got = np.take_along_axis(logits, largest, axis=1)
    np.testing.assert_allclose(got, want[:, :, 1], rtol=0, atol=1e-3)
    first = known["logits_first_tokens_pos0"]
    np.testing.assert_allclose(logits[0, : len(first)], first, rtol=0, atol=1e-3)
