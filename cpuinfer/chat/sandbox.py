"""The program that renders one Jinja template of a stranger, for `worker.py`, which runs this file.

Lines of JSON come in on standard input and go out on standard output. The first names the template
({"template": text}), each one after it the variables to render it with; the answer is {"text": ...}
or {"error": a sentence, "line": of the template or null}. Jinja's sandbox keeps a template away
from Python's attributes and from files, the limits of this process keep it from taking all memory;
the time is kept by the process that started this one.

The environment is the one Hugging Face's transformers has (utils/chat_template_utils.py).
"""

import contextlib
import json
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 256 << 20
CPU_SECONDS = 3  # if the process that started this one is no more
MAX_OUTPUT = 4 << 20  # characters
MAX_MESSAGE = 300


class Generation(Extension):
    """{% generation %}, which marks the model's own words for training: here it marks nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    made.filters["tojson"] = to_json
    made.filters["safe"] = str  # Jinja's marks HTML, and then escapes the text it is joined with
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter writes < and ' as escapes, for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def limit_memory() -> None:
    """For this process from here on; a core dump of it is of no use to anyone."""
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    limit(resource.RLIMIT_CORE, 0)


def limit_time() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_SECONDS)


def limit(kind: int, amount: int) -> None:
    # Refused where a stricter limit holds, and by macOS for RLIMIT_AS.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (amount, resource.getrlimit(kind)[1]))


def text_of(template: Template, variables: dict[str, Any]) -> str:
    size = 0

    def pieces() -> Iterator[str]:
        nonlocal size
        for piece in template.generate(**variables):
            size += len(piece)
            if size > MAX_OUTPUT:
                raise TemplateError(f"it writes more than {MAX_OUTPUT} characters")
            yield piece

    return "".join(pieces())


def failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory", "line": None}
    message = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    if isinstance(error, TemplateSyntaxError):
        return {"error": message[:MAX_MESSAGE], "line": error.lineno}
    # Jinja gives the frames of a template the lines of its source.
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return {"error": message[:MAX_MESSAGE], "line": lines[-1] if lines else None}


def answer(work: Callable[[], str]) -> bool:
    """Writes the text, or what went wrong; whether it went well."""
    limit_time()
    try:
        reply = json.dumps({"text": work()})
    except Exception as error:
        reply = json.dumps(failure(error))
    sys.stdout.write(reply + "\n")
    sys.stdout.flush()
    return reply.startswith('{"text"')


def main() -> None:
    jinja = environment()
    limit_memory()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    compiled: list[Template] = []

    def compile_template() -> str:
        compiled.append(jinja.from_string(json.loads(sys.stdin.readline())["template"]))
        return ""

    def render(line: str) -> str:
        return text_of(compiled[0], json.loads(line))

    if answer(compile_template):
        for line in sys.stdin:
            answer(partial(render, line))


if __name__ == "__main__":
    main()
