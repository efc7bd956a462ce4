"""The commands that write model files: from their arguments to what they print.

Reports go to standard output, all else to standard error; errors are left to cli.py. Rooms that
take long to import are imported by the command that needs them.
"""

import itertools
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpuinfer import options
from cpuinfer.console import (
    BadInput,
    BadOutput,
    load,
    note,
    open_model,
    plotter,
    print_json,
    read_prompt,
)
from cpuinfer.gguf_errors import escape
from cpuinfer.progress import Progress


def quantize(arguments: Namespace) -> None:
    """Write a model in other types."""
    from cpuinfer import quantize_report, requantize
    from cpuinfer.importance import read_importance
    from quant.mixes import Wishes

    threads = _threads(arguments)
    output = Path(arguments.output)
    file = open_model(arguments.input)
    if not arguments.dry_run:
        _check_output(output, file.paths, arguments.force)
    importance = read_importance(arguments.imatrix) if hasattr(arguments, "imatrix") else None
    wishes = Wishes(**options.wishes(arguments))
    plan = requantize.plan(file, arguments.type, wishes, importance, arguments.allow_requantize)
    report = quantize_report.report(plan, arguments.type)
    for warning in quantize_report.warnings(plan, importance):
        note(f"warning: {warning}")
    if not arguments.dry_run:
        start = time.monotonic()
        with _writing(output) as progress:
            requantize.run(plan, output, threads, progress)
        report |= {"output": str(output), "seconds": time.monotonic() - start}
    if arguments.json:
        print_json(report)
    else:
        for line in quantize_report.text(report):
            print(line)


def convert(arguments: Namespace) -> None:
    """Make a model file of published weights."""
    from cpuinfer import convert, quantize_report, verify
    from quant.mixes import Wishes

    threads = _threads(arguments)
    if hasattr(arguments, "plot") and not arguments.verify:
        raise ValueError("--plot draws what --verify finds")
    source, output = Path(arguments.source), Path(arguments.output)
    inputs = [path for path in source.iterdir() if path.exists()]
    if not arguments.dry_run:
        _check_output(output, inputs, arguments.force)
    draw = plotter(arguments.plot, "verify_plot") if hasattr(arguments, "plot") else None
    plan = convert.plan(source, arguments.type, Wishes(**options.wishes(arguments)))
    report = convert.report(plan, arguments.type)
    for warning in convert.warnings(plan):
        note(f"warning: {warning}")
    proof: dict[str, Any] = {}
    if not arguments.dry_run:
        start = time.monotonic()
        with _writing(output) as progress:

            def prove(path: Path) -> None:
                proof.update(verify.examine(plan, path, threads, progress))
                verify.check(proof)

            check = prove if arguments.verify else lambda path: None
            try:
                convert.run(plan, output, threads, progress, check)
            except verify.Unproven as error:
                raise BadInput(f"{source}: {error}") from None
        report |= {"output": str(output), "seconds": time.monotonic() - start}
        report |= {"verification": proof} if proof else {}
    if arguments.json:
        print_json(report)
    else:
        lines = verify.text(proof) if proof else ()
        for line in itertools.chain(lines, quantize_report.text(report)):
            print(line)
    if draw is not None and proof:
        draw(report)


def merge(arguments: Namespace) -> None:
    """Write a model with adapters folded into its weights."""
    from cpuinfer import lora, requantize
    from cpuinfer.merge import plan_merge

    threads = _threads(arguments)
    output, file = Path(arguments.output), open_model(arguments.input)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    architecture = file.text("general.architecture")
    adapters = [
        lora.open_adapter(path, scale, architecture, shapes) for path, scale in arguments.lora
    ]
    sources = {*file.paths, *(path for adapter in adapters for path in adapter.file.paths)}
    _check_output(output, sources, arguments.force)
    plan = plan_merge(file, adapters, getattr(arguments, "type", None))
    changed = [conversion for conversion in plan.conversions if conversion.added is not None]
    again = sum(conversion.tensor.qtype.block_size > 1 for conversion in changed)
    if again:
        note(f"warning: {again} tensors of {file.path} are quantized already; merging loses more")
    start = time.monotonic()
    with _writing(output) as progress:
        requantize.run(plan, output, threads, progress)
    report = {
        "input": str(file.path),
        "adapters": [
            {"file": str(adapter.file.path), "scale": adapter.scale, "tensors": len(adapter.names)}
            for adapter in adapters
        ],
        "output": str(output),
        "tensors": len(plan.conversions),
        "changed": len(changed),
        "bytes": plan.nbytes,
        "seconds": time.monotonic() - start,
    }
    if arguments.json:
        print_json(report)
    else:
        print(f"{escape(str(output))}: {len(changed)} of {report['tensors']} tensors changed")


