"""The options of each command, and what --help says of it.

Rooms that take long to import are imported for the command that is asked for, never for
`cpuinfer --help`.
"""

import argparse
from collections.abc import Callable
from typing import Any

from cpuinfer import file_options
from cpuinfer.hub_options import add_list, add_pull, add_rm, add_show
from cpuinfer.option_groups import (
    ALL_ROOM,
    BUNDLED,
    add_cache,
    add_context,
    add_json,
    add_kv_type,
    add_loading,
    add_lora,
    add_model,
    add_overcommit,
    add_sampling,
    add_speculation,
    add_stats,
    add_text_in_chunks,
    add_threads,
)

FIRST_PROMPT = "Once upon a time"


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_model(parser, BUNDLED)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument(
        "-f", "--file", metavar="FILE", help="a file with the text to continue; -: standard input"
    )
    add_sampling(parser)
    group = add_loading(parser)
    add_lora(group)
    add_speculation(group)
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
    output.add_argument(
        "--save",
        action="store_true",
        default=False,
        help="keep the keys and values of the text on disk, and take those of texts that begin "
        "alike, as chat does",
    )
    add_stats(output)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_model(parser, BUNDLED)
    parser.add_argument(
        "--system", metavar="TEXT", default=None, help="instructions ahead of the conversation"
    )
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="a built-in chat template or a Jinja file (default: the model file's own)",
    )
    _add_conversation(parser.add_argument_group("the conversation"))
    add_sampling(parser, ALL_ROOM)
    group = add_loading(parser)
    add_lora(group)
    add_speculation(group)


def _add_conversation(group: argparse._ActionsContainer) -> None:
    from cpuinfer.conversation import ON_FULL

    group.add_argument(
        "-1",
        "--once",
        action="store_true",
        default=False,
        help="answer one message, piped in or typed, and leave; nothing but the reply is shown",
    )
    group.add_argument(
        "--plain", action="store_true", default=False, help="show replies as they are written"
    )
    group.add_argument(
        "--resume",
        metavar="NAME",
        nargs="?",
        help="go on with a saved conversation (default: the newest), and with its model if no "
        "other one is named before",
    )
    group.add_argument(
        "--no-save",
        action="store_true",
        default=False,
        help="keep neither the conversation nor what is typed",
    )
    group.add_argument(
        "--on-full",
        choices=ON_FULL,
        help="when the context is full: stop, or let the model read the newest messages alone, or "
        "a summary of the others before them (default: stop)",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="MODEL", help="a GGUF file (of a split model, any part) or a model by name"
    )
    parser.add_argument(
        "--tensors", action="store_true", default=False, help="list every tensor as well"
    )
    add_json(parser)
    add_context(parser.add_argument_group("what the memory needed is reckoned for"))


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "this computer alone")
    add_json(parser)
    add_context(parser.add_argument_group("what the memory needed is reckoned for"))


def _add_warmup(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "the kernels of the most common types")
    add_kv_type(parser)
    add_json(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.bench import Settings

    add_model(parser, BUNDLED)

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
    add_json(parser)
    add_loading(parser)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.perplexity import CONTEXT_LENGTH

    add_model(parser, BUNDLED)
    add_text_in_chunks(
        parser, CONTEXT_LENGTH, "tokens of a chunk, of which the second half is scored"
    )
    parser.add_argument(
        "--kl-divergence",
        metavar="AGAINST.gguf",
        help="a model to compare with, loaded beside the first one with the same options",
    )
    add_json(parser)
    group = parser.add_argument_group("the model in memory")
    add_cache(group)
    add_lora(group)
    add_threads(group)
    add_overcommit(group)


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str, str]] = {
    "generate": (
        _add_generate,
        "continue a text",
        "The text comes from -p, -f or a pipe (less one line feed at its end) and is printed with "
        f"its continuation. With nothing of these the bundled model continues {FIRST_PROMPT!r}.",
    ),
    "chat": (
        _add_chat,
        "talk with a model",
        "Ctrl-C stops a reply, or leaves when typed instead of a message; Ctrl-D leaves, /help "
        "lists the commands. What is piped in is one message, answered once. Conversations are "
        "saved.",
    ),
    "inspect": (
        _add_inspect,
        "show what a model file holds and the memory it needs",
        "Works for models that cpuinfer cannot run, too, and says why it cannot.",
    ),
    "doctor": (
        _add_doctor,
        "show what this computer offers, and what to improve",
        "With MODEL also whether it fits into the memory, how fast it will be, and what to choose "
        "where it does not fit.",
    ),
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
        file_options.add_quantize,
        "write a model in other types, smaller",
        "Types of tensors are llama.cpp's for the same name, and so are the bytes of each.",
    ),
    "convert": (
        file_options.add_convert,
        "make a model file of published weights",
        "From Hugging Face's form or Mistral's own, in one pass to any type, tensor by tensor. "
        "Nothing of the source is run.",
    ),
    "merge": (
        file_options.add_merge,
        "write a model with LoRA adapters folded into its weights",
        "Less is lost where MODEL is not quantized, or with --lora, which leaves MODEL as it is.",
    ),
    "split": (
        file_options.add_split,
        "write a model file in several parts",
        "Any part opens the whole model; llama.cpp has to be given the first.",
    ),
    "join": (file_options.add_join, "write the parts of a split model as one file", ""),
    "imatrix": (
        file_options.add_imatrix,
        "measure which columns of the weights matter for a text",
        "The file is llama.cpp's importance matrix, for quantize --imatrix.",
    ),
    "pull": (
        add_pull,
        "fetch a model by its name",
        "From the Hugging Face hub. What was interrupted goes on where it ended, and a file is "
        "there when its SHA-256 is right. Without TYPE: Q4_K_M, or Q4_0, or the first there is.",
    ),
    "list": (add_list, "show the models that were pulled", ""),
    "rm": (add_rm, "remove a model that was pulled", ""),
    "show": (
        add_show,
        "show what a model is, in short",
        "`cpuinfer inspect` shows all that its file holds.",
    ),
}
