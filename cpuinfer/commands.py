"""What each command does: from its arguments to what it prints.

Generated text and reports go to standard output, all else to standard error. Errors are left to
cli.py. Rooms that take long to import are imported by the command that needs them.
"""

import itertools
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpuinfer import options
from cpuinfer.gguf_errors import escape
from cpuinfer.progress import Progress

if TYPE_CHECKING:
    from cpuinfer.completion import Completion
    from cpuinfer.llm import LLM

# The types of matrices in most of the model files that people share.
_COMMON_TYPES = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16")


class BadInput(Exception):
    """Input, other than a model file, that is not what it should be."""


class BadOutput(Exception):
    """A file that cannot be made."""


def generate(arguments: Namespace) -> None:
    """Continue a text."""
    params = options.sampling(arguments)
    if "logprobs" in params and not arguments.json:
        raise ValueError("--logprobs is of use with --json only")
    prompt = _prompt(arguments)
    progress = Progress(sys.stderr)
    llm = _load(arguments, progress)
    if sys.stderr.isatty() and not arguments.stats:
        note(_setup(llm))
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
        _print_json(document)
    if arguments.stats:
        for line in _stats(llm, completion):
            note(line)


def _stream(pieces: Iterable[str]) -> None:
    """Write pieces of text as they come, and end the line."""
    last = ""
    try:
        for piece in pieces:
            _write(piece)
            last = piece or last
    finally:
        if not last.endswith("\n"):
            _write("\n")


def chat(arguments: Namespace) -> None:
    """Talk with a model: line by line in a terminal, one message from a pipe."""
    from cpuinfer import terminal

    params = options.sampling(arguments)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    message = "" if interactive else _read_prompt(None)
    if not (interactive or message.strip()):
        raise ValueError("there is no message on standard input")
    system = None if arguments.system is None else _utf8(arguments.system, "--system")
    progress = Progress(sys.stderr)
    llm = _load(arguments, progress)
    conversation = terminal.Conversation(llm, system, params, progress)
    if interactive:
        note(f"{_setup(llm)}, template: {llm.template.name}")
        terminal.chat(conversation)
    else:
        conversation.say(message)


def inspect(arguments: Namespace) -> None:
    """Show what a model file holds."""
    from cpuinfer import describe
    from cpuinfer.gguf import open_gguf

    file = open_gguf(arguments.file)
    report = describe.describe(file, **options.loading(arguments))
    if arguments.json:
        _print_json(report)
    else:
        for line in describe.text(file, report, arguments.tensors):
            print(line)


def doctor(arguments: Namespace) -> None:
    """Show what this computer offers."""
    from cpuinfer import doctor

    report = doctor.examine()
    if arguments.json:
        _print_json(report)
    else:
        for line in doctor.text(report):
            print(line)


def warmup(arguments: Namespace) -> None:
    """Compile the kernels of a model, or the common ones."""
    from cpuinfer import llm, ops
    from cpuinfer.gguf import open_gguf
    from cpuinfer.kernels import jit
    from quant.ggml_types import GGMLType

    if arguments.model is None:
        qtypes = {GGMLType[name] for name in _COMMON_TYPES}
    else:
        qtypes = llm.matrix_types(open_gguf(arguments.model))
    kernels = ops.kernels_for(qtypes, arguments.kv_type)
    with Progress(sys.stderr) as progress:
        compiled = llm.prepare_kernels(kernels, progress)
    if arguments.json:
        cache = None if jit.CACHE is None else str(jit.CACHE)
        _print_json({"kernels": len(kernels), "compiled": compiled, "cache_directory": cache})
    else:
        place = "kept nowhere" if jit.CACHE is None else f"kept in {jit.CACHE}"
        print(f"{compiled} of {len(kernels)} kernels compiled, {place}")


def bench(arguments: Namespace) -> None:
    """Measure a model on this machine."""
    from cpuinfer import bench

    settings = bench.Settings(**options.measuring(arguments))
    draw = _plotter(Path(arguments.plot)) if hasattr(arguments, "plot") else None
    llm = _load(arguments, Progress(sys.stderr))
    say = note if sys.stderr.isatty() else lambda message: None
    report = bench.examine(llm, settings, options.loading(arguments), say)
    if arguments.json:
        _print_json(report)
    else:
        for line in bench.text(report):
            print(line)
    if draw is not None:
        draw(report)


