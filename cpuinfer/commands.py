"""What each command does: from its arguments to what it prints.

Generated text and reports go to standard output, all else to standard error. Errors are left to
cli.py. Rooms that take long to import are imported by the command that needs them.
"""

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cpuinfer import command_options, options
from cpuinfer.console import (
    BadInput,
    BadOutput,
    load,
    note,
    open_model,
    plotter,
    prefix_store,
    print_json,
    read_prompt,
    utf8,
    write,
)
from cpuinfer.progress import Progress

if TYPE_CHECKING:
    from cpuinfer.completion import Completion
    from cpuinfer.llm import LLM


# The types of matrices in most of the model files that people share.
_COMMON_TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16")


def generate(arguments: Namespace) -> None:
    """Continue a text."""
    from cpuinfer.terminal import report

    params = options.sampling(arguments)
    if "logprobs" in params and not arguments.json:
        raise ValueError("--logprobs is of use with --json only")
    prompt = _prompt(arguments)
    progress = Progress(sys.stderr)
    llm = load(arguments, progress, prefix_store(note) if arguments.save else None)
    if sys.stderr.isatty() and not arguments.stats:
        note(report.setup(llm))
    with closing(llm.stream(prompt, **params)) as stream:
        with progress:
            first = next(stream)
        pieces = (chunk.text for chunk in itertools.chain([first], stream))
        if arguments.json:
            for _ in pieces:
                pass
        else:
            _stream(itertools.chain([prompt], pieces))
    completion = stream.completion
    assert completion is not None
    if arguments.json:
        document = {**asdict(completion), "model": str(llm.path)}
        if completion.logprobs is None:
            del document["logprobs"]
        print_json(document)
    if arguments.stats:
        for line in _stats(llm, completion):
            note(line)
    try:
        llm.remember()
    except OSError as error:
        raise BadOutput(f"keys and values are not saved: {error.strerror or error}") from None


def _stream(pieces: Iterable[str]) -> None:
    """Write pieces of text as they come, and end the line."""
    last = ""
    try:
        for piece in pieces:
            write(piece)
            last = piece or last
    finally:
        if not last.endswith("\n"):
            write("\n")


def inspect(arguments: Namespace) -> None:
    """Show what a model file holds."""
    from cpuinfer import describe

    file = open_model(arguments.file)
    report = describe.describe(file, **options.loading(arguments))
    if arguments.json:
        print_json(report)
    else:
        for line in describe.text(file, report, arguments.tensors):
            print(line)


def doctor(arguments: Namespace) -> None:
    """Show what this computer offers, and what it means for a model."""
    from cpuinfer import describe, doctor

    file = None if arguments.model is None else open_model(arguments.model)
    report = {**doctor.examine(), "model": None}
    if file is not None:
        report["model"] = describe.fit(file, **options.loading(arguments))
    if arguments.json:
        print_json(report)
    else:
        facts = () if file is None else describe.fit_facts(report["model"])
        for line in doctor.text(report, facts):
            print(line)


def warmup(arguments: Namespace) -> None:
    """Compile the kernels of a model, or the common ones."""
    from cpuinfer import loading, ops
    from cpuinfer.kernels import jit
    from quant.ggml_types import GGMLType

    if arguments.model is None:
        qtypes = {GGMLType[name] for name in _COMMON_TYPES}
    else:
        qtypes = loading.matrix_types(open_model(arguments.model))
    kernels = ops.kernels_for(qtypes, arguments.kv_type)
    with Progress(sys.stderr) as progress:
        compiled = loading.prepare_kernels(kernels, progress)
    if arguments.json:
        cache = None if jit.CACHE is None else str(jit.CACHE)
        print_json({"kernels": len(kernels), "compiled": compiled, "cache_directory": cache})
    else:
        place = "kept nowhere" if jit.CACHE is None else f"kept in {jit.CACHE}"
        print(f"{compiled} of {len(kernels)} kernels compiled, {place}")


def bench(arguments: Namespace) -> None:
    """Measure a model on this machine."""
    from cpuinfer import bench

    settings = bench.Settings(**options.measuring(arguments))
    draw = plotter(arguments.plot, "bench_plot") if hasattr(arguments, "plot") else None
    llm = load(arguments, Progress(sys.stderr))
    say = note if sys.stderr.isatty() else lambda message: None
    report = bench.examine(llm, settings, options.loading(arguments), say)
    if arguments.json:
        print_json(report)
    else:
        for line in bench.text(report):
            print(line)
    if draw is not None:
        draw(report)


def perplexity(arguments: Namespace) -> None:
    """Score a text with a model, and compare with another one's predictions."""
    from cpuinfer import perplexity

    text = read_prompt(None if arguments.file == "-" else Path(arguments.file))
    chunks = getattr(arguments, "chunks", None)
    progress = Progress(sys.stderr)
    llm, base = load(arguments, progress), None
    if hasattr(arguments, "kl_divergence"):
        against = {**vars(arguments), "model": arguments.kl_divergence}
        base = load(Namespace(**against), progress)
    try:
        with progress:
            report = perplexity.examine(llm, text, chunks, base, perplexity.shown_on(progress))
    except perplexity.Unsuitable as error:
        raise BadInput(f"{arguments.file}: {error}") from None
    if arguments.json:
        print_json({"text": arguments.file, **report})
    else:
        for line in perplexity.text(report):
            print(line)


def _prompt(arguments: Namespace) -> str:
    """The text to continue: from -p, -f, a pipe, or for the bundled model in a terminal its own."""
    if hasattr(arguments, "prompt"):
        return utf8(arguments.prompt, "--prompt")
    if hasattr(arguments, "file"):
        return read_prompt(None if arguments.file == "-" else Path(arguments.file))
    if sys.stdin is not None and not sys.stdin.isatty():
        return read_prompt(None)
    if arguments.model is None:
        return command_options.FIRST_PROMPT
    raise ValueError("no prompt: give -p TEXT, -f FILE, or pipe a text in")


def _stats(llm: "LLM", completion: "Completion") -> Iterator[str]:
    from cpuinfer import machine
    from cpuinfer.cost import bytes_per_token
    from cpuinfer.terminal import report

    seconds = completion.timings
    tokens = completion.completion_tokens - 1  # the first one comes out of the prompt
    rate = tokens / seconds.generation_seconds if tokens > 0 else 0.0
    prompt_rate = (completion.prompt_tokens - completion.cached_tokens) / seconds.prompt_seconds
    passes = tokens - completion.accepted_tokens  # each reads the weights once
    read = rate * passes / max(1, tokens) * bytes_per_token(llm.file) / 1e9
    yield (
        f"prompt {completion.prompt_tokens} tokens ({completion.cached_tokens} cached), "
        f"{prompt_rate:.1f} tok/s; generation {completion.completion_tokens} tokens "
        f"({completion.accepted_tokens} of {completion.drafted_tokens} drafted right), "
        f"{rate:.1f} tok/s, {read:.2f} GB/s"
    )
    memory = machine.format_bytes(machine.resident_memory())
    computing = f"{machine.instruction_set()}, {llm.threads} threads"
    yield f"{report.setup(llm)}; memory {memory}; {computing}"
