"""llama.cpp, where llama-cpp-python is installed, loads converted files and computes the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    DIM,
    as_checkpoint,
    byte_pairs,
    edit_json,
    random_weights,
    run,
    safetensors_bytes,
    write_checkpoint,
    write_json,
)
from conftest import shared
from numpy.typing import NDArray

from cpuinfer import LLM

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def loaded(path: Path) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=2, seed=0
    )


def logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """(T, V)"""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("model", ["mistral-window", "mistral-full"])
def test_logits(tmp_path: Path, model: str) -> None:
    """As many tokens as the window holds: llama.cpp knows none for this architecture."""
    source, path = shared(f"hf/{model}"), tmp_path / "m.gguf"
    run(source, path, "--type", "F32")
    reference = np.load(source / "reference.npz")
    ids = reference["ids"][:24].tolist()
    found = logits(loaded(path), ids)
    with LLM(path, kv_type="f32") as llm:
        ours = llm.logits(ids)
    np.testing.assert_allclose(found, ours, atol=1e-2)
    np.testing.assert_allclose(found[:, reference["columns"]], reference["logits"][:24], atol=1e-2)


def test_logits_with_stretched_rope(tmp_path: Path) -> None:
    """Llama 3's factors and a linear one: what is in the file means the same there."""
    for name, section in {
        "linear": {"type": "linear", "factor": 4.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }.items():
        directory = write_checkpoint(tmp_path / name)
        weights = random_weights()
        for matrix in weights:
            if matrix.endswith(("q_proj.weight", "k_proj.weight", "embed_tokens.weight")):
                weights[matrix] *= 8  # so that attention, and RoPE in it, decides
        (directory / "model.safetensors").write_bytes(safetensors_bytes(weights))
        edit_json(directory / "config.json", rope_scaling=section, rope_theta=100.0)
        path = tmp_path / f"{name}.gguf"
        run(directory, path, "--type", "F32")
        ids = [1, *range(300, 315)]
        found = logits(loaded(path), ids)
        with LLM(path, kv_type="f32") as llm:
            np.testing.assert_allclose(found, llm.logits(ids), atol=1e-2)
        edit_json(directory / "config.json", rope_scaling=None)
        run(directory, path, "--type", "F32", "--force")
        others = logits(loaded(path), ids)
        assert np.abs(others - found).max() > 0.1


def test_the_same_story(tmp_path: Path) -> None:
    """Greedy, in F16: llama.cpp, this engine, and what llama2.c wrote."""
    known = json.loads(shared("models/stories260K_expected.json").read_text("utf-8"))
    path = tmp_path / "stories.gguf"
    source = as_checkpoint(shared("models/stories260K.gguf"), tmp_path / "stories")
    run(source, path, "--type", "F16")
    with LLM(path) as llm:
        ours = llm.generate([1], max_tokens=150, temperature=0)
        model = loaded(path)
        ids, generated = [1], []
        model.reset()
        while len(generated) < 150:
            model.eval(ids)
            ids = [int(np.argmax(model.scores[model.n_tokens - 1]))]
            generated += ids
        assert list(ours.token_ids) == generated
        text = llm.tokenizer.decode([1, *generated])
        assert known["greedy_text"].startswith(text[:300])
        text = "Once upon a time, é"
        assert model.tokenize(text.encode(), add_bos=True) == llm.tokenizer.encode(text)


def test_mixture_of_experts(tmp_path: Path) -> None:
    """Which this engine does not run yet. With all experts alike, none of them matters: the logits
    are those of the model that has the expert as its only feed-forward part."""
    directory = write_checkpoint(tmp_path)
    weights = random_weights()
    (directory / "model.safetensors").write_bytes(safetensors_bytes(weights))
    run(directory, tmp_path / "dense.gguf", "--type", "F32")
    mixed = {name: x for name, x in weights.items() if ".mlp." not in name}
    rng = np.random.default_rng(1)
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        mixed[f"{moe}.gate.weight"] = rng.standard_normal((3, DIM), np.float32)
        for own, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            for expert in range(3):
                matrix = weights[f"model.layers.{layer}.mlp.{name}_proj.weight"]
                mixed[f"{moe}.experts.{expert}.{own}.weight"] = matrix
    (directory / "model.safetensors").write_bytes(safetensors_bytes(mixed))
    kinds = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    edit_json(directory / "config.json", **kinds)
    run(directory, tmp_path / "mixture.gguf", "--type", "F32")
    ids = [1, *range(300, 315)]
    found = logits(loaded(tmp_path / "mixture.gguf"), ids)
    np.testing.assert_allclose(found, logits(loaded(tmp_path / "dense.gguf"), ids), atol=1e-3)


def test_byte_pairs(tmp_path: Path) -> None:
    """Texts become the ids that the library of tokenizer.json gives them."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = write_checkpoint(tmp_path)
    (directory / "tokenizer.model").unlink()
    write_json(directory / "tokenizer.json", byte_pairs())
    write_json(directory / "tokenizer_config.json", {"bos_token": "<|begin_of_text|>"})
    edit_json(directory / "config.json", bos_token_id=259, eos_token_id=260)
    run(directory, tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("hello hell", "he'll 12345, x", "line\n\n  break é 漢"):
        assert model.tokenize(text.encode()) == library.encode(text).ids
    assert model.tokenize(b"<tool>a", add_bos=False, special=True)[0] == 260
