"""Names of models, and which file of a repository they mean."""

import pytest

from cpuinfer.hub import names
from cpuinfer.hub.names import Name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Some-One/Tiny-GGUF", Name("Some-One", "Tiny-GGUF")),
        ("o/r:q4_k_m", Name("o", "r", "Q4_K_M")),
        ("hf.co/o/r:UD-Q4_K_XL", Name("o", "r", "UD-Q4_K_XL")),
        ("huggingface.co/o/r", Name("o", "r")),
        ("https://huggingface.co/o/r", Name("o", "r")),
        ("https://huggingface.co/o/r/tree/main", Name("o", "r")),
        ("https://huggingface.co/o/r/tree/v1/", Name("o", "r", revision="v1")),
        ("hf.co/o/r/", Name("o", "r")),
        ("https://HuggingFace.co/o/r/blob/main/a.gguf", Name("o", "r", None, "a.gguf")),
        (
            "https://huggingface.co/o/r/resolve/v1/sub/a%20b.gguf?download=true",
            Name("o", "r", None, "sub/a b.gguf", "v1"),
        ),
        ("o/r/sub/a.gguf", Name("o", "r", None, "sub/a.gguf")),
        (
            "mistral",
            Name("bartowski", "Mistral-7B-Instruct-v0.3-GGUF", short="mistral"),
        ),
        (
            "Mistral:v0.2",
            Name("TheBloke", "Mistral-7B-Instruct-v0.2-GGUF", short="mistral:v0.2"),
        ),
        (
            "mistral-base:v0.1:q8_0",
            Name("TheBloke", "Mistral-7B-v0.1-GGUF", "Q8_0", short="mistral-base:v0.1"),
        ),
    ],
)
def test_names(text: str, expected: Name) -> None:
    assert names.parse(text) == expected
    assert names.parse(str(expected)) == expected


BAD_NAMES = [
    "",
    "mistral:v0.9",
    "model",
    "/etc/passwd",
    "../../x",
    "o/..",
    "o/r..x",
    "o/r--x",
    "o/r.git",
    "o/.r",
    "o/r\n",
    "o/r\x1b[2J",
    "o/r:",
    "o/r:Q4 K",
    "o/r:../x",
    "o/r/file.bin",
    "o/r/../a.gguf",
    "o/r/.hidden.gguf",
    "o/r//a.gguf",
    "o/r/a\\b.gguf",
    "https://huggingface.co/o/r/resolve/main/..%2f..%2fa.gguf",
    "https://huggingface.co/o/r/resolve/..%2f../a.gguf",
    "https://example.com/o/r",
    "https://huggingface.co.example.com/o/r",
    "file:///o/r",
    "http://[",
]


@pytest.mark.parametrize("text", BAD_NAMES)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        names.parse(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("file", "qtype"),
    [
        ("mistral-7b-instruct-v0.2.Q4_K_M.gguf", "Q4_K_M"),
        ("Mistral-7B-Instruct-v0.3-Q4_K_M.gguf", "Q4_K_M"),
        ("phi-3-mini-4k-instruct-q4.gguf", "Q4"),
        ("model-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("sub/Big.BF16-00001-of-00002.gguf", "BF16"),
        ("x-fp16.gguf", "FP16"),
        ("Q8_0.gguf", "Q8_0"),
        ("tinyllama.gguf", None),
        ("model-q.gguf", None),
    ],
)
def test_the_type_in_the_name_of_a_file(file: str, qtype: str | None) -> None:
    assert names.type_in(file) == qtype


FILES = ["a-Q2_K.gguf", "a-Q4_0.gguf", "a-Q4_K_M.gguf", "a-Q8_0.gguf", "a.safetensors"]


@pytest.mark.parametrize(
    ("files", "qtype", "chosen"),
    [
        (FILES, None, ("a-Q4_K_M.gguf",)),
        (FILES, "Q8_0", ("a-Q8_0.gguf",)),
        ([FILES[1], FILES[0]], None, ("a-Q4_0.gguf",)),
        ([FILES[0], FILES[3]], None, ("a-Q8_0.gguf",)),
        (["a-IQ2_XS.gguf", "a-Q6_K.gguf"], None, ("a-Q6_K.gguf",)),
        (["a-Q3_K_L.gguf", "a-Q2_K.gguf"], None, ("a-Q2_K.gguf",)),
        (["mmproj-a-Q4_K_M.gguf", "imatrix.gguf", "a-Q8_0.gguf"], None, ("a-Q8_0.gguf",)),
        (
            ["b/a-Q8_0-00002-of-00002.gguf", "b/a-Q8_0-00001-of-00002.gguf"],
            "Q8_0",
            ("b/a-Q8_0-00001-of-00002.gguf", "b/a-Q8_0-00002-of-00002.gguf"),
        ),
    ],
)
def test_which_file_is_taken(files: list[str], qtype: str | None, chosen: tuple[str, ...]) -> None:
    assert names.choose(names.builds(files), Name("o", "r", qtype)).files == chosen


def test_types_that_are_not_there_or_not_one() -> None:
    with pytest.raises(LookupError, match="no type Q9_0; there are Q2_K, Q4_0, Q4_K_M, Q8_0$"):
        names.choose(names.builds(FILES), Name("o", "r", "Q9_0"))
    with pytest.raises(LookupError, match="more than one of type Q4_K_M: o/r/a-Q4_K_M.gguf, o/r/b"):
        names.choose(names.builds([*FILES, "b.Q4_K_M.gguf"]), Name("o", "r"))
    several = [*FILES, "b.Q4_K_M.gguf"]
    name = Name("o", "r", None, "b.Q4_K_M.gguf")
    assert names.choose(names.builds(several), name).files == ("b.Q4_K_M.gguf",)


@pytest.mark.parametrize("text", ["mistrl", "Mixtral", "mistral:v0.9", "mistral-v0.3"])
def test_what_may_have_been_meant(text: str) -> None:
    with pytest.raises(ValueError, match=r"near: mistral\b"):
        names.parse(text)
    with pytest.raises(ValueError, match=r"OWNER/REPO\[:TYPE\] and the short names: mistral, "):
        names.parse("something")


@pytest.mark.parametrize("endpoint", ["nonsense", "http://["])
def test_an_endpoint_that_is_none_does_not_matter_for_names(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert names.parse("hf.co/o/r") == Name("o", "r")
    with pytest.raises(ValueError, match="no name of a repository"):
        names.parse("/o/r.gguf")


@pytest.mark.parametrize(
    ("qtype", "runs"),
    [
        (None, True),
        ("Q4_K_M", True),
        ("UD-Q4_K_XL", True),
        ("BF16", True),
        ("IQ4_XS", False),
        ("UD-IQ2_XXS", False),
        ("TQ1_0", False),
        ("MXFP4_MOE", False),
    ],
)
def test_types_that_run_here(qtype: str | None, runs: bool) -> None:
    assert names.computable(qtype) == runs
