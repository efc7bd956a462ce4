"""Messages and tools as people write them -> checked, plain, and the same for every template.

Text parts and the texts of merged messages are joined by an empty line, as mistral-common does.
An error is a ValueError that begins with the place, such as messages[2].content.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpuinfer.chat.template import Messages, Tools

ROLES = ("system", "user", "assistant", "tool")
# OpenAI's newer name for a system message.
_SAME_ROLE = {"developer": "system"}

_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_CALL_ID = re.compile("[a-zA-Z0-9]{9}")
_BASE_62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class ToolCall:
    """A call the model made. `arguments` is what their JSON means, or their text if it is none."""

    id: str | None
    name: str
    arguments: Any


@dataclass(frozen=True)
class Message:
    """A checked message; `place` is where it was, for errors."""

    place: str
    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def error(self, field: str, reason: str) -> ValueError:
        return ValueError(f"{self.place}.{field}: {reason}")


def check_messages(messages: Messages, roles: Sequence[str] = ROLES) -> list[Message]:
    """The messages, one by one: what each says is right, their order is not looked at."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: {_expected('a list', messages)}")
    if not messages:
        raise ValueError("messages: there is none")
    return [_check_message(message, f"messages[{i}]", roles) for i, message in enumerate(messages)]


def check_tools(tools: Tools | None) -> list[dict[str, Any]]:
    """The tools as plain JSON values; none for None. Each names a function, at least."""
    if tools is None:
        return []
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools: {_expected('a list', tools)}")
    return [_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def merged(messages: Sequence[Message]) -> list[Message]:
    """Consecutive messages of one role made one; tool results stay apart."""
    result: list[Message] = []
    for message in messages:
        if result and message.role == result[-1].role != "tool":
            result[-1] = replace(
                result[-1],
                content=join_texts([result[-1].content, message.content]),
                tool_calls=result[-1].tool_calls + message.tool_calls,
            )
        else:
            result.append(message)
    return result


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """What all system messages say together, and the other messages."""
    system = [message.content for message in messages if message.role == "system"]
    return join_texts(system), [message for message in messages if message.role != "system"]


def join_texts(texts: Sequence[str]) -> str:
    return _SEPARATOR.join(text for text in texts if text)


def short_id(call_id: str) -> str:
    """The id itself if it is 9 letters and digits, as Mistral's templates demand, or 9 that depend
    on nothing but the id."""
    if _CALL_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest())
    return "".join(_BASE_62[number // 62**place % 62] for place in range(9))


def parse_json(text: str) -> Any:
    """What the text means as JSON, or the text itself if it is none."""
    try:
        value = json.loads(text)
        json.dumps(value)  # what is nested so deeply that it cannot be written again stays text
    except (ValueError, RecursionError):
        return text
    return value


def _check_message(message: Any, place: str, roles: Sequence[str]) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place}: {_expected('a message (role, content)', message)}")
    role = message.get("role")
    if isinstance(role, str):
        role = _SAME_ROLE.get(role, role)
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"{place}.role: expected one of {', '.join(roles)}, found {role!r:.60}")
    if message.get("prefix"):
        raise ValueError(f"{place}.prefix: continuing a message is not supported")
    calls = message.get("tool_calls") or ()
    if calls and role != "assistant":
        raise ValueError(f"{place}.tool_calls: only a message of the assistant can have them")
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{place}.tool_calls: {_expected('a list', calls)}")
    return Message(
        place=place,
        role=role,
        content=_content(message.get("content"), f"{place}.content", optional=bool(calls)),
        tool_calls=tuple(
            _check_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)
        ),
        tool_call_id=_optional_text(message, "tool_call_id", place),
        name=_optional_text(message, "name", place),
    )


def _content(content: Any, place: str, optional: bool) -> str:
    if isinstance(content, list | tuple):
        return join_texts([_part(part, f"{place}[{i}]") for i, part in enumerate(content)])
    if content is None and optional:
        return ""
    return _text(content, place, "text or a list of text parts")


def _part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(f"{place}: {_expected('a part (type, text)', part)}")
    if part.get("type") != "text":
        raise ValueError(f"{place}.type: only 'text' is supported, found {part.get('type')!r:.60}")
    return _text(part.get("text"), f"{place}.text")


def _check_call(call: Any, place: str) -> ToolCall:
    function = _function(call, place)
    place += ".function"
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        arguments = parse_json(_text(arguments, f"{place}.arguments") or "{}")
    elif not isinstance(arguments, Mapping):
        raise ValueError(f"{place}.arguments: {_expected('JSON text or an object', arguments)}")
    return ToolCall(
        id=_optional_text(call, "id", place.removesuffix(".function")),
        name=function["name"],
        arguments=_plain(arguments, f"{place}.arguments"),
    )


def _check_tool(tool: Any, place: str) -> dict[str, Any]:
    function = _function(tool, place)
    description, parameters = function.get("description"), function.get("parameters")
    if not isinstance(description, str | None):
        raise ValueError(f"{place}.function.description: {_expected('text', description)}")
    if not isinstance(parameters, Mapping | None):
        raise ValueError(f"{place}.function.parameters: {_expected('an object', parameters)}")
    plain: dict[str, Any] = _plain({"type": "function", **tool}, place)
    return plain


def _function(value: Any, place: str) -> Mapping[str, Any]:
    """The `function` of a tool or of a call, with a name that is right."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: {_expected('an object (type, function)', value)}")
    if value.get("type", "function") != "function":
        raise ValueError(f"{place}.type: {_expected(repr('function'), value['type'])}")
    function = value.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{place}.function: {_expected('an object', function)}")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{place}.function.name: expected 1 to 64 letters, digits, _ and -, found {name!r:.60}"
        )
    return function


def _optional_text(message: Mapping[str, Any], field: str, place: str) -> str | None:
    value = message.get(field)
    return None if value is None else _text(value, f"{place}.{field}")


def _text(value: Any, place: str, expected: str = "text") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: {_expected(expected, value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: no text, character {error.start} is a surrogate") from None
    return value


def _plain(value: Any, place: str) -> Any:
    """A copy made of dict, list, str, int, float, bool and None only."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{place}: cannot be written as JSON: {error}") from None
    return json.loads(text)


def _expected(expected: str, found: Any) -> str:
    return f"expected {expected}, found {'none' if found is None else type(found).__name__}"