def perplexity(arguments: Namespace) -> None:
    """Score a text with a model, and compare with another one's predictions."""
    from cpuinfer import perplexity

    text = _read_prompt(None if arguments.file == "-" else Path(arguments.file))
    chunks = getattr(arguments, "chunks", None)
    progress = Progress(sys.stderr)
    llm, base = _load(arguments, progress), None
    if hasattr(arguments, "kl_divergence"):
        against = {**vars(arguments), "model": arguments.kl_divergence}
        base = _load(Namespace(**against), progress)
    try:
        with progress:
            report = perplexity.examine(llm, text, chunks, base, perplexity.shown_on(progress))
    except perplexity.Unsuitable as error:
        raise BadInput(f"{arguments.file}: {error}") from None
    if arguments.json:
        _print_json({"text": arguments.file, **report})
    else:
        for line in perplexity.text(report):
            print(line)


def _plotter(path: Path) -> Callable[[Any], None]:
    """What draws a report to `path`; that it cannot be done is found before the measurements."""
    try:
        from cpuinfer import bench_plot
    except ImportError as error:
        raise ValueError(
            f"--plot needs matplotlib (pip install 'cpuinfer[plot]'): {error}"
        ) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadOutput(f"{path}: the file cannot be made")

    def draw(report: Any) -> None:
        try:
            bench_plot.draw(report, path)
        except OSError as error:
            raise BadOutput(f"{path}: {error.strerror or error}") from None

    return draw


# What commands share


def _load(arguments: Namespace, progress: Progress) -> "LLM":
    with progress:
        from cpuinfer.llm import LLM

        path = arguments.model or resources.files("cpuinfer") / "data/demo.gguf"
        llm = LLM(str(path), **options.loading(arguments), on_progress=progress)
    for warning in llm.warnings:
        note(f"warning: {warning}")
    return llm


def _prompt(arguments: Namespace) -> str:
    """The text to continue: from -p, -f, a pipe, or for the bundled model in a terminal its own."""
    if hasattr(arguments, "prompt"):
        return _utf8(arguments.prompt, "--prompt")
    if hasattr(arguments, "file"):
        return _read_prompt(None if arguments.file == "-" else Path(arguments.file))
    if sys.stdin is not None and not sys.stdin.isatty():
        return _read_prompt(None)
    if arguments.model is None:
        return options.FIRST_PROMPT
    raise ValueError("no prompt: give -p TEXT, -f FILE, or pipe a text in")


def _utf8(text: str, option: str) -> str:
    """An argument whose bytes are UTF-8, even where the locale says otherwise; or ValueError."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # Python keeps bytes it cannot decode as lone surrogates
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{option} is not UTF-8 text: {text}") from None


def _read_prompt(path: Path | None) -> str:
    """The text of a file or of standard input, less one line feed at the end."""
    if path is not None:
        data = path.read_bytes()
    else:
        data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        name = "standard input" if path is None else path
        raise BadInput(f"{name}: the prompt is not UTF-8 text (byte {error.start})") from None


def _setup(llm: "LLM") -> str:
    """The model, its context and its memory in one line."""
    from cpuinfer import machine
    from cpuinfer.plan import memory_plan

    window = llm.config.sliding_window
    seen = "no window" if window is None else f"a window of {window}"
    plan = memory_plan(llm.file, llm.config, llm.kv_type, llm.context_length)
    cache = machine.format_bytes(plan.cache)
    return f"{llm.path.name}: context {llm.context_length}, {seen}, cache {cache} ({llm.kv_type})"


def _stats(llm: "LLM", completion: "Completion") -> Iterator[str]:
    from cpuinfer import machine
    from cpuinfer.cost import bytes_per_token

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
    yield f"{_setup(llm)}; memory {memory}; {computing}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(document: Any) -> None:
    """One document of ASCII characters only: nothing in it can be mistaken by a terminal."""
    from cpuinfer.describe import plain

    print(json.dumps(plain(document), allow_nan=False))


def note(message: str) -> None:
    """One line on standard error."""
    print(f"cpuinfer: {escape(message)}", file=sys.stderr)
