"""Convert a Llama or Mistral checkpoint in Hugging Face form to a GGUF file.

    python tools/convert.py SOURCE_DIR OUT.gguf --type Q8_0

SOURCE_DIR holds config.json, safetensors weights and tokenizer.model. The output is complete or
absent; an existing file is only replaced with --force.

Exit codes: 2 usage, 65 bad data, 66 no such input, 73 output exists or cannot be made, 74 I/O,
75 not enough memory, 130 and 143 signals.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from quant.checkpoint import Checkpoint
from quant.ggml_types import GGMLType
from quant.gguf_writer import Tensor, write_gguf
from quant.hf import FILE_TYPES, llama_gguf


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; the exit code."""
    args = _parser().parse_args(argv)
    try:
        if refusal := _refusal(args.source, args.output, args.force):
            return _fail(*refusal)
        metadata, tensors = llama_gguf(Checkpoint(args.source), GGMLType[args.type])
        _report_fallbacks(tensors, GGMLType[args.type])
        write_gguf(args.output, metadata, _announced(tensors))
    except ValueError as error:
        return _fail(65, str(error))
    except OSError as error:
        return _fail(74, f"{error.filename or args.output}: {error.strerror or error}")
    except MemoryError:
        return _fail(75, "not enough memory for the largest tensor of the checkpoint")
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    _clear_progress()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Convert a Llama or Mistral checkpoint in Hugging Face form to a GGUF file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="directory with config.json and *.safetensors")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument(
        "--type", default="F16", choices=[qtype.name for qtype in FILE_TYPES], help="of matrices"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    return parser


def _refusal(source: Path, output: Path, force: bool) -> tuple[int, str] | None:
    """Exit code and reason when the two paths cannot be used, before anything is read."""
    if not source.is_dir():
        return 66, f"{source}: no such directory"
    if output.exists():
        if any(output.samefile(file) for file in source.iterdir() if file.exists()):
            return 2, f"{output}: a file of the checkpoint itself"
        if not output.is_file():
            return 73, f"{output}: exists and is no regular file"
        if not force:
            return 73, f"{output}: exists (--force replaces it)"
    if not output.parent.is_dir():
        return 73, f"{output.parent}: no such directory"
    if not os.access(output.parent, os.W_OK):
        return 73, f"{output.parent}: not writable"
    return None


def _report_fallbacks(tensors: Sequence[Tensor], qtype: GGMLType) -> None:
    other = [t.name for t in tensors if len(t.shape) > 1 and t.qtype is not qtype]
    if other:
        reason = f"{qtype.name} wants rows that are multiples of {qtype.block_size}"
        print(f"stored as F16, because {reason}: {', '.join(other)}", file=sys.stderr)


def _announced(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors; on a terminal, each tells when its turn comes."""
    if not sys.stderr.isatty():
        return list(tensors)
    return [
        replace(tensor, data=partial(_announce, tensor, f"[{number}/{len(tensors)}]"))
        for number, tensor in enumerate(tensors, 1)
    ]


def _announce(tensor: Tensor, count: str) -> np.ndarray:
    shape = " x ".join(map(str, tensor.shape))
    line = f"{count} {tensor.name}  {shape}  {tensor.qtype.name}"
    print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
    return tensor.data()


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)


def _fail(code: int, reason: str) -> int:
    _clear_progress()
    print(f"convert: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # An exception unwinds the writer, which removes its temporary file.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
