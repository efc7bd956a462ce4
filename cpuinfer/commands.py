"""What each command does: from its arguments to what it prints.

Generated text and reports go to standard output, all else to standard error. Errors are left to
cli.py. Rooms that take long to import are imported by the command that needs them.
"""

import importlib
import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
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
    draw = _plotter(arguments.plot, "bench_plot") if hasattr(arguments, "plot") else None
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


def _plotter(name: str, room: str) -> Callable[[Any], None]:
    """What draws a report to the file `name`; that it cannot be done is found before the work."""
    path = Path(name)
    try:
        drawing = importlib.import_module(f"cpuinfer.{room}")
    except ImportError as error:
        raise ValueError(
            f"--plot needs matplotlib (pip install 'cpuinfer[plot]'): {error}"
        ) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadOutput(f"{path}: the file cannot be made")

    def draw(report: Any) -> None:
        try:
            drawing.draw(report, path)
        except OSError as error:
            raise BadOutput(f"{path}: {error.strerror or error}") from None

    return draw


def quantize(arguments: Namespace) -> None:
    """Write a model in other types."""
    from cpuinfer import quantize_report, requantize
    from cpuinfer.gguf import open_gguf
    from cpuinfer.importance import read_importance
    from quant.mixes import Wishes

    threads = _threads(arguments)
    output = Path(arguments.output)
    file = open_gguf(arguments.input)
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
        _print_json(report)
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
    draw = _plotter(arguments.plot, "verify_plot") if hasattr(arguments, "plot") else None
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
        _print_json(report)
    else:
        lines = verify.text(proof) if proof else ()
        for line in itertools.chain(lines, quantize_report.text(report)):
            print(line)
    if draw is not None and proof:
        draw(report)


def merge(arguments: Namespace) -> None:
    """Write a model with adapters folded into its weights."""
    from cpuinfer import lora, requantize
    from cpuinfer.gguf import open_gguf
    from cpuinfer.merge import plan_merge

    threads = _threads(arguments)
    output, file = Path(arguments.output), open_gguf(arguments.input)
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
        _print_json(report)
    else:
        print(f"{escape(str(output))}: {len(changed)} of {report['tensors']} tensors changed")


def split(arguments: Namespace) -> None:
    """Write a model file in several parts."""
    from cpuinfer import shards
    from cpuinfer.gguf import open_gguf

    file = open_gguf(arguments.input)
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
        _print_json({"input": str(file.path), "parts": written})
    else:
        for part in written:
            print(f"{escape(str(part['file']))}: {part['tensors']} tensors, {part['bytes']} bytes")


def join(arguments: Namespace) -> None:
    """Write the parts of a split model as one file."""
    from cpuinfer import shards
    from cpuinfer.gguf import open_gguf

    output, file = Path(arguments.output), open_gguf(arguments.input)
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
        _print_json(report)
    else:
        print(f"{escape(str(output))}: {report['tensors']} tensors, {report['bytes']} bytes")


def imatrix(arguments: Namespace) -> None:
    """Measure which columns of the weights matter for a text."""
    from cpuinfer import imatrix, perplexity

    text = _read_prompt(None if arguments.file == "-" else Path(arguments.file))
    n_chunks = getattr(arguments, "chunks", None)
    if n_chunks is not None and n_chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {n_chunks}")
    output = Path(arguments.output)
    llm = _load(arguments, Progress(sys.stderr))
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
        _print_json(report)
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
