"""Templates in Jinja, as model files carry them: a stranger's code, rendered in a child process.

Control tokens come from the template alone. Before rendering, where something a person wrote
spells a control token, or begins or ends with a part that the template could complete to one, those
characters are replaced by stand-ins that are in no text (lone surrogates); after rendering, the
output is split at control tokens and the stand-ins become characters again. All other text reaches
the template as it is, so that templates may trim, split and compare it.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from cpuinfer.chat.messages import (
    ROLES,
    Message,
    check_messages,
    check_tools,
    merged,
    short_id,
    split_system,
)
from cpuinfer.chat.template import (
    ChatTemplateError,
    Messages,
    Segment,
    Template,
    TemplateFault,
    Tools,
    joined,
)
from cpuinfer.chat.worker import Worker
from cpuinfer.tokenizer import Tokenizer

# Granite's names for calls and results.
JINJA_ROLES = (*ROLES, "assistant_tool_call", "tool_response")

# JSON joins a high and a low surrogate to one character: only low ones.
_STAND_INS = range(0xDC00, 0xE000)
_MAX_EDGE = 64  # characters, more than control tokens have


class JinjaTemplate(Template):
    """A template in Jinja.

    What it refuses is tried once more in a plainer form: one system message in front, messages of
    one role that follow each other merged, ids of calls with 9 letters and digits. A template that
    leaves the system message out gets it in front of the first user message, as in llama.cpp.
    """

    def __init__(self, text: str, origin: str, tokenizer: Tokenizer) -> None:
        """`origin` names the template in errors; ChatTemplateError if it is broken."""
        self.name = origin
        self._tokens = {
            name: "" if token is None else tokenizer.token_text(token)
            for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }
        self._guard = ControlGuard(control_texts(tokenizer))
        self._worker = Worker(text, origin)
        self._worker.start()

    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        checked = check_messages(messages, JINJA_ROLES)
        available = check_tools(tools)
        if any(message.role == "system" for message in checked) and not self._shows_system:
            checked = _folded(checked)
        try:
            text = self._text(checked, available)
        except TemplateFault:
            plainer = _plainer(checked)
            if plainer == checked:
                raise
            text = self._text(plainer, available)
        return self._guard.split(text)

    def _text(self, messages: Sequence[Message], tools: list[dict[str, Any]]) -> str:
        return self._worker.render(
            {
                "messages": self._guard.hide([_as_dict(message) for message in messages]),
                "tools": self._guard.hide(tools) or None,
                "add_generation_prompt": True,
                **self._tokens,
            }
        )

    @cached_property
    def _shows_system(self) -> bool:
        probe = [Message("", "system", "4df1c0e9"), Message("", "user", "7b3a52d6")]
        try:
            return probe[0].content in self._text(probe, [])
        except TemplateFault:
            return False


class ControlGuard:
    """Keeps control tokens that a person's text spells apart from those of a template."""

    def __init__(self, texts: Sequence[str]) -> None:
        """`texts` are those of the control tokens, none empty."""
        alphabet = sorted(set("".join(texts)))
        if len(alphabet) > len(_STAND_INS):
            raise ChatTemplateError(
                f"the control tokens have {len(alphabet)} different characters, for a chat "
                f"template at most {len(_STAND_INS)} are supported"
            )
        self._hide = dict(zip(map(ord, alphabet), _STAND_INS, strict=False))
        self._show = {stand_in: char for char, stand_in in self._hide.items()}
        longest_first = sorted(texts, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._sorted = sorted(texts)
        self._mirrored = sorted(text[::-1] for text in texts)
        self._edge = min(max(map(len, texts), default=0), _MAX_EDGE)

    def hide(self, value: Any) -> Any:
        """A JSON value with stand-ins in every text in it."""
        if isinstance(value, str):
            return self._hidden(value)
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self._hidden(key): self.hide(item) for key, item in value.items()}
        return value

    def split(self, text: str) -> list[Segment]:
        """What a template wrote, without stand-ins."""
        segments, end = [], 0
        for match in self._control.finditer(text):
            segments += [self._plain(text[end : match.start()]), Segment(match[0], control=True)]
            end = match.end()
        return joined([*segments, self._plain(text[end:])])

    def _plain(self, text: str) -> Segment:
        # A template can write surrogates of its own; they are no text.
        return Segment(text.translate(self._show).encode("utf-8", "replace").decode())

    def _hidden(self, text: str) -> str:
        text = self._control.sub(lambda match: match[0].translate(self._hide), text)
        # The ends that a control token could begin or end with, also after a template trims them.
        core = text.strip()
        if not core:
            return text
        before, after = text.split(core, 1) if core != text else ("", "")
        head = _overlap(core[: self._edge][::-1], self._mirrored)
        core = core[:head].translate(self._hide) + core[head:]
        tail = len(core) - _overlap(core[-self._edge :], self._sorted)
        return before + core[:tail] + core[tail:].translate(self._hide) + after


def _overlap(text: str, controls: Sequence[str]) -> int:
    """How many of the last characters of `text` are the first ones of any of the sorted texts."""
    for start in range(len(text)):
        place = bisect_left(controls, text[start:])
        if place < len(controls) and controls[place].startswith(text[start:]):
            return len(text) - start
    return 0


def control_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of a vocabulary's control tokens."""
    tokens = range(tokenizer.vocab_size)
    texts = [tokenizer.token_text(token) for token in tokens if tokenizer.is_control(token)]
    return [text for text in texts if text]


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates expect it: arguments of calls are objects, what is not said is not
    there."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        result["tool_calls"] = [
            ({"id": call.id} if call.id is not None else {})
            | {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        result["name"] = message.name
    return result


def _folded(messages: Sequence[Message]) -> list[Message]:
    """The system text in front of the first user message's, with a line break between."""
    system, others = split_system(messages)
    for place, message in enumerate(others):
        if message.role == "user":
            content = f"{system}\n{message.content}" if system else message.content
            return [*others[:place], replace(message, content=content), *others[place + 1 :]]
    return [Message("messages[0]", "user", system), *others]


def _plainer(messages: Sequence[Message]) -> list[Message]:
    system, others = split_system(messages)
    front = [Message("messages[0]", "system", system)] if system else []
    return [
        replace(
            message,
            tool_call_id=message.tool_call_id and short_id(message.tool_call_id),
            tool_calls=tuple(
                replace(call, id=call.id and short_id(call.id)) for call in message.tool_calls
            ),
        )
        for message in merged([*front, *others])
    ]
