"""Mistral's own templates: v1 (7B v0.1, v0.2), v2, v3 (7B v0.3), v3 with the Tekken vocabulary.

The prompts of mistral-common (InstructTokenizerV1 to V3, InstructRequestNormalizer), token for
token. In v1 [INST] is plain text, from v2 on a control token. The space a SentencePiece vocabulary
puts in front of a text is written out here; Tekken's has none.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from cpuinfer.chat.messages import (
    Message,
    ToolCall,
    check_messages,
    check_tools,
    merged,
    parse_json,
    short_id,
    split_system,
)
from cpuinfer.chat.template import Messages, Segment, Template, Tools, joined

BOS = Segment("<s>", control=True)
EOS = Segment("</s>", control=True)


class MistralV1(Template):
    """<s> [INST] system, user [/INST] assistant</s> [INST] user [/INST]; tools are left out."""

    name = "mistral-v1"

    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        check_tools(tools)
        system, turns = conversation(messages)
        segments = [BOS]
        for place, message in enumerate(turns):
            if message.role == "tool":
                raise message.error("role", f"{self.name} has no form for results of tools")
            if message.tool_calls:
                raise message.error("tool_calls", f"{self.name} has no form for calls of tools")
            if message.role == "assistant":
                segments += [Segment(f" {message.content}"), EOS]
                continue
            content = message.content if place else with_system(system, message)
            segments.append(Segment(f" [INST] {content} [/INST]"))
        return joined(segments)


class MistralV2(Template):
    """<s>[INST] user[/INST] assistant</s>[AVAILABLE_TOOLS] [...][/AVAILABLE_TOOLS][INST] system,
    user[/INST][TOOL_CALLS] [...]</s>[TOOL_RESULTS] [...][/TOOL_RESULTS].

    System and tools go to the last user message; calls and results before it are left out.
    """

    name = "mistral-v2"
    space = " "

    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        available = [describe(tool) for tool in check_tools(tools)]
        system, turns = conversation(messages)
        last = max(place for place, message in enumerate(turns) if message.role == "user")
        self.check(turns, last)
        segments = [BOS]
        for place, message in enumerate(turns):
            if message.role == "user":
                if place == last and available:
                    segments += self.between("AVAILABLE_TOOLS", dump(available))
                content = with_system(system, message) if place == last else message.content
                segments += self.between("INST", content)
            elif message.content and message.role == "assistant":
                segments += [self.text(message.content.rstrip(" ")), EOS]
            elif self.keeps_tools(place, last):
                segments += self.tool_turn(message)
        return joined(segments)

    def check(self, turns: Sequence[Message], last: int) -> None:
        """ValueError for a conversation this version has no form for."""
        for before, message in zip(turns[last:], turns[last + 1 :], strict=False):
            if before.role == message.role == "tool":
                raise message.error(
                    "role", f"{self.name} has no form for several results after one message"
                )

    def keeps_tools(self, place: int, last: int) -> bool:
        """Whether calls and results at this place are in the prompt, `last` being the last user
        message's."""
        return place > last

    def tool_turn(self, message: Message) -> Iterator[Segment]:
        if message.role == "tool":
            yield from self.between("TOOL_RESULTS", dump(self.result(message)))
        else:
            yield Segment("[TOOL_CALLS]", control=True)
            yield self.text(dump([self.call(call) for call in message.tool_calls]))
            yield EOS

    def call(self, call: ToolCall) -> dict[str, Any]:
        return {"name": call.name, "arguments": call.arguments}

    def result(self, message: Message) -> Any:
        return [{"name": message.name, "content": parsed(message)}]

    def between(self, name: str, text: str) -> Iterator[Segment]:
        yield Segment(f"[{name}]", control=True)
        yield self.text(text)
        yield Segment(f"[/{name}]", control=True)

    def text(self, text: str) -> Segment:
        """No space before no text: SentencePiece gives no token for it."""
        return Segment(self.space + text if text else "")


class MistralV3(MistralV2):
    """As v2, but with ids in calls and results, and all of them are in the prompt."""

    name = "mistral-v3"

    def check(self, turns: Sequence[Message], last: int) -> None:
        for message in turns:
            if message.role == "tool" and message.tool_call_id is None:
                raise message.error("tool_call_id", f"missing, {self.name} needs it")

    def keeps_tools(self, place: int, last: int) -> bool:
        return True

    def call(self, call: ToolCall) -> dict[str, Any]:
        return super().call(call) | ({"id": short_id(call.id)} if call.id else {})

    def result(self, message: Message) -> Any:
        assert message.tool_call_id is not None
        return {"content": parsed(message), "call_id": short_id(message.tool_call_id)}


class MistralV3Tekken(MistralV3):
    """v3 without any space between a control token and the text after it."""

    name = "mistral-v3-tekken"
    space = ""


def conversation(messages: Messages) -> tuple[str, list[Message]]:
    """The system text, and the other messages: those of one role that follow each other merged, a
    user message first (an empty one, if need be)."""
    checked = check_messages(messages)
    before = "system"
    for message in checked:
        if message.role == "tool" and before not in ("assistant", "tool"):
            raise message.error("role", f"the result of a tool cannot follow {before!r}")
        before = message.role
    system, turns = split_system(checked)
    turns = merged(turns)
    for message in [*checked, *turns]:
        if message.role == "assistant" and bool(message.content) == bool(message.tool_calls):
            raise message.error("content", "expected either text or tool_calls, but not both")
    if not turns or turns[0].role != "user":
        turns.insert(0, Message("messages[0]", "user", ""))
    return system, turns


def with_system(system: str, message: Message) -> str:
    return f"{system}\n\n{message.content}" if system else message.content


def parsed(message: Message) -> Any:
    """A tool's result: JSON if it is, else text; nothing counts as an empty object."""
    return parse_json(message.content) if message.content else {}


def describe(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields Mistral knows, in its order."""
    function = tool["function"]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        },
    }


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
