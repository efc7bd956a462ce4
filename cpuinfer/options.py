"""The command line, read: the arguments of a command, and of them the parameters of what it calls.

Options that are not given stay out, so that every default lives in one place: in SamplingParams,
in LLM.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from cpuinfer import __version__
from cpuinfer.command_options import COMMANDS
from cpuinfer.gguf_errors import escape

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
    for name, (add_options, summary, description) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {description}",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        if name == chosen:
            add_options(command)
            argv = _with_numbers(argv, command)
    return parser.parse_args(argv)


def _with_numbers(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`argv` with negative numbers joined to the options that they are values of: where an option
    is called -1, as that of `chat`, argparse takes all of them for options."""
    joined: list[str] = []
    for word in argv:
        option = parser._option_string_actions.get(joined[-1]) if joined else None
        if re.fullmatch(r"-\.?\d.*", word) and option is not None and option.nargs is None:
            joined[-1] += f"={word}" if joined[-1].startswith("--") else word
        else:
            joined.append(word)
    return joined


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
        "for_chat",
        "lora",
        "speculation",
    )
    found = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    # The --force of other commands, which replaces a file, is no wish of the model's.
    return found | ({"force": True} if hasattr(arguments, "overcommit") else {})
