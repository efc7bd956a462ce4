"""The commands: generated text and reports go to standard output, all else to standard error.

An error is one line on standard error that names the file and what is wrong, and an exit code:

    2         usage, a parameter out of range, a prompt longer than the context (ValueError)
    65        a model file or a checkpoint that is malformed or unsupported, or whose weights
              give no numbers (NumericsError); a prompt file that is not UTF-8
    66        an input file that is missing or cannot be opened (OSError with a file name)
    73        an output file that cannot be made
    74        reading or writing failed (other OSErrors)
    75        not enough memory now (MemoryError)
    130, 143  interrupted: Ctrl-C (SIGINT), SIGTERM
    141       nobody reads standard output any more (BrokenPipeError)

Anything else is a mistake in this program and ends in a traceback. Rooms that take long to import
are imported by the command that needs them.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from cpuinfer import chat_command, commands, console, file_commands, hub_commands, options
from cpuinfer.gguf_errors import ModelFormatError

_COMMANDS = {
    command.__name__: command
    for command in (
        commands.generate,
        chat_command.chat,
        commands.inspect,
        commands.doctor,
        commands.warmup,
        commands.bench,
        file_commands.quantize,
        commands.perplexity,
        file_commands.merge,
        file_commands.split,
        file_commands.join,
        file_commands.convert,
        file_commands.imatrix,
        hub_commands.pull,
        hub_commands.rm,
        hub_commands.show,
    )
}
_COMMANDS["list"] = hub_commands.list_models

# What may be wrong with an input file before a byte of it is read.
_NO_INPUT = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ENXIO,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    try:
        with _signals():
            _set_up_output()
            try:
                arguments = options.parse(sys.argv[1:] if argv is None else argv)
                _COMMANDS[arguments.command](arguments)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        if argv is None:  # the process ends here, and one more Ctrl-C is not to kill it meanwhile
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _abandon_output()
        return 141
    except Exception as error:
        explained = _explain(error)
        if explained is None:
            raise
        code, message = explained
        console.note(message)
        return code


def _explain(error: Exception) -> tuple[int, str] | None:
    """The exit code for an error, and what to say of it; None for a mistake in this program."""
    from cpuinfer.sampling import NumericsError
    from quant.settings import CheckpointError

    match error:
        case ModelFormatError() | CheckpointError() | NumericsError() | console.BadInput():
            return 65, str(error)
        case console.BadOutput():
            return 73, str(error)
        case MemoryError():
            return 75, str(error) or "not enough memory"
        case OSError():
            reason = error.strerror or str(error)
            if error.filename is None:
                _abandon_output()
                return 74, f"input or output failed: {reason}"
            name = os.fsdecode(error.filename)
            return (66 if error.errno in _NO_INPUT else 74), f"{name}: {reason}"
        case ValueError():
            return 2, str(error)
    return None


# Standard streams and signals


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends a command like Ctrl-C does, so that nothing is left behind."""

    def terminate(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _set_up_output() -> None:
    """Text is UTF-8 whatever the locale, and where a stream is closed its text goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _abandon_output() -> None:
    """What standard output still holds goes nowhere: Python would fail again writing it at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
