"""Options that several commands accept, and how their values are read.

Options that are not given stay out of the result, so that every default lives in one place: in
SamplingParams, in LLM.
"""

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.ggml_types import GGMLType

BUNDLED = "a small model that comes with cpuinfer"


def add_model(parser: argparse.ArgumentParser, without: str) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=None,
        help=f"a GGUF file (of a split model, any part) or a model by name (default: {without})",
    )


def add_loading(parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
    group = parser.add_argument_group("the model in memory")
    add_context(group)
    add_threads(group)
    add_overcommit(group)
    return group


def add_overcommit(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--force",
        dest="overcommit",
        action="store_true",
        help="load what does not fit into free memory as well, which may swap",
    )


def add_threads(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: the cores this process may use)",
    )
    group.add_argument(
        "--prefill-threads",
        type=int,
        metavar="N",
        help="threads to read a prompt with (default: those of --threads)",
    )


def add_speculation(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--no-speculation",
        dest="speculation",
        action="store_false",
        help="compute token by token, to compare; the text is the same",
    )


def add_lora(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--lora",
        action="append",
        type=lora,
        metavar="FILE[:SCALE]",
        help="an adapter in a GGUF file, times SCALE (default: 1); may be repeated",
    )


def add_context(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="positions for prompt and text (default: as trained, or fewer where memory is short)",
    )
    add_cache(group)


def add_cache(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--sliding-window",
        type=window,
        metavar="N|off|auto",
        help="keys that each position sees (default: auto, what the model was trained with)",
    )
    add_kv_type(group)


def add_kv_type(group: argparse._ActionsContainer) -> None:
    from cpuinfer.cache import DTYPES

    group.add_argument(
        "--kv-type",
        choices=tuple(DTYPES),
        default="f16",
        help="type of cached keys and values (default: %(default)s)",
    )


#: How long a reply in a chat is if nobody says it.
ALL_ROOM = "what the context has room for"


def add_sampling(parser: argparse.ArgumentParser, max_tokens: str | None = None) -> None:
    """`max_tokens` is what is said of its default where that is not the one of SamplingParams."""
    from cpuinfer.sampling import SamplingParams

    group = parser.add_argument_group("choosing tokens")

    def add(*flags: str, type: Callable[[str], Any], metavar: str, help: str) -> None:
        name = flags[-1].removeprefix("--").replace("-", "_")
        shown = f"{getattr(SamplingParams, name):g}"
        if name == "max_tokens":
            shown = max_tokens or shown
        group.add_argument(*flags, type=type, metavar=metavar, help=f"{help} (default: {shown})")

    add("-n", "--max-tokens", type=int, metavar="N", help="tokens to write at most")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token always")
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="among the likeliest that hold P together; 1: all")
    add("--min-p", type=float, metavar="P", help="among those P times as likely as the likeliest")
    add("--typical-p", type=float, metavar="P", help="among the most typical that hold P; 1: all")
    add("--repeat-penalty", type=float, metavar="R", help="divides recent tokens' logits; 1: off")
    add("--repeat-last-n", type=int, metavar="N", help="tokens that count as recent; -1: all")
    add("--frequency-penalty", type=float, metavar="F", help="taken off for each recent occurrence")
    add("--presence-penalty", type=float, metavar="F", help="taken off once for a recent token")
    group.add_argument(
        "--logit-bias",
        type=bias,
        action="append",
        metavar="ID=BIAS",
        help="added to the logit of token ID, -inf forbids it; may be repeated",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="the same text every time (default: a new one)"
    )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on where the model would end the text"
    )


def window(text: str) -> int | str:
    return text if text in ("auto", "off") else int(text)


def lora(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # the colon is one of the file's name
        return text, 1.0


def size(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)([KMG]?)", text.upper())
    if found is None:
        raise ValueError
    # Thousands, as llama.cpp counts.
    return int(float(found[1]) * 1000 ** ("KMG".find(found[2]) + 1 if found[2] else 0))


def bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    return int(token), float(bias)


def qtype(name: str) -> "GGMLType":
    from quant.ggml_types import GGMLType

    try:
        return GGMLType[name.upper()]
    except KeyError:
        raise ValueError from None


def typed_pattern(text: str) -> tuple[str, "GGMLType"]:
    pattern, _, name = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error:
        raise ValueError from None
    return pattern, qtype(name)


def add_stats(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--stats",
        action="store_true",
        default=False,
        help="speed, memory and the context in use, on standard error",
    )


def add_text_in_chunks(parser: argparse.ArgumentParser, length: int, of: str) -> None:
    parser.add_argument(
        "-f", "--file", metavar="FILE", required=True, help="the text; -: standard input"
    )
    parser.add_argument(
        "--ctx",
        "--context-length",
        dest="context_length",
        type=int,
        default=length,
        metavar="N",
        help=f"{of} (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks", type=int, metavar="N", help="read the first N chunks only (default: all)"
    )


def add_force(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--force", action="store_true", default=False, help=f"replace {what}")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", default=False, help="print one JSON document instead"
    )


# argparse names the function in its message: "invalid number, off or auto value: 'on'"
window.__name__ = "number, off or auto"
bias.__name__ = "ID=BIAS"
size.__name__ = "size such as 2G"
qtype.__name__ = "type of a tensor"
typed_pattern.__name__ = "PATTERN=TYPE"
