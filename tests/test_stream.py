"""Text that appears id by id: the same text, whole characters, each space once."""

import random

import pytest
from test_tokenizer import (
    FIRST_FREE,
    SPACE,
    SPACE_A,
    A,
    converted,
    llama_vectors,
    load,
    mistral_vectors,
    of_file,
    random_texts,
    vocabulary,
)

from cpuinfer.tokenizer import StreamDecoder, Tokenizer

LLAMA = "vocab/ggml-vocab-llama-spm.gguf"


def byte_ids(text: str | bytes) -> list[int]:
    """`text` in byte tokens of the small vocabulary."""
    return [3 + byte for byte in (text.encode() if isinstance(text, str) else text)]


def pieces(tokenizer: Tokenizer, ids: list[int], previous_ids: tuple[int, ...] = ()) -> list[str]:
    """What each id gives, and what is left at the end."""
    stream = StreamDecoder(tokenizer, previous_ids)
    return [*map(stream.add, ids), stream.finish()]


def test_characters_split_over_tokens() -> None:
    tokenizer = load(vocabulary())
    assert pieces(tokenizer, [SPACE, *byte_ids("é"), A]) == ["", "", "é", "a", ""]
    given = pieces(tokenizer, [*byte_ids("€"), *byte_ids("🦙")])
    assert given == ["", "", "€", "", "", "", "🦙", ""]


def test_family_emoji_appears_character_by_character() -> None:
    family = "👩\u200d👧"  # woman, zero width joiner, girl
    given = pieces(load(vocabulary()), byte_ids(family))
    assert given == ["", "", "", "👩", "", "", "\u200d", "", "", "", "👧", ""]


@pytest.mark.parametrize(
    "data, given",
    [
        (b"\xffa", ["\ufffd", "a", ""]),  # no character begins so
        (b"\x80", ["\ufffd", ""]),
        (b"\xc0\xaf", ["\ufffd", "\ufffd", ""]),
        (b"\xe2\x82", ["", "", "\ufffd"]),  # unfinished at the end
        (b"\xe2\x82a", ["", "", "\ufffda", ""]),  # never finished
        (b"\xf0\x9f\xe2\x82\xac", ["", "", "\ufffd", "", "€", ""]),
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd", ""]),  # a surrogate
        (b"\xf4\x90", ["", "\ufffd\ufffd", ""]),  # beyond U+10FFFF
    ],
)
def test_bytes_that_are_no_character(data: bytes, given: list[str]) -> None:
    tokenizer = load(vocabulary())
    assert pieces(tokenizer, byte_ids(data)) == given
    assert "".join(given) == tokenizer.decode(byte_ids(data))


def test_spaces_at_the_start_of_a_text() -> None:
    tokenizer = load(vocabulary())
    assert pieces(tokenizer, [SPACE_A, SPACE_A]) == ["a", " a", ""]
    assert pieces(tokenizer, [1, SPACE, SPACE_A]) == ["", "", " a", ""]
    assert pieces(tokenizer, [A, SPACE_A]) == ["a", " a", ""]
    without_prefix = load(vocabulary(add_space_prefix=False))
    assert pieces(without_prefix, [SPACE_A, SPACE_A]) == [" a", " a", ""]


def test_spaces_in_a_continuation() -> None:
    tokenizer = load(vocabulary())
    assert pieces(tokenizer, [SPACE_A], (1, SPACE_A)) == [" a", ""]
    assert pieces(tokenizer, [A], (1, SPACE_A)) == ["a", ""]
    assert pieces(tokenizer, [SPACE_A], (1,)) == ["a", ""]  # the prompt had no text
    assert pieces(tokenizer, [SPACE_A], (1, SPACE)) == [" a", ""]
    assert pieces(tokenizer, byte_ids("€")[2:], tuple(byte_ids("€")[:2])) == ["€", ""]


def test_continuation_of_a_prompt() -> None:
    tokenizer = of_file(LLAMA)
    prompt = tuple(tokenizer.encode("Once upon a time"))
    whole = tokenizer.encode("Once upon a time there was")
    assert "".join(pieces(tokenizer, whole[len(prompt) :], prompt)) == " there was"


def test_control_tokens_give_nothing() -> None:
    tokenizer = load(vocabulary({"<|im_end|>": 3}))
    given = pieces(tokenizer, [1, SPACE_A, FIRST_FREE, *byte_ids("é")[:1], 2, *byte_ids("é")[1:]])
    assert given == ["", "a", "", "", "", "é", ""]


@pytest.mark.parametrize(
    "name, reference",
    [
        ("mistral-v1", "tokenizer.model.v1"),
        ("mistral-v3", "mistral_instruct_tokenizer_240216.model.v2"),
        (LLAMA, None),
    ],
)
def test_vectors(name: str, reference: str | None) -> None:
    tokenizer = converted(name) if reference else of_file(name)
    vectors = mistral_vectors(reference) if reference else llama_vectors()
    assert len(vectors) in (73, 46)
    for text, ids in vectors:
        given = pieces(tokenizer, ids)
        assert "".join(given) == text
        for cut in range(0, len(ids) + 1, 3):
            start = StreamDecoder(tokenizer)
            before = "".join(map(start.add, ids[:cut]))
            assert before + "".join(pieces(tokenizer, ids[cut:], tuple(ids[:cut]))) == text


def test_random_ids() -> None:
    """Any ids, bytes in disorder included, give in pieces what they give at once."""
    tokenizer = load(vocabulary())
    rng = random.Random(5)
    for _ in range(500):
        ids = [rng.choice((rng.randrange(259), rng.randrange(FIRST_FREE))) for _ in range(20)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_random_texts() -> None:
    tokenizer = of_file(LLAMA)
    for text in random_texts(200):
        given = pieces(tokenizer, tokenizer.encode(text))
        assert "".join(given) == text
        assert "\ufffd" not in "".join(given)


def test_tokens_that_do_not_exist() -> None:
    stream = StreamDecoder(load(vocabulary()))
    with pytest.raises(ValueError, match="token -1 does not exist"):
        stream.add(-1)
