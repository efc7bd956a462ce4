"""The options of the commands for models by name."""

import argparse

from cpuinfer.option_groups import add_json

_NAME = "OWNER/REPO[:TYPE], a link to huggingface.co, or a short name such as mistral:v0.2"


def add_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"{_NAME}; TYPE is such as Q4_K_M")
    parser.add_argument(
        "--force",
        action="store_true",
        default=False,
        help="even a model larger than the memory, or of a type that does not run here",
    )
    add_json(parser)


def add_list(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def add_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a name as `cpuinfer list` shows it")
    add_json(parser)


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|FILE", help="a model that was pulled, or a GGUF file")
    add_json(parser)
