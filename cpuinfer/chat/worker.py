"""A child process that renders a Jinja template within 2 s and 256 MiB (`sandbox.py`)."""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from cpuinfer.chat.template import ChatTemplateError, TemplateFault
from cpuinfer.gguf import escape

SECONDS = 2.0
START_SECONDS = 30.0  # to start Python and import Jinja
MAX_REPLY = 64 << 20  # bytes; 4 Mi characters are fewer


class Worker:
    """Renders one template; the process starts when it is needed and is used again and again.

    Several threads may use it at once, one waits for the other. The process ends with this object.
    """

    def __init__(self, template: str, origin: str) -> None:
        """`origin` says in errors where the template comes from."""
        self._template = template
        self._origin = origin
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Compiles the template, unless that has been done; ChatTemplateError if it is broken."""
        with self._lock:
            self._running()

    def render(self, variables: dict[str, Any]) -> str:
        """What the template writes; ChatTemplateError if it fails, takes too long or too much."""
        with self._lock:
            return self._ask(self._running(), variables)

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, its template compiled."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        try:
            process = _start()
        except OSError as error:
            raise ChatTemplateError(f"{self._origin}: cannot start Python: {error}") from None
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        try:
            if self._exchange(process, b"", START_SECONDS) != b"ready\n":
                raise ChatTemplateError(f"{self._origin}: cannot start Python with jinja2")
            self._ask(process, {"template": self._template})
        except BaseException:  # Ctrl-C too: it would pass for one that has its template
            self._stop()
            raise
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> str:
        reply = self._exchange(process, json.dumps(request).encode() + b"\n", SECONDS)
        answer = json.loads(reply) if reply.endswith(b"\n") else {}
        if "text" in answer:
            text: str = answer["text"]
            return text
        if "error" in answer:
            line = "" if answer["line"] is None else f", line {answer['line']}"
            raise TemplateFault(f"{self._origin}{line}: {escape(answer['error'])}")
        self._stop()
        raise ChatTemplateError(f"{self._origin}: the process that renders it has ended")

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
        """Sends a request and returns the line that answers it, "" if the process ends instead."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        try:
            timer.start()
            process.stdin.write(request)
            process.stdin.flush()
            reply = process.stdout.readline(MAX_REPLY)
        except BrokenPipeError:
            reply = b""
        except BaseException:  # the answer would be taken for the next one's
            self._stop()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            self._stop()
            raise ChatTemplateError(
                f"{self._origin}: it takes longer than {seconds:.0f} s and was stopped"
            )
        return reply

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: modules beside the script are not to be found instead of Python's own.
        [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is not for it
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):  # what was never read
        process.stdin.close()
    process.wait()
