"""The options of the commands that make files."""

import argparse

from cpuinfer.option_groups import (
    BUNDLED,
    add_cache,
    add_force,
    add_json,
    add_model,
    add_text_in_chunks,
    add_threads,
    lora,
    qtype,
    size,
    typed_pattern,
)


def add_quantize(parser: argparse.ArgumentParser) -> None:
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
    add_json(parser)


def _add_tensor_types(parser: argparse.ArgumentParser) -> None:
    from quant.ggml_types import GGMLType

    types = ", ".join(t.name for t in GGMLType)
    group = parser.add_argument_group("types of single tensors", f"Of {types}.")
    group.add_argument(
        "--pure", action="store_true", help="the type itself for all, not llama.cpp's mix"
    )
    group.add_argument("--output-type", type=qtype, metavar="TYPE", help="of the output matrix")
    group.add_argument(
        "--token-embedding-type", type=qtype, metavar="TYPE", help="of the embeddings"
    )
    group.add_argument(
        "--tensor-type",
        dest="tensor_types",
        action="append",
        type=typed_pattern,
        metavar="PATTERN=TYPE",
        help="of tensors in whose name a regular expression is found; may be repeated",
    )


def add_convert(parser: argparse.ArgumentParser) -> None:
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
    add_force(parser, "OUT.gguf")
    parser.add_argument(
        "--dry-run", action="store_true", default=False, help="show types and sizes, write nothing"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: the cores this process may use)",
    )
    add_json(parser)


def add_merge(parser: argparse.ArgumentParser) -> None:
    from quant.mixes import MIXES

    parser.add_argument("input", metavar="MODEL", help="a GGUF file; of a split model, any part")
    parser.add_argument(
        "lora",
        metavar="ADAPTER[:SCALE]",
        nargs="+",
        type=lora,
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
    add_force(parser, "OUT.gguf")
    add_json(parser)


def add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.gguf", help="a GGUF file; of a split model, any part")
    parser.add_argument(
        "prefix", metavar="OUT-PREFIX", help="parts are called OUT-PREFIX-00001-of-00003.gguf"
    )
    limits = parser.add_mutually_exclusive_group(required=True)
    limits.add_argument(
        "--max-size",
        dest="max_bytes",
        type=size,
        metavar="N[K|M|G]",
        help="bytes of a part at most, in units of a thousand, a million or a billion",
    )
    limits.add_argument("--max-tensors", type=int, metavar="N", help="tensors of a part at most")
    add_force(parser, "parts that exist")
    add_json(parser)


def add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="FIRST-PART", help="a part of a split model")
    parser.add_argument("output", metavar="OUT.gguf", help="the file to write")
    add_force(parser, "OUT.gguf")
    add_json(parser)


def add_imatrix(parser: argparse.ArgumentParser) -> None:
    from cpuinfer.perplexity import CONTEXT_LENGTH

    add_model(parser, BUNDLED)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="imatrix.gguf",
        help="the file to write (default: %(default)s)",
    )
    add_text_in_chunks(parser, CONTEXT_LENGTH, "tokens of a chunk")
    parser.add_argument(
        "--process-output",
        action="store_true",
        default=False,
        help="for the output matrix as well, which is better quantized without",
    )
    add_force(parser, "FILE")
    add_json(parser)
    group = parser.add_argument_group("the model in memory")
    add_cache(group)
    add_threads(group)
