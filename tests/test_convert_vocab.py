"""The vocabulary, the special tokens and the templates of converted checkpoints."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoints import (
    TOKENIZER,
    VOCAB,
    VOCAB_KEYS,
    assert_is_the_tiny_vocabulary,
    byte_pairs,
    edit_json,
    metadata,
    outcome,
    run,
    write_checkpoint,
    write_json,
)
from conftest import SHARED
from sentencepiece import SentencePieceProcessor

from cpuinfer.gguf import open_gguf
from cpuinfer.tokenizer import load_tokenizer
from cpuinfer.verify_text import TEXTS

CONTROL, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def test_embedding_longer_than_the_vocabulary(checkpoint: Path) -> None:
    """Added tokens by their id, ids without a name as unused ones."""
    tokens = {"1024": {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>"}}
    write_json(checkpoint / "tokenizer_config.json", {"added_tokens_decoder": tokens})
    write_json(checkpoint / "added_tokens.json", {"<think>": 1026})
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    vocab = {key: found[f"tokenizer.ggml.{key}"] for key in VOCAB_KEYS}
    assert_is_the_tiny_vocabulary(vocab)
    assert vocab["tokens"][1024:] == [
        "<|im_end|>",
        "[PAD1025]",
        "<think>",
        "[PAD1027]",
        "[PAD1028]",
        "[PAD1029]",
    ]
    unused, control = gguf.TokenType.UNUSED, gguf.TokenType.CONTROL
    user = gguf.TokenType.USER_DEFINED
    assert vocab["token_type"][1024:] == [control, unused, user, unused, unused, unused]
    assert len(vocab["scores"]) == VOCAB


def test_ids_that_end_a_text(checkpoint: Path) -> None:
    """The union of both files, in GGUF's three roles and as a list."""
    write_json(
        checkpoint / "generation_config.json", {"eos_token_id": [7, 2, 9], "bos_token_id": 5}
    )
    edit_json(checkpoint / "config.json", eos_token_id=2, bos_token_id=None)
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom")}
    assert ids == {"bos": 5, "eos": 2, "eot": 7, "eom": 9}
    assert found["tokenizer.ggml.eos_token_ids"] == [2, 7, 9]


def test_tokenizer_settings_and_template(checkpoint: Path) -> None:
    settings = {"add_bos_token": False, "add_eos_token": True, "add_prefix_space": False}
    template = "{{ bos_token }}{% for m in messages %}…\n{% endfor %}"
    write_json(checkpoint / "tokenizer_config.json", settings | {"chat_template": template})
    found = metadata(run(checkpoint, checkpoint.parent / "a.gguf"))
    assert found["tokenizer.chat_template"] == template
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is False

    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": named})
    found = metadata(run(checkpoint, checkpoint.parent / "b.gguf"))
    assert found["tokenizer.chat_template"] == "A"
    assert found["tokenizer.chat_template.tool_use"] == "B"

    (checkpoint / "chat_template.jinja").write_text("C")
    found = metadata(run(checkpoint, checkpoint.parent / "c.gguf"))
    assert found["tokenizer.chat_template"] == "C"


def test_token_in_the_place_of_a_piece(checkpoint: Path) -> None:
    """A fine-tune may give a piece another text, and a type with it."""
    tokens = {"700": {"content": "<|turn|>", "special": False}}
    write_json(checkpoint / "tokenizer_config.json", {"added_tokens_decoder": tokens})
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    assert found["tokenizer.ggml.tokens"][700] == "<|turn|>"
    assert found["tokenizer.ggml.token_type"][700] == CONTROL


