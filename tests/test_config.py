"""config.py: hyper-parameters as gguf-py writes them, and what is refused (H01-H05, H07, H13)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from cpuinfer.config import ModelConfig, SlidingWindow
from cpuinfer.gguf import ModelFormatError, open_gguf

U32, I32, F32, TEXT, FLAG = (
    GGUFValueType.UINT32,
    GGUFValueType.INT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.STRING,
    GGUFValueType.BOOL,
)

# A small model, by keys after "llama.".
SMALL = {
    "context_length": 512,
    "embedding_length": 96,
    "block_count": 3,
    "feed_forward_length": 160,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 2.0**-17,
    "rope.freq_base": 50000.0,
    "rope.dimension_count": 8,
    "vocab_size": 20,
}

MISTRAL_V01 = {
    "context_length": 32768,
    "embedding_length": 4096,
    "block_count": 32,
    "feed_forward_length": 14336,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
    "attention.layer_norm_rms_epsilon": 2.0**-17,
    "vocab_size": 32000,
}

Write = Callable[..., Path]


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key by its Python type; a pair (value, type) says which of GGUF's types."""
    if isinstance(value, tuple):
        writer.add_key_value(key, *value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(shape, tokens=..., rows=..., **changes): a file with those keys, None for none."""

    def make(
        shape: dict[str, Any],
        changes: dict[str, Any] | None = None,
        architecture: str = "llama",
        tokens: int | None = None,
        embedding: tuple[int, ...] | None = None,
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for name, value in (shape | (changes or {})).items():
            if value is not None:
                add(writer, f"{architecture}.{name}", value)
        if tokens is not None:
            writer.add_token_list([f"t{i}" for i in range(tokens)])
        if embedding is not None:
            writer.add_tensor("token_embd.weight", np.zeros(embedding, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def load(path: Path, window: SlidingWindow = "auto") -> ModelConfig:
    return ModelConfig.from_gguf(open_gguf(path), window)


# What is read


def test_every_key_has_its_field(write: Write) -> None:
    path = write(SMALL, {"attention.sliding_window": 100}, tokens=20, embedding=(20, 96))
    config = load(path)
    assert config == ModelConfig(
        dim=96,
        hidden_dim=160,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=20,
        norm_eps=2.0**-17,
        rope_theta=50000.0,
        rope_dim=8,
        sliding_window=100,
        context_length=512,
    )
    assert config.group_size == 3


def test_missing_keys_have_their_defaults(write: Write) -> None:
    missing = ("attention.head_count_kv", "rope.freq_base", "rope.dimension_count")
    config = load(write(SMALL, dict.fromkeys(missing)))
    assert (config.n_kv_heads, config.rope_theta, config.rope_dim) == (6, 10_000.0, 16)
    assert (config.sliding_window, config.rope_scale) == (None, 1.0)


def test_heads_need_not_divide_the_width(write: Write) -> None:
    changes = {"attention.head_count": 5, "attention.head_count_kv": 1}
    lengths = {"attention.key_length": 32, "attention.value_length": 32}
    assert load(write(SMALL, changes | lengths)).head_dim == 32


def test_integers_of_any_width_are_read(write: Write) -> None:
    assert load(write(SMALL, {"block_count": (3, GGUFValueType.UINT64)})).n_layers == 3
    assert load(write(SMALL, {"block_count": (3, I32)})).n_layers == 3


def test_one_number_of_heads_for_every_layer(write: Write) -> None:
    assert load(write(SMALL, {"attention.head_count_kv": [3, 3, 3]})).n_kv_heads == 3


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 2.0}, 2.0),
        ({"rope.scale_linear": 8.0}, 8.0),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 8.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.type": "linear"}, 1.0),
        ({"rope.scaling.factor": 0.0}, 1.0),
    ],
)
def test_linear_scaling_of_positions(write: Write, changes: dict[str, Any], scale: float) -> None:
    assert load(write(SMALL, changes)).rope_scale == scale


def test_features_said_to_be_absent_are_fine(write: Write) -> None:
    absent = {"expert_count": 0, "attention.causal": True, "final_logit_softcapping": 0.0}
    assert load(write(SMALL, absent)) == load(write(SMALL))


# The sliding window


@pytest.mark.parametrize(
    ("shape", "changes", "asked", "window"),
    [
        (SMALL, {}, "auto", None),
        (SMALL, {}, 64, 64),
        (SMALL, {"attention.sliding_window": 100}, "auto", 100),
        (SMALL, {"attention.sliding_window": 100}, 64, 64),
        (SMALL, {"attention.sliding_window": 100}, "off", None),
        (SMALL, {"attention.sliding_window": 100}, None, None),
        (SMALL, {"attention.sliding_window": 0}, "auto", None),
        (MISTRAL_V01, {}, "auto", 4096),
        (MISTRAL_V01, {"rope.freq_base": 10_000.0}, "auto", 4096),
        (MISTRAL_V01, {}, "off", None),
        (MISTRAL_V01, {}, 1024, 1024),
        (MISTRAL_V01, {"attention.sliding_window": 512}, "auto", 512),
        (MISTRAL_V01, {"attention.sliding_window": 0}, "auto", None),
        (MISTRAL_V01, {"rope.freq_base": 1e6}, "auto", None),  # v0.2 and v0.3
        (MISTRAL_V01, {"context_length": 8192}, "auto", None),
        (MISTRAL_V01, {"attention.head_count_kv": 32}, "auto", None),
        (MISTRAL_V01, {"feed_forward_length": 11008}, "auto", None),
        (MISTRAL_V01, {"block_count": 48}, "auto", None),
    ],
)
def test_sliding_window(
    write: Write,
    shape: dict[str, Any],
    changes: dict[str, Any],
    asked: SlidingWindow,
    window: int | None,
) -> None:
    assert load(write(shape, changes), asked).sliding_window == window


@pytest.mark.parametrize("asked", [0, -1, 2**31, 1.5, True, "4096", ""])
def test_a_window_that_is_none(write: Write, asked: Any) -> None:
    with pytest.raises(ValueError, match="sliding_window"):
        load(write(SMALL), asked)


# What is refused


def refused(path: Path, field: str) -> str:
    """The message of the error, which must be about `field`."""
    with pytest.raises(ModelFormatError) as caught:
        load(path)
    assert caught.value.field == field
    assert caught.value.path == path
    return str(caught.value)


NUMBERS = [
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_missing_key_is_named(write: Write, name: str) -> None:
    assert "missing" in refused(write(SMALL, {name: None}), f"llama.{name}")


@pytest.mark.parametrize("name", [*NUMBERS[:5], "attention.head_count_kv", "vocab_size"])
def test_h01_zero(write: Write, name: str) -> None:
    refused(write(SMALL, {name: 0}), f"llama.{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_count", 513),
        ("block_count", 2**31),
        ("context_length", 2**31),
        ("embedding_length", 2**31),
        ("feed_forward_length", 2**31),
        ("attention.head_count", 2**31),
        ("vocab_size", 2**31),
        ("attention.key_length", 2**31),
        ("attention.sliding_window", 2**31),
    ],
)
def test_h02_too_large(write: Write, name: str, value: int) -> None:
    assert str(value) in refused(write(SMALL, {name: value}), f"llama.{name}")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention.head_count_kv": 4}, "attention.head_count_kv"),
        ({"attention.head_count_kv": 12}, "attention.head_count_kv"),
        ({"attention.head_count_kv": [2, 2, 3]}, "attention.head_count_kv"),
        ({"attention.head_count_kv": [2, 2]}, "attention.head_count_kv"),
        ({"attention.head_count_kv": [0, 0, 0]}, "attention.head_count_kv"),
        ({"attention.head_count_kv": [-2, -2, -2]}, "attention.head_count_kv"),
        ({"attention.head_count_kv": [2.0, 2.0, 2.0]}, "attention.head_count_kv"),
        ({"attention.head_count": 5, "attention.head_count_kv": 5}, "attention.head_count"),
        ({"attention.value_length": 32}, "attention.value_length"),
        ({"attention.key_length": 32, "attention.value_length": 16}, "attention.value_length"),
        ({"rope.dimension_count": 7}, "rope.dimension_count"),
        ({"rope.dimension_count": 18}, "rope.dimension_count"),
        ({"rope.dimension_count": 0}, "rope.dimension_count"),
        ({"attention.key_length": 15, "rope.dimension_count": None}, "rope.dimension_count"),
    ],
)
def test_h03_numbers_that_do_not_fit_together(
    write: Write, changes: dict[str, Any], name: str
) -> None:
    refused(write(SMALL, changes), f"llama.{name}")


@pytest.mark.parametrize("value", ["6", (6.0, F32), (-6, I32), (True, FLAG), [6, 6, 6]])
@pytest.mark.parametrize("name", ["attention.head_count", "block_count"])
def test_h04_wrong_type(write: Write, name: str, value: Any) -> None:
    refused(write(SMALL, {name: value}), f"llama.{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention.layer_norm_rms_epsilon", "1e-5"),
        ("attention.head_count_kv", "2"),
        ("rope.scaling.type", 1),
        ("attention.sliding_window", 4096.0),
        ("vocab_size", "20"),
    ],
)
def test_h04_wrong_type_elsewhere(write: Write, name: str, value: Any) -> None:
    refused(write(SMALL, {name: value}), f"llama.{name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, -1.0])
@pytest.mark.parametrize("name", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
def test_h05_numbers_that_are_none(write: Write, name: str, value: float) -> None:
    refused(write(SMALL, {name: value}), f"llama.{name}")


@pytest.mark.parametrize("value", [float("nan"), -2.0, 1e30])
def test_scaling_factor_out_of_range(write: Write, value: float) -> None:
    refused(write(SMALL, {"rope.scaling.factor": value}), "llama.rope.scaling.factor")


@pytest.mark.parametrize(
    ("tokens", "rows", "key", "field"),
    [
        (19, 20, None, "tokenizer.ggml.tokens"),
        (20, 20, 21, "tokenizer.ggml.tokens"),
        (None, 20, 21, "tensor token_embd.weight"),
        (None, None, None, "llama.vocab_size"),
        (None, 0, None, "tensor token_embd.weight"),
    ],
)
def test_h07_vocabularies_that_differ(
    write: Write, tokens: int | None, rows: int | None, key: int | None, field: str
) -> None:
    embedding = None if rows is None else (rows, 96)
    refused(write(SMALL, {"vocab_size": key}, tokens=tokens, embedding=embedding), field)


@pytest.mark.parametrize(("tokens", "rows"), [(20, None), (None, 20), (20, 20)])
def test_the_vocabulary_is_counted_without_its_key(
    write: Write, tokens: int | None, rows: int | None
) -> None:
    embedding = None if rows is None else (rows, 96)
    path = write(SMALL, {"vocab_size": None}, tokens=tokens, embedding=embedding)
    assert load(path).vocab_size == 20


def test_h13_unknown_architecture(write: Write) -> None:
    message = refused(write(SMALL, architecture="mamba"), "general.architecture")
    assert "mamba" in message
    assert "supported: llama" in message


def test_architecture_that_is_missing_or_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for value in (None, (5, U32)):
        writer = gguf.GGUFWriter(path, "")
        writer.kv_data[0].clear()
        if value is not None:
            writer.add_key_value("general.architecture", *value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        refused(path, "general.architecture")


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("expert_count", 8, "experts"),
        ("rope.scaling.type", "yarn", "yarn"),
        ("rope.scaling.type", "longrope", "longrope"),
        ("attention.causal", False, "later positions"),
        ("attention.clamp_kqv", 8.0, "clamping"),
        ("attention.scale", 0.5, "scale"),
        ("attn_logit_softcapping", 50.0, "attention scores"),
        ("final_logit_softcapping", 30.0, "logits"),
        ("attention.sliding_window_pattern", 2, "some layers"),
        ("attention.sliding_window_pattern", [True, False, True], "some layers"),
    ],
)
def test_arithmetic_not_followed_is_refused(write: Write, name: str, value: Any, word: str) -> None:
    assert word in refused(write(SMALL, {name: value}), f"llama.{name}")
