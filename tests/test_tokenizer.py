"""Ids against sentencepiece, llama.cpp and mistral-common; files whose vocabulary does not fit."""

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from cpuinfer.gguf import ModelFormatError, open_gguf
from cpuinfer.tokenizer import Tokenizer, load_tokenizer, spm
from quant.gguf_writer import write_gguf

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# 0 to 2, then 256 byte tokens from 3, then these from 259 with the scores that follow.
PIECES = ("▁", "a", "b", "ab", "▁a", "bab", "c", "</", "s>", "</s", "[", "I")
SCORES = (0, 0, 0, -1, -2, -3, 0, -4, -5, -6, 0, 0)
SPACE, A, B, AB, SPACE_A, BAB, C, OPEN, S_CLOSE = range(259, 268)
FIRST_FREE = 259 + len(PIECES)


def vocabulary(extra: dict[str, int] | None = None, **changes: Any) -> dict[str, Any]:
    """Metadata of a small vocabulary, with `extra` tokens and their types from `FIRST_FREE` on.

    A change to None takes the key away.
    """
    extra = extra or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *extra]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(PIECES), *extra.values()]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0] * 259 + list(SCORES) + [0] * len(extra), np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def load(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a file with this metadata, written and read."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.gguf"
        write_gguf(path, metadata, [])
        return load_tokenizer(open_gguf(path))


def metadata_of(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What a converter writes for a SentencePiece model."""
    ids = range(model.get_piece_size())
    kinds = (
        (UNKNOWN, model.is_unknown),
        (CONTROL, model.is_control),
        (BYTE, model.is_byte),
        (UNUSED, model.is_unused),
    )
    types = [next((kind for kind, test in kinds if test(token)), NORMAL) for token in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(token) for token in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(t) for t in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
    }


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"{SHARED / path} is not there")
    return SHARED / path


def sentencepiece_model(name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(shared(f"tokenizers/{name}.model")))


@functools.cache
def converted(name: str) -> Tokenizer:
    """The tokenizer of a GGUF file made from a SentencePiece model."""
    return load(metadata_of(sentencepiece_model(name)))


@functools.cache
def of_file(path: str) -> Tokenizer:
    return load_tokenizer(open_gguf(shared(path)))


def mistral_vectors(reference: str) -> list[tuple[str, list[int]]]:
    vectors = json.loads(shared("tokenizers/mistral_text_vectors.json").read_text("utf-8"))
    texts = [entry["text"] for entry in vectors["texts"]]
    return list(zip(texts, vectors["ids"][reference], strict=True))


def llama_vectors() -> list[tuple[str, list[int]]]:
    stem = "vocab/ggml-vocab-llama-spm.gguf"
    texts = shared(f"{stem}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = shared(f"{stem}.out").read_text("utf-8").splitlines()
    return [(text, [*map(int, line.split())]) for text, line in zip(texts, lines, strict=True)]


def random_texts(count: int) -> list[str]:
    """Words, spaces, letters of many scripts, emoji and control characters; never U+2581."""
    rng = random.Random(20231010)
    ranges = ((32, 126), (0, 31), (0xA0, 0x24F), (0x400, 0x4FF), (0x900, 0x97F), (0x4E00, 0x4FFF))
    ranges += ((0xAC00, 0xACFF), (0x1F300, 0x1F6FF), (0xE000, 0xE010), (0x10FFF0, 0x10FFFF))
    words = ("the", " The", "  ", "\n", "\t", "</s>", "<s>", "[INST]", "<0x41>", "'s", "1234", "né")

    def part() -> str:
        if rng.random() < 0.5:
            return rng.choice(words)
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 6)))

    return ["".join(part() for _ in range(rng.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize(
    "name, reference",
    [
        ("mistral-v1", "tokenizer.model.v1"),
        ("mistral-v3", "mistral_instruct_tokenizer_240216.model.v2"),
    ],
)
def test_ids_of_mistral(name: str, reference: str) -> None:
    tokenizer = converted(name)
    vectors = mistral_vectors(reference)
    assert len(vectors) == 73
    for text, ids in vectors:
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "path",
    [
        "vocab/ggml-vocab-llama-spm.gguf",
        # The same vocabulary, once more and once with merges in place of the scores.
        "gguf_samples/gridcore-runner/vocab-spm.gguf",
        "gguf_samples/gridcore-runner/vocab-spm-zeroscores.gguf",
    ],
)
def test_ids_of_llama(path: str) -> None:
    tokenizer = of_file(path)
    vectors = llama_vectors()
    assert len(vectors) == 46
    for text, ids in vectors:
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.decode(ids) == text


def test_merges_stand_in_for_scores() -> None:
    folder = "gguf_samples/gridcore-runner"
    scored, merged = (
        of_file(f"{folder}/vocab-spm.gguf"),
        of_file(f"{folder}/vocab-spm-zeroscores.gguf"),
    )
    lines = shared(f"{folder}/tokenizer-corpus.txt").read_text("utf-8").splitlines()
    texts = [json.loads(line) for line in lines if line]
    texts += [shared(f"{folder}/mixed-corpus.txt").read_text("utf-8"), *random_texts(300)]
    texts += [" " * count for count in range(1, 40)]
    assert len(texts) > 1000
    for text in texts:
        assert merged.encode(text) == scored.encode(text)
    assert merged.encode("llama") == [1, 11148, 3304]  # from left to right: _llam, a


def test_first_merge_of_a_piece_counts() -> None:
    merges = ["a b", "▁ a", "a b", "b ab"]
    for scores in (None, np.full(FIRST_FREE, -1000, np.float32)):
        tokenizer = load(vocabulary(scores=scores, merges=merges))
        assert tokenizer.encode("ab", add_bos=False) == [SPACE, AB]


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3", "tiny-1024"])
def test_random_texts_against_sentencepiece(name: str) -> None:
    reference, tokenizer = sentencepiece_model(name), converted(name)
    for text in random_texts(400):
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


def test_ids_by_hand() -> None:
    tokenizer = load(vocabulary())
    assert tokenizer.encode("abab") == [1, SPACE, AB, AB]  # ab before _a and before bab
    assert tokenizer.encode("ac", add_bos=False) == [SPACE_A, C]
    assert tokenizer.encode("é", add_bos=False) == [SPACE, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_bos=False) == []
    assert tokenizer.decode([1, SPACE, AB, 3 + 0xC3, 3 + 0xA9, 2]) == "abé"


def test_long_text() -> None:
    text = shared("text/wiki.test.raw").read_text("utf-8")[:100_000]
    tokenizer = converted("mistral-v1")
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == sentencepiece_model("mistral-v1").encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("extra", [{}, {"b▁": NORMAL}, {"▁▁": NORMAL, "▁▁c": NORMAL}])
def test_a_text_that_is_cut_gives_the_same_ids(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, int]
) -> None:
    tokenizer = load(vocabulary(extra))
    texts = ["".join(random.Random(seed).choices("abc  \u2581\n", k=60)) for seed in range(200)]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(spm, "PART", 3)
    assert [tokenizer.encode(text) for text in texts] == whole
    assert len(list(spm._parts("ab abc  bb c"))) == 3


def test_bos_only_if_the_file_asks() -> None:
    assert load(vocabulary(add_bos_token=False)).encode("a") == [SPACE_A]
    assert load(vocabulary(add_bos_token=None)).encode("a") == [1, SPACE_A]
    assert load(vocabulary(add_bos_token=None, bos_token_id=None)).encode("a") == [1, SPACE_A]


def test_no_space_in_front_if_the_file_says_so() -> None:
    tokenizer = load(vocabulary(add_space_prefix=False))
    assert tokenizer.encode("a a", add_bos=False) == [A, SPACE_A]
    assert tokenizer.decode([SPACE_A]) == " a"


def test_extra_spaces_removed_if_the_file_says_so() -> None:
    tokenizer = load(vocabulary(remove_extra_whitespaces=True))
    assert tokenizer.encode("  a   a ", add_bos=False) == [SPACE_A, SPACE_A]
    assert tokenizer.encode("  ", add_bos=False) == []


# Ids of text that looks like control tokens.


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3", "tiny-1024"])
def test_text_never_becomes_control(name: str) -> None:
    tokenizer = converted(name)
    special = [t for t in range(tokenizer.vocab_size) if tokenizer.is_control(t)]
    special.append(tokenizer.unk_id)
    texts = [tokenizer.token_text(token) for token in special]
    for text in [*texts, "".join(texts), "a " + " b ".join(texts) + "c"]:
        ids = tokenizer.encode(text, add_bos=False)
        assert not set(ids) & set(special)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "extra, changes, text",
    [
        ({"X": CONTROL}, {}, "X"),  # a single character: sentencepiece looks those up
        ({"X": UNKNOWN}, {}, "X"),
        ({"X": NORMAL}, {"unknown_token_id": FIRST_FREE}, "X"),
        ({"<|im_end|>": USER_DEFINED}, {}, "<|im_end|>"),
        ({"<|im_start|>": USER_DEFINED}, {}, "<|im_start|>"),
        ({"<EOT>": USER_DEFINED}, {}, "<EOT>"),
        ({"[/I]": USER_DEFINED}, {"eot_token_id": FIRST_FREE}, "[/I]"),
        ({"stop": NORMAL, "st": NORMAL, "op": NORMAL}, {"eos_token_id": FIRST_FREE}, "stop"),
    ],
)
def test_hidden_control_tokens(extra: dict[str, int], changes: dict[str, Any], text: str) -> None:
    tokenizer = load(vocabulary(extra, **changes))
    ids = tokenizer.encode(f"a{text}b", add_bos=False)
    assert FIRST_FREE not in ids
    assert tokenizer.decode(ids) == f"a{text}b"
    assert FIRST_FREE in tokenizer.encode(f"a{text}b", parse_special=True)


def test_special_tokens_when_asked() -> None:
    short, long = FIRST_FREE, FIRST_FREE + 1
    tokenizer = load(vocabulary({"[I": CONTROL, "[I]": CONTROL}))
    encode = functools.partial(tokenizer.encode, add_bos=False, parse_special=True)
    assert encode("a</s>[I]a") == [SPACE_A, 2, long, SPACE_A]
    assert encode("[Ia<unk>") == [short, SPACE_A, 0]
    # After a control token a space in the text is the one that goes in front; a second is text.
    assert encode("[I] a") == [long, SPACE_A]
    assert encode("[I]  a") == [long, SPACE, SPACE_A]
    assert encode("[I] [I]") == [long, SPACE, long]
    assert encode(" a") == [SPACE, SPACE_A]


@pytest.mark.parametrize(
    "version, name, cases", [("v1", "mistral-v1", 11), ("v2", "mistral-v3", 17)]
)
def test_rendered_chats_of_mistral(version: str, name: str, cases: int) -> None:
    """mistral-common joins ids and never renders; rendered and parsed, its ids must come back."""
    chats = json.loads(shared("chat/mistral_chat_tokens.json").read_text("utf-8"))["cases"]
    chats = [c for c in chats if c["tokenizer_version"] == version and "tokens" in c]
    assert len(chats) == cases
    for chat in chats:
        text = chat["text"].replace("▁", " ").replace("<0x0A>", "\n")
        assert converted(name).encode(text, add_bos=False, parse_special=True) == chat["tokens"]


def test_user_defined_tokens_are_in_text() -> None:
    extra = {"<tool>": USER_DEFINED, "<tool>x": USER_DEFINED, "▁▁": USER_DEFINED}
    tool, tool_x, spaces = range(FIRST_FREE, FIRST_FREE + 3)
    tokenizer = load(vocabulary(extra))
    for parse_special in (False, True):
        encode = functools.partial(tokenizer.encode, add_bos=False, parse_special=parse_special)
        assert encode("a<tool>a<tool>x") == [SPACE_A, tool, A, tool_x]
        assert encode("<tool> a") == [SPACE, tool, SPACE_A]
        assert encode("a  a") == [SPACE_A, spaces, A]
        assert encode("  a") == [SPACE, spaces, A]
    for text in ("a<tool>a<tool>x", "<tool> a", "  a", "a  a   ", "<tool>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_user_defined_tokens_are_looked_for_before_the_space_in_front() -> None:
    tokenizer = load(vocabulary({"▁c": USER_DEFINED}))
    assert tokenizer.encode("c c", add_bos=False) == [SPACE, C, FIRST_FREE]


def test_unused_pieces_do_not_come_out() -> None:
    tokenizer = load(vocabulary({"cc": UNUSED, "ca": NORMAL}))
    assert tokenizer.encode("cc", add_bos=False) == [SPACE, C, C]
    assert tokenizer.decode([FIRST_FREE]) == "cc"


# What a tokenizer says of its tokens.


def test_token_bytes_and_texts() -> None:
    tokenizer = load(vocabulary({"▁x▁y": NORMAL, "<tool>": USER_DEFINED}))
    assert tokenizer.vocab_size == FIRST_FREE + 2
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.token_bytes(FIRST_FREE) == b" x y"
    assert tokenizer.token_bytes(FIRST_FREE + 1) == b"<tool>"
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert [tokenizer.token_bytes(token) for token in (0, 1, 2)] == [b"", b"", b""]
    assert tokenizer.token_text(1) == "<s>"
    assert tokenizer.token_text(FIRST_FREE) == "▁x▁y"
    controls = [token for token in range(tokenizer.vocab_size) if tokenizer.is_control(token)]
    assert controls == [1, 2]


@pytest.mark.parametrize("token", [-1, FIRST_FREE])
def test_tokens_that_do_not_exist(token: int) -> None:
    tokenizer = load(vocabulary())
    for call in (tokenizer.token_bytes, tokenizer.token_text, tokenizer.is_control):
        with pytest.raises(ValueError, match=f"token {token} does not exist"):
            call(token)
    with pytest.raises(ValueError, match=f"token {token} does not exist"):
        tokenizer.decode([A, token])


def test_decode_takes_one_space_off_the_start() -> None:
    tokenizer = load(vocabulary())
    assert tokenizer.decode([SPACE, SPACE_A, SPACE_A]) == " a a"
    assert tokenizer.decode([1, SPACE_A, 2, SPACE_A]) == "a a"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([3 + 0xE2, 3 + 0x82, A, 3 + 0xFF]) == "\ufffda\ufffd"


def test_tokens_that_end_a_generation() -> None:
    extra = {"<|im_end|>": CONTROL, "<|eot_id|>": USER_DEFINED, "<EOT>": NORMAL, "x": CONTROL}
    im_end, eot, _, x = range(FIRST_FREE, FIRST_FREE + 4)
    assert load(vocabulary()).eog_ids == {2}
    assert load(vocabulary(extra)).eog_ids == {2, im_end, eot}
    assert load(vocabulary(extra, eot_token_id=x)).eog_ids == {2, im_end, eot, x}
    assert load(vocabulary(extra, eom_token_id=x)).eog_ids == {2, im_end, eot, x}


def test_lone_surrogate_is_no_text() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        load(vocabulary()).encode("a\ud800")


# Files that are refused.


def without_bytes() -> dict[str, Any]:
    return vocabulary(
        tokens=["<unk>", "<s>", "</s>", "▁", "a"],
        scores=np.zeros(5, np.float32),
        token_type=np.array([2, 3, 3, 1, 1], np.int32),
    )


def test_unknown_characters_without_byte_tokens() -> None:
    tokenizer = load(without_bytes())
    assert tokenizer.encode("aé", add_bos=False) == [3, 4, 0]
    assert tokenizer.decode([3, 4, 0]) == "a"


def numbers(count: int, dtype: type, value: float = 1) -> np.ndarray:
    return np.full(count, value, dtype)


def renamed(token: int, text: str | bytes) -> list[str | bytes]:
    tokens = list(vocabulary()["tokenizer.ggml.tokens"])
    tokens[token] = text
    return tokens


V = FIRST_FREE
NAN = np.array([0] * (V - 1) + [np.nan], np.float32)
BAD = [
    ("model", {"model": None}, "missing"),
    ("model", {"model": "gpt2"}, "'gpt2' is not supported, only: llama"),
    ("model", {"model": 7}, "expected text"),
    ("tokens", {"tokens": None}, "missing"),
    ("tokens", {"tokens": numbers(V, np.int32)}, "expected an array of strings"),
    # H08, V32, V40
    ("scores", {"scores": numbers(V, np.uint8)}, "expected an array of float32"),
    ("scores", {"scores": numbers(V, np.float64)}, "expected an array of float32"),
    ("scores", {"scores": numbers(V - 1, np.float32)}, f"{V - 1} scores for {V} tokens"),
    ("scores", {"scores": numbers(V + 1, np.float32)}, f"{V + 1} scores for {V} tokens"),
    ("scores", {"scores": NAN}, f"token {V - 1} is not a number"),
    ("scores", {"scores": None}, "no merges"),
    ("scores", {"scores": numbers(V, np.float32, -1000)}, "no merges"),
    ("token_type", {"token_type": None}, "missing"),
    ("token_type", {"token_type": numbers(V, np.uint8)}, "expected an array of int32"),
    ("token_type", {"token_type": numbers(V, np.float32)}, "expected an array of int32"),
    ("token_type", {"token_type": numbers(V + 1, np.int32)}, f"{V + 1} types for {V} tokens"),
    ("token_type", {"token_type": numbers(V, np.int32, 0)}, "token 0 has type 0"),
    ("token_type", {"token_type": numbers(V, np.int32, 7)}, "token 0 has type 7"),
    # H09, V33
    ("bos_token_id", {"bos_token_id": V}, f"token {V} does not exist"),
    ("eos_token_id", {"eos_token_id": V}, f"token {V} does not exist"),
    ("unknown_token_id", {"unknown_token_id": V}, f"token {V} does not exist"),
    ("padding_token_id", {"padding_token_id": V}, f"token {V} does not exist"),
    ("eot_token_id", {"eot_token_id": V}, f"token {V} does not exist"),
    ("eos_token_id", {"eos_token_id": 2**32 - 1}, "token 4294967295 does not exist"),
    ("bos_token_id", {"bos_token_id": np.int32(-1)}, "not negative"),
    ("bos_token_id", {"bos_token_id": "1"}, "expected an integer"),
    (
        "add_bos_token",
        {
            "bos_token_id": None,
            "token_type": np.array([2, 1, 3] + [6] * 256 + [1] * (V - 259), "i4"),
        },
        "there is no bos_token_id",
    ),
    (
        "unknown_token_id",
        {"unknown_token_id": None, "token_type": numbers(V, np.int32)},
        "token 0 is no unknown token",
    ),
    ("unknown_token_id", {"unknown_token_id": 5}, "token 5 is a byte token"),
    # H10, V34
    ("tokens", {"tokens": renamed(5, "<0x-1>")}, "token 5 has type byte and text '<0x-1>'"),
    ("tokens", {"tokens": renamed(5, "<0xZZ>")}, "expected <0xNN>"),
    ("tokens", {"tokens": renamed(5, "<0x 1>")}, "expected <0xNN>"),
    ("tokens", {"tokens": renamed(5, "<0x+f>")}, "expected <0xNN>"),
    ("tokens", {"tokens": renamed(5, "<0x02>\n")}, "expected <0xNN>"),
    ("tokens", {"tokens": renamed(3, "<0x4a>")}, "tokens 3 and 77 are both byte 0x4A"),
    (
        "tokens",
        {"token_type": np.array([2, 3, 3, 1] + [6] * 255 + [1] * (V - 259), np.int32)},
        "255 of 256 byte tokens, 0x00 is missing",
    ),
    # H11, V30, V35
    ("tokens", {"tokens": renamed(A, "c")}, f"tokens {A} and {C} are both 'c'"),
    ("tokens", {"tokens": renamed(A, "x" * (1 << 21))}, f"token {A} has {1 << 21} bytes"),
    ("tokens", {"tokens": renamed(A, "")}, f"token {A} is empty"),
    ("tokens", {"tokens": renamed(A, b"\xff\xfe")}, f"token {A} is not UTF-8"),
    # H12: merges in place of scores
    ("merges", {"scores": None, "merges": ["a b", "ab"]}, "merge 1, b'ab', does not make"),
    ("merges", {"scores": None, "merges": ["a b", "b b"]}, "merge 1, b'b b', does not make"),
    ("merges", {"scores": None, "merges": [b"\xff a"]}, "merge 0"),
    ("merges", {"scores": None, "merges": numbers(3, np.int32)}, "expected an array of strings"),
    ("add_space_prefix", {"add_space_prefix": 1}, "expected a boolean"),
]


@pytest.mark.parametrize("key, changes, reason", BAD)
def test_refused(key: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFormatError) as error:
        load(vocabulary(**changes))
    assert error.value.field == f"tokenizer.ggml.{key}"
    assert reason in error.value.reason
    assert str(error.value).isprintable()


def test_refusal_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("INTERNAL: no")

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", refuse)
    with pytest.raises(ModelFormatError, match="tokens: sentencepiece refuses them: INTERNAL: no"):
        load(vocabulary())


@pytest.mark.parametrize("text", ["\0", "c\0", "c" * 8000])
def test_pieces_that_sentencepiece_cannot_hold(text: str) -> None:
    tokenizer = load(vocabulary({text: NORMAL}))
    ids = tokenizer.encode(f"a{text}a", add_bos=False)
    assert FIRST_FREE not in ids
    assert tokenizer.decode(ids) == f"a{text}a"
    assert tokenizer.token_bytes(FIRST_FREE) == text.encode()


def test_empty_tokens_of_no_use_are_accepted() -> None:
    metadata = vocabulary({"x": UNUSED, "y": UNUSED, "z": CONTROL})
    metadata["tokenizer.ggml.tokens"][-3:] = ["", "", ""]
    tokenizer = load(metadata)
    assert tokenizer.encode("xab", parse_special=True) == [1, SPACE, 3 + ord("x"), AB]
    assert tokenizer.decode([V, V + 1, V + 2]) == ""


def test_scores_matter_not_for_a_single_merge() -> None:
    metadata = without_bytes()
    metadata["tokenizer.ggml.tokens"] = ["<unk>", "<s>", "</s>", "▁a", "a"]
    del metadata["tokenizer.ggml.scores"]
    assert load(metadata).encode("aa", add_bos=False) == [3, 4]
