"""What a model has said keeps the tokens that it said it with."""

from functools import cache
from pathlib import Path

import pytest

from cpuinfer.chat.spoken import keep_tokens
from cpuinfer.gguf import open_gguf
from cpuinfer.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).parents[1] / "cpuinfer/data/demo.gguf"
BOS, EOS = 1, 2


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(open_gguf(DEMO))


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_bos=False)


def letters(text: str) -> list[int]:
    """A text as bytes, which is never how `encode` puts it."""
    return [3 + byte for byte in text.encode()]


def test_the_vocabulary_is_as_these_tests_take_it() -> None:
    assert tokenizer().decode(letters("häuser")) == "häuser"
    assert encode("the house") != letters(" the house")


def test_the_same_text_keeps_its_tokens() -> None:
    previous = [BOS, *encode("Say it"), *letters(" the house")]
    canonical = [BOS, *encode("Say it the house"), EOS, *encode("And then?")]
    kept = keep_tokens(tokenizer(), canonical, previous)
    assert kept == [*previous, EOS, *encode("And then?")]


def test_a_change_in_the_text_ends_it() -> None:
    previous = [BOS, *encode("Say it"), *letters(" the house")]
    canonical = [BOS, *encode("Say it the hole")]
    kept = keep_tokens(tokenizer(), canonical, previous)
    assert tokenizer().decode(kept) == "Say it the hole"
    assert kept[: 1 + len(encode("Say it"))] == previous[: 1 + len(encode("Say it"))]


def test_tokens_are_taken_whole_on_both_sides() -> None:
    """The texts part within " house" of one and after " h" of the other."""
    previous = [BOS, *letters(" the h"), *encode("im")]
    canonical = [BOS, *encode("the house")]
    kept = keep_tokens(tokenizer(), canonical, previous)
    assert tokenizer().decode(kept) == "the house"
    assert kept == [BOS, *letters(" the"), *encode("house")]


@pytest.mark.parametrize(
    "previous", [[], [EOS], letters(" the house"), [BOS, EOS], [BOS, *letters(" other")]]
)
def test_nothing_in_common_changes_nothing(previous: list[int]) -> None:
    canonical = [BOS, *encode("the house")]
    assert keep_tokens(tokenizer(), canonical, previous) == canonical


def test_control_tokens_are_no_text() -> None:
    """Neither is another control token, nor the text that spells one."""
    for other in (BOS, *letters("</s>")):
        kept = keep_tokens(tokenizer(), [BOS, EOS, *encode("a")], [BOS, other, *letters(" a")])
        assert kept == [BOS, EOS, *encode("a")]


def test_longer_than_the_prompt() -> None:
    """As after a message was taken back."""
    previous = [BOS, *letters(" the house"), EOS, *letters(" more")]
    canonical = [BOS, *encode("the house"), EOS]
    assert keep_tokens(tokenizer(), canonical, previous) == [BOS, *letters(" the house"), EOS]