def test_end_of_a_turn_by_name(checkpoint: Path) -> None:
    """tokenizer_config.json says which end is eos; the others by what they are called."""
    names = {1024: "<|end_of_text|>", 1025: "<|eom_id|>", 1026: "<|eot_id|>", 1027: "<|pad|>"}
    decoder = {str(id): {"content": text, "special": True} for id, text in names.items()}
    settings = {"added_tokens_decoder": decoder, "eos_token": {"content": "<|end_of_text|>"}}
    write_json(checkpoint / "tokenizer_config.json", settings | {"pad_token": "<|pad|>"})
    edit_json(checkpoint / "config.json", eos_token_id=[1025, 1026, 1024])
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    roles = ("eos", "eot", "eom", "padding")
    assert [found[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [1024, 1026, 1025, 1027]
    assert found["tokenizer.ggml.eos_token_ids"] == [1024, 1025, 1026]


def sentencepiece_as_json(path: Path) -> dict[str, Any]:
    """The tiny model as transformers writes it for a fast tokenizer: every pair of pieces that
    makes a piece is a merge, in the order of the pieces they make."""
    pieces = SentencePieceProcessor(model_proto=path.read_bytes())
    texts = [pieces.IdToPiece(id) for id in range(pieces.GetPieceSize())]
    vocab = {text: id for id, text in enumerate(texts)}
    merges = []
    for text in sorted(texts[259:], key=lambda text: -pieces.GetScore(vocab[text])):
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        pairs = [(vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab]
        merges += [f"{a} {b}" for _, _, a, b in sorted(pairs)]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab}
    return {
        "model": model | {"merges": merges},
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "added_tokens": [
            {
                "id": id,
                "content": text,
                "special": True,
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
            for id, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
    }


def test_sentencepiece_in_tokenizer_json(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merging by the scores made of the merges splits texts like the model itself."""
    (checkpoint / "tokenizer.model").unlink()
    write_json(checkpoint / "tokenizer.json", sentencepiece_as_json(TOKENIZER))
    output = checkpoint.parent / "m.gguf"
    found = metadata(run(checkpoint, output))
    vocab = {key: found[f"tokenizer.ggml.{key}"] for key in VOCAB_KEYS}
    assert vocab["tokens"][:1024] == [
        SentencePieceProcessor(model_proto=TOKENIZER.read_bytes()).IdToPiece(id)
        for id in range(1024)
    ]
    assert vocab["token_type"][:4] == [
        gguf.TokenType.UNKNOWN,
        CONTROL,
        CONTROL,
        gguf.TokenType.BYTE,
    ]
    assert vocab["token_type"][1024:] == [UNUSED] * (VOCAB - 1024)
    assert found["tokenizer.ggml.add_space_prefix"] is True
    tokenizer = load_tokenizer(open_gguf(output))
    pieces = SentencePieceProcessor(model_proto=TOKENIZER.read_bytes())
    for text in TEXTS:
        assert tokenizer.encode(text, add_bos=False) == pieces.encode(text), text


@pytest.mark.parametrize(
    "merges", [["h e", "l l", "he ll"], [["h", "e"], ["l", "l"], ["he", "ll"]]]
)
def test_byte_pairs(checkpoint: Path, capfd: pytest.CaptureFixture[str], merges: list[Any]) -> None:
    """Everything llama.cpp needs, from both notations of merges; this engine says that it cannot
    run the file yet."""
    (checkpoint / "tokenizer.model").unlink()
    tokenizer = byte_pairs()
    tokenizer["model"]["merges"] = merges
    write_json(checkpoint / "tokenizer.json", tokenizer)
    write_json(checkpoint / "tokenizer_config.json", {"bos_token": "<|begin_of_text|>"})
    edit_json(checkpoint / "config.json", bos_token_id=None, eos_token_id=[260])
    found = metadata(run(checkpoint, checkpoint.parent / "m.gguf"))
    assert "does not run byte-pair vocabularies yet" in capfd.readouterr().err
    keys = {
        key.removeprefix("tokenizer.ggml.") for key in found if key.startswith("tokenizer.ggml")
    }
    assert keys == {
        "model",
        "pre",
        "tokens",
        "token_type",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "add_bos_token",
        "add_eos_token",
    }
    vocab = {key: found[f"tokenizer.ggml.{key}"] for key in keys}
    assert (vocab["model"], vocab["pre"]) == ("gpt2", "llama-bpe")
    assert vocab["merges"] == ["h e", "l l", "he ll"]
    assert vocab["tokens"][256:262] == [
        "he",
        "ll",
        "hell",
        "<|begin_of_text|>",
        "<tool>",
        "[PAD261]",
    ]
    types = vocab["token_type"]
    assert set(types[:259]) == {gguf.TokenType.NORMAL}
    assert types[259:262] == [CONTROL, gguf.TokenType.USER_DEFINED, UNUSED]
    assert len(types) == VOCAB
    assert (vocab["bos_token_id"], vocab["eos_token_id"]) == (259, 260)
    assert (vocab["add_bos_token"], vocab["add_eos_token"]) == (True, False)


def test_byte_pairs_are_verified_as_far_as_they_can(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cpuinfer import cli

    (checkpoint / "tokenizer.model").unlink()
    write_json(checkpoint / "tokenizer.json", byte_pairs())
    edit_json(checkpoint / "config.json", bos_token_id=259, eos_token_id=260)
    assert cli.main(["convert", str(checkpoint), str(checkpoint.parent / "m"), "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)["verification"]
    assert len(proof["tensors"]) == 20
    assert "not supported" in proof["vocabulary"]["skipped"]
    assert "not supported" in proof["logits"]["skipped"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {"type": "Unigram"}}, "model: type Unigram, only BPE is read"),
        ({"model": {"vocab": {}, "merges": []}}, "vocab: there are no tokens"),
        ({"model": {"vocab": {"a": -1}, "merges": []}}, "vocab: token 'a' has id -1"),
        ({"model": {"vocab": {"a": 5000}, "merges": []}}, "vocab: token 'a' has id 5000"),
        ({"model": {"vocab": {"a": 1, "b": 1}, "merges": []}}, "vocab: two tokens have id 1"),
        ({"model": {"vocab": {"a": 1}, "merges": ["a"]}}, "merges: wanted two tokens, got 'a'"),
        ({"model": {"vocab": {"a": 1}}}, "merges: wanted a list"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}}}, "rule that is not known"),
        ({"added_tokens": [{"id": "3", "content": "x"}]}, "added_tokens: '3' is no token id"),
    ],
)
def test_bad_tokenizer_json(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any], reason: str
) -> None:
    (checkpoint / "tokenizer.model").unlink()
    write_json(checkpoint / "tokenizer.json", byte_pairs() | change)
    code, error = outcome(capfd, checkpoint, checkpoint.parent / "m.gguf")
    assert (code, error.count("\n")) == (65, 1)
    assert f"tokenizer.json: {reason}" in error or reason in error


def test_deep_tokenizer_json(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer.json").write_text('{"model": ' + "[" * 10**6)
    code, error = outcome(capfd, checkpoint, checkpoint.parent / "m.gguf")
    assert (code, error.count("\n")) == (65, 1)
    assert "tokenizer.json: JSON: " in error


def test_tekken_is_named(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer.model").rename(checkpoint / "tekken.json")
    code, error = outcome(capfd, checkpoint, checkpoint.parent / "m.gguf")
    assert code == 65
    assert "tekken.json is not read yet" in error


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
def test_vocabularies_of_mistral(checkpoint: Path, name: str) -> None:
    """As gguf-py's reader finds them against sentencepiece, control tokens of v3 too."""
    from quant.vocab import sentencepiece_metadata

    path = SHARED / "tokenizers" / f"{name}.model"
    if not path.exists():
        pytest.skip(f"no {path}")
    pieces = SentencePieceProcessor(model_proto=path.read_bytes())
    found = sentencepiece_metadata(path, pieces.GetPieceSize())
    assert found["tokenizer.ggml.tokens"] == [
        pieces.IdToPiece(id) for id in range(pieces.GetPieceSize())
    ]
    controls = [id for id, kind in enumerate(found["tokenizer.ggml.token_type"]) if kind == CONTROL]
    assert controls[:2] == [1, 2]
    assert (3 in controls) == (name == "mistral-v3")  # [INST]
