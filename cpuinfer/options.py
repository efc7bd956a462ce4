"""What the commands accept on their command lines.

Options that are not given stay out of the result, so that every default lives in one place: in
SamplingParams, in LLM. Rooms that take long to import are imported for the command that is asked
for, never for `cpuinfer --help`.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cpuinfer import __version__
from cpuinfer.gguf_errors import escape

if TYPE_CHECKING:
    from quant.ggml_types import GGMLType

BUNDLED = "a small model that comes with cpuinfer"
FIRST_PROMPT = "Once upon a time"

_EXIT_CODES = """\
exit codes: 0 done, 2 usage or a value out of range, 65 a model file that cannot be used,
66 no such input, 73 an output that cannot be made, 74 reading or writing failed,
75 not enough memory now, 130/143 interrupted"""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {escape(message)} (see {self.prog} --help)\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; `command` is its name. SystemExit for --help and for errors."""
    parser = Parser(
        prog="cpuinfer",
        description="Run quantized language models (GGUF files) on a CPU.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cpuinfer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (add_options, summary, description) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {description}",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        if name == chosen:
            add_options(command)
    return parser.parse_args(argv)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of SamplingParams that were given; ValueError where one is out of range."""
    from cpuinfer.sampling import SamplingParams

    params = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(SamplingParams)
        if hasattr(arguments, field.name)
    }
    if "logit_bias" in params:
        params["logit_bias"] = dict(params["logit_bias"])
    SamplingParams(**params)
    return params


def measuring(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of bench.Settings that were given."""
    names = ("prompt", "generation", "depths", "repetitions")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def wishes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of quant.mixes.Wishes that were given."""
    names = ("pure", "output_type", "token_embedding_type", "tensor_types")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def dividing(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of shards.divide that were given."""
    names = ("max_bytes", "max_tensors")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of LLM that were given, except for the model."""
    names = (
        "context_length",
        "threads",
        "prefill_threads",
        "sliding_window",
        "kv_type",
        "template",
        "lora",
        "speculation",
    )
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


# Groups of options


def _add_model(parser: argparse.ArgumentParser, without: str) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=None,
        help=f"a GGUF file; of a split model, any part (default: {without})",
    )


def _add_loading(parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
    group = parser.add_argument_group("the model in memory")
    _add_context(group)
    _add_threads(group)
    return group


def _add_threads(group: argparse._ActionsContainer) -> None:
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


def _add_speculation(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--no-speculation",
        dest="speculation",
        action="store_false",
        help="compute token by token, to compare; the text is the same",
    )


def _add_lora(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--lora",
        action="append",
        type=_lora,
        metavar="FILE[:SCALE]",
        help="an adapter in a GGUF file, times SCALE (default: 1); may be repeated",
    )


def _add_context(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="positions for prompt and text (default: as trained, or fewer where memory is short)",
    )
    _add_cache(group)


def _add_cache(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--sliding-window",
        type=_window,
        metavar="N|off|auto",
        help="keys that each position sees (default: auto, what the model was trained with)",
    )
    _add_kv_type(group)


def _add_kv_type(group: argparse._ActionsContainer) -> None:
    from cpuinfer.cache import DTYPES

    group.add_argument(
        "--kv-type",
        choices=tuple(DTYPES),
        default="f16",
        help="type of cached keys and values (default: %(default)s)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.sampling import SamplingParams

    group = parser.add_argument_group("choosing tokens")

    def add(*flags: str, type: Callable[[str], Any], metavar: str, help: str) -> None:
        default = getattr(SamplingParams, flags[-1].removeprefix("--").replace("-", "_"))
        group.add_argument(
            *flags, type=type, metavar=metavar, help=f"{help} (default: {default:g})"
        )

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
        type=_bias,
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


def _window(text: str) -> int | str:
    return text if text in ("auto", "off") else int(text)


def _lora(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # the colon is one of the file's name
        return text, 1.0


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)([KMG]?)", text.upper())
    if found is None:
        raise ValueError
    # Thousands, as llama.cpp counts.
    return int(float(found[1]) * 1000 ** ("KMG".find(found[2]) + 1 if found[2] else 0))


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    return int(token), float(bias)


def _qtype(name: str) -> "GGMLType":
    from quant.ggml_types import GGMLType

    try:
        return GGMLType[name.upper()]
    except KeyError:
        raise ValueError from None


def _typed_pattern(text: str) -> tuple[str, "GGMLType"]:
    pattern, _, name = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error:
        raise ValueError from None
    return pattern, _qtype(name)


# argparse names the function in its message: "invalid number, off or auto value: 'on'"
_window.__name__ = "number, off or auto"
_bias.__name__ = "ID=BIAS"
_size.__name__ = "size such as 2G"
_qtype.__name__ = "type of a tensor"
_typed_pattern.__name__ = "PATTERN=TYPE"


# Commands


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, BUNDLED)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument(
        "-f", "--file", metavar="FILE", help="a file with the text to continue; -: standard input"
    )
    _add_sampling(parser)
    group = _add_loading(parser)
    _add_lora(group)
    _add_speculation(group)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        default=False,
        help="print one JSON document when done, with the continuation alone",
    )
    output.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: log-probabilities of each token and of the N likeliest",
    )
    _add_stats(output)


def _add_stats(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--stats",
        action="store_true",
        default=False,
        help="speed, memory and the context in use, on standard error",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, BUNDLED)
    parser.add_argument(
        "--system", metavar="TEXT", default=None, help="instructions ahead of the conversation"
    )
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="a built-in chat template or a Jinja file (default: the model file's own)",
    )
    _add_sampling(parser)
    group = _add_loading(parser)
    _add_lora(group)
    _add_speculation(group)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file; of a split model, any part")
    parser.add_argument(
        "--tensors", action="store_true", default=False, help="list every tensor as well"
    )
    _add_json(parser)
    _add_context(parser.add_argument_group("what the memory needed is reckoned for"))


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, "the kernels of the most common types")
    _add_kv_type(parser)
    _add_json(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.bench import Settings

    _add_model(parser, BUNDLED)

    def add(*flags: str, name: str, help: str, **more: Any) -> None:
        default = getattr(Settings, name)
        shown = default if isinstance(default, int) else " and ".join(map(str, default))
        parser.add_argument(
            *flags, type=int, dest=name, metavar="N", help=f"{help} (default: {shown})", **more
        )

    add("-p", "--prompt", name="prompt", help="tokens of the prompt")
    add("-n", "--generation", name="generation", help="tokens to generate")
    add(
        "--depth",
        name="depths",
        help="positions there are before either; may be repeated",
        action="append",
    )
    add("-r", "--repetitions", name="repetitions", help="times each measurement is taken")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the roofline to a file as well")
    _add_json(parser)
    _add_loading(parser)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.perplexity import CONTEXT_LENGTH

    _add_model(parser, BUNDLED)
    parser.add_argument(
        "-f", "--file", metavar="FILE", required=True, help="the text; -: standard input"
    )
    parser.add_argument(
        "--ctx",
        "--context-length",
        dest="context_length",
        type=int,
        default=CONTEXT_LENGTH,
        metavar="N",
        help="tokens of a chunk, of which the second half is scored (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks", type=int, metavar="N", help="read the first N chunks only (default: all)"
    )
    parser.add_argument(
        "--kl-divergence",
        metavar="AGAINST.gguf",
        help="a model to compare with, loaded beside the first one with the same options",
    )
    _add_json(parser)
    group = parser.add_argument_group("the model in memory")
    _add_cache(group)
    _add_lora(group)
    _add_threads(group)


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    from quant.mixes import MIXES

    parser.add_argument("input", metavar="IN.gguf", help="a GGUF file; of a split model, any part")
    parser.add_argument("output", metavar="OUT.gguf", help="the file to write, in one part")
    parser.add_argument(
        "type", metavar="TYPE", type=str.upper, choices=tuple(MIXES), help=", ".join(MIXES)
    )
    parser.add_argument("--imatrix", metavar="FILE", help="weigh errors by an importance matrix")
    _add_tensor_types(parser)
    parser.add_argument(
        "--allow-requantize",
        action="store_true",
        default=False,
        help="even where tensors are quantized already, which loses more",
    )
    parser.add_argument("--force", action="store_true", default=False, help="replace OUT.gguf")
    parser.add_argument(
        "--dry-run", action="store_true", default=False, help="show types and sizes, write nothing"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: the cores this process may use)",
    )
    _add_json(parser)


def _add_tensor_types(parser: argparse.ArgumentParser) -> None:
    from quant.ggml_types import GGMLType

    types = ", ".join(t.name for t in GGMLType)
    group = parser.add_argument_group("types of single tensors", f"Of {types}.")
    group.add_argument(
        "--pure", action="store_true", help="the type itself for all, not llama.cpp's mix"
    )
    group.add_argument("--output-type", type=_qtype, metavar="TYPE", help="of the output matrix")
    group.add_argument(
        "--token-embedding-type", type=_qtype, metavar="TYPE", help="of the embeddings"
    )
    group.add_argument(
        "--tensor-type",
        dest="tensor_types",
        action="append",
        type=_typed_pattern,
        metavar="PATTERN=TYPE",
        help="of tensors in whose name a regular expression is found; may be repeated",
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from quant.mixes import MIXES

    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a directory with config.json or params.json, safetensors and a vocabulary",
    )
    parser.add_argument("output", metavar="OUT.gguf", help="the file to write")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        type=str.upper,
        choices=tuple(MIXES),
        default="F16",
        help=f"{', '.join(MIXES)} (default: %(default)s)",
    )
    _add_tensor_types(parser)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hold the written file against its source before it takes its place (default: yes)",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the errors by layer to a file")
    _add_force(parser, "OUT.gguf")
    parser.add_argument(
        "--dry-run", action="store_true", default=False, help="show types and sizes, write nothing"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: the cores this process may use)",
    )
    _add_json(parser)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    from quant.mixes import MIXES

    parser.add_argument("input", metavar="MODEL", help="a GGUF file; of a split model, any part")
    parser.add_argument(
        "lora",
        metavar="ADAPTER[:SCALE]",
        nargs="+",
        type=_lora,
        help="an adapter in a GGUF file, times SCALE (default: 1)",
    )
    parser.add_argument("output", metavar="OUT.gguf", help="the file to write, in one part")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        type=str.upper,
        choices=tuple(MIXES),
        help=f"{', '.join(MIXES)} (default: each tensor keeps its own)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: the cores this process may use)",
    )
    _add_force(parser, "OUT.gguf")
    _add_json(parser)


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.gguf", help="a GGUF file; of a split model, any part")
    parser.add_argument(
        "prefix", metavar="OUT-PREFIX", help="parts are called OUT-PREFIX-00001-of-00003.gguf"
    )
    limits = parser.add_mutually_exclusive_group(required=True)
    limits.add_argument(
        "--max-size",
        dest="max_bytes",
        type=_size,
        metavar="N[K|M|G]",
        help="bytes of a part at most, in units of a thousand, a million or a billion",
    )
    limits.add_argument("--max-tensors", type=int, metavar="N", help="tensors of a part at most")
    _add_force(parser, "parts that exist")
    _add_json(parser)


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="FIRST-PART", help="a part of a split model")
    parser.add_argument("output", metavar="OUT.gguf", help="the file to write")
    _add_force(parser, "OUT.gguf")
    _add_json(parser)


def _add_imatrix(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.perplexity import CONTEXT_LENGTH

    _add_model(parser, BUNDLED)
    parser.add_argument(
        "-f", "--file", metavar="FILE", required=True, help="the text; -: standard input"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="imatrix.gguf",
        help="the file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--ctx",
        "--context-length",
        dest="context_length",
        type=int,
        default=CONTEXT_LENGTH,
        metavar="N",
        help="tokens of a chunk (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks", type=int, metavar="N", help="read the first N chunks only (default: all)"
    )
    parser.add_argument(
        "--process-output",
        action="store_true",
        default=False,
        help="for the output matrix as well, which is better quantized without",
    )
    _add_force(parser, "FILE")
    _add_json(parser)
    group = parser.add_argument_group("the model in memory")
    _add_cache(group)
    _add_threads(group)


def _add_force(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--force", action="store_true", default=False, help=f"replace {what}")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", default=False, help="print one JSON document instead"
    )


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str, str]] = {
    "generate": (
        _add_generate,
        "continue a text",
        "The text comes from -p, -f or a pipe (less one line feed at its end) and is printed with "
        f"its continuation. With nothing of these the bundled model continues {FIRST_PROMPT!r}.",
    ),
    "chat": (
        _add_chat,
        "talk with a model",
        "Ctrl-C stops a reply, or leaves when typed instead of a message; Ctrl-D leaves. What is "
        "piped in is one message, answered once.",
    ),
    "inspect": (
        _add_inspect,
        "show what a model file holds and the memory it needs",
        "Works for models that cpuinfer cannot run, too, and says why it cannot.",
    ),
    "doctor": (_add_doctor, "show what this computer offers, and what to improve", ""),
    "warmup": (
        _add_warmup,
        "compile the kernels now, so that no later start has to wait",
        "Compiled kernels are kept in the user's cache directory.",
    ),
    "bench": (
        _add_bench,
        "measure how fast a model runs here, and what the machine would allow",
        "Takes some minutes with a large model. Keys and values at a depth are random numbers.",
    ),
    "perplexity": (
        _add_perplexity,
        "measure how well a model predicts a text",
        "As llama.cpp defines it: chunks that do not overlap, each with BOS first, and its second "
        "half scored. With --kl-divergence also how far from another model's its predictions are.",
    ),
    "quantize": (
        _add_quantize,
        "write a model in other types, smaller",
        "Types of tensors are llama.cpp's for the same name, and so are the bytes of each.",
    ),
    "convert": (
        _add_convert,
        "make a model file of published weights",
        "From Hugging Face's form or Mistral's own, in one pass to any type, tensor by tensor. "
        "Nothing of the source is run.",
    ),
    "merge": (
        _add_merge,
        "write a model with LoRA adapters folded into its weights",
        "Less is lost where MODEL is not quantized, or with --lora, which leaves MODEL as it is.",
    ),
    "split": (
        _add_split,
        "write a model file in several parts",
        "Any part opens the whole model; llama.cpp has to be given the first.",
    ),
    "join": (_add_join, "write the parts of a split model as one file", ""),
    "imatrix": (
        _add_imatrix,
        "measure which columns of the weights matter for a text",
        "The file is llama.cpp's importance matrix, for quantize --imatrix.",
    ),
}
