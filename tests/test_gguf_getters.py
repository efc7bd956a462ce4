"""The getters of a GGUFFile: which values they take, what they say of the others."""

from collections.abc import Callable
from pathlib import Path

import gguf_files as files
import numpy as np
import pytest
from gguf_files import BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64

from cpuinfer.gguf import ModelFormatError, parse

PATH = Path("model.gguf")


def refusal(read: Callable[[], object]) -> ModelFormatError:
    """The error `read` raises, which is one line."""
    with pytest.raises(ModelFormatError) as caught:
        read()
    assert str(caught.value).isprintable()
    return caught.value


VALUES = parse(
    files.gguf(
        [
            *(files.key(f"int.{kind}", kind, 7) for kind in (U8, I8, U16, I16, U32, I32, U64, I64)),
            files.key("negative", I32, -1),
            files.key("largest", U64, 2**64 - 1),
            files.key("f32", F32, 0.5),
            files.key("f64", F64, 1e300),
            files.key("nan", F32, float("nan")),
            files.key("inf", F64, float("-inf")),
            files.key("true", BOOL, 1),
            files.key("false", BOOL, 0),
            files.key("text", STRING, "text"),
            files.array_key("ints", I32, [7]),
            files.array_key("scores", F32, [0.5, -1]),
            files.array_key("tokens", STRING, ["a", "b"]),
        ]
    ),
    PATH,
)


def test_getters() -> None:
    for kind in (U8, I8, U16, I16, U32, I32, U64, I64):
        assert VALUES.uint(f"int.{kind}") == 7
        assert VALUES.number(f"int.{kind}") == 7.0
    assert VALUES.uint("largest") == 2**64 - 1
    assert (VALUES.number("f32"), VALUES.number("f64")) == (0.5, 1e300)
    assert VALUES.number("negative") == -1.0
    assert type(VALUES.number("negative")) is float
    assert (VALUES.flag("true"), VALUES.flag("false")) == (True, False)
    assert VALUES.text("text") == "text"
    assert VALUES.array("tokens", str) == [b"a", b"b"]
    assert VALUES.array("scores", np.float32).tolist() == [0.5, -1.0]
    assert VALUES.array("ints", np.dtype(np.int32)).tolist() == [7]


@pytest.mark.parametrize(
    ("getter", "keys"),
    [
        (VALUES.uint, "negative f32 nan true false text ints tokens"),
        (VALUES.number, "nan inf true text ints scores tokens"),
        (VALUES.text, "int.4 f32 true ints tokens"),
        (VALUES.flag, "int.0 f32 text ints tokens"),
        (lambda key: VALUES.array(key, str), "text int.4 ints scores"),
        (lambda key: VALUES.array(key, np.float32), "f32 ints tokens text"),
        (lambda key: VALUES.array(key, np.uint32), "ints scores int.4"),
    ],
    ids=["uint", "number", "text", "flag", "strings", "float32", "uint32"],
)
def test_getters_refuse_other_types(getter: Callable[[str], object], keys: str) -> None:
    for key in keys.split():
        error = refusal(lambda key=key: getter(key))
        assert error.field == key
        assert error.offset is not None
        assert "expected" in error.reason
    error = refusal(lambda: getter("missing"))
    assert (error.field, error.offset, error.reason) == ("missing", None, "the key is missing")


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("negative", "int -1"),
        ("true", "bool True"),
        ("nan", "float nan"),
        ("text", "str 'text'"),
        ("scores", "an array of 2 float32"),
        ("tokens", "an array of 2 strings"),
    ],
)
def test_refusal_says_what_was_found(key: str, found: str) -> None:
    reason = refusal(lambda: VALUES.uint(key)).reason
    assert reason == f"expected an integer that is not negative, found {found}"


def test_getters_with_a_default() -> None:
    assert VALUES.uint("missing", 5) == 5
    assert VALUES.uint("missing", None) is None
    assert VALUES.number("missing", 0.5) == 0.5
    assert VALUES.text("missing", "") == ""
    assert VALUES.flag("missing", False) is False
    assert VALUES.array("missing", str, None) is None
    assert VALUES.uint("int.4", 5) == 7
    refusal(lambda: VALUES.uint("text", 5))


def test_errors_of_other_rooms_know_the_place() -> None:
    keys = [files.key("a", U8, 1), files.key("llama.block_count", U32, 513)]
    read = parse(files.gguf(keys, [files.tensor("output", [8])], bytes(32)), PATH)
    assert str(read.error("llama.block_count", "too many")) == (
        "model.gguf: llama.block_count: too many (byte 38)"
    )
    assert str(read.error("output", "no")) == "model.gguf: tensor output: no (byte 71)"
    assert str(read.error("absent", "no")) == "model.gguf: absent: no"


def test_result_is_immutable() -> None:
    with pytest.raises(TypeError):
        VALUES.metadata["a"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        VALUES.tensors["a"] = None  # type: ignore[index]
    with pytest.raises(AttributeError):
        VALUES.version = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        VALUES.array("scores", np.float32)[0] = 1
    assert len(repr(VALUES)) < 300