def split(arguments: Namespace) -> None:
    """Write a model file in several parts."""
    from cpuinfer import shards

    file = open_model(arguments.input)
    parts = shards.divide(file, **options.dividing(arguments))
    paths = shards.part_paths(Path(arguments.prefix), len(parts))
    for path in paths:
        _check_output(path, file.paths, arguments.force)
    with _writing(paths[0]) as progress:
        shards.split(file, parts, paths, progress)
    written = [
        {"file": str(path), "tensors": len(part), "bytes": path.stat().st_size}
        for path, part in zip(paths, parts, strict=True)
    ]
    if arguments.json:
        print_json({"input": str(file.path), "parts": written})
    else:
        for part in written:
            print(f"{escape(str(part['file']))}: {part['tensors']} tensors, {part['bytes']} bytes")


def join(arguments: Namespace) -> None:
    """Write the parts of a split model as one file."""
    from cpuinfer import shards

    output, file = Path(arguments.output), open_model(arguments.input)
    _check_output(output, file.paths, arguments.force)
    with _writing(output) as progress:
        shards.join(file, output, progress)
    report = {
        "input": str(file.path),
        "output": str(output),
        "parts": file.uint("split.count"),
        "tensors": len(file.tensors),
        "bytes": output.stat().st_size,
    }
    if arguments.json:
        print_json(report)
    else:
        print(f"{escape(str(output))}: {report['tensors']} tensors, {report['bytes']} bytes")


def imatrix(arguments: Namespace) -> None:
    """Measure which columns of the weights matter for a text."""
    from cpuinfer import imatrix, perplexity

    text = read_prompt(None if arguments.file == "-" else Path(arguments.file))
    n_chunks = getattr(arguments, "chunks", None)
    if n_chunks is not None and n_chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {n_chunks}")
    output = Path(arguments.output)
    llm = load(arguments, Progress(sys.stderr))
    _check_output(output, llm.file.paths, arguments.force)
    try:
        chunks = imatrix.text_chunks(llm, text)[:n_chunks]
    except perplexity.Unsuitable as error:
        raise BadInput(f"{arguments.file}: {error}") from None
    with _writing(output) as progress:
        sums = imatrix.collect(llm, chunks, arguments.process_output, progress)
        imatrix.write(sums, output, arguments.file, *chunks.shape)
    report = {
        "model": str(llm.path),
        "text": arguments.file,
        "output": str(output),
        "context_length": chunks.shape[1],
        "chunks": len(chunks),
        "tensors": len(sums.tokens),
    }
    if arguments.json:
        print_json(report)
    else:
        print(f"{escape(str(output))}: {report['tensors']} tensors, {chunks.size} tokens")


def _threads(arguments: Namespace) -> int:
    """Those asked for, or as many as there are cores."""
    from cpuinfer import machine

    threads: int = getattr(arguments, "threads", machine.threads()[0])
    if threads < 1:
        raise ValueError(f"--threads {threads}: at least 1 is needed")
    return threads


@contextmanager
def _writing(output: Path) -> Iterator[Progress]:
    """What shows how far the writing of a file is; BadOutput where that is not allowed."""
    try:
        with Progress(sys.stderr) as progress:
            yield progress
    except PermissionError as error:
        raise BadOutput(f"{output}: {error.strerror}") from None


def _check_output(path: Path, inputs: Iterable[Path], force: bool) -> None:
    """That a file can be made at `path`, and that nothing is lost by it."""
    if path.exists() and any(path.samefile(source) for source in inputs):
        raise ValueError(f"{path}: input and output are the same file")
    if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise BadOutput(f"{path}: the file cannot be made")
    if path.exists() and not force:
        raise BadOutput(f"{path}: it exists (--force replaces it)")
