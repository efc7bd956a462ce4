"""The simple templates of other families: ChatML, Zephyr, Llama 2. None has a form for tools."""

from cpuinfer.chat.messages import Message, check_messages, check_tools, merged, split_system
from cpuinfer.chat.template import Messages, Segment, Template, Tools, joined


class ChatML(Template):
    r"""<|im_start|>role\ncontent<|im_end|>\n for every message, the markers being control tokens
    (OpenHermes, Dolphin, Qwen)."""

    name = "chatml"

    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        start, end = (Segment(f"<|im_{name}|>", control=True) for name in ("start", "end"))
        segments = []
        for message in without_tools(self.name, messages, tools):
            segments += [start, Segment(f"{message.role}\n{message.content}"), end, Segment("\n")]
        return joined([*segments, start, Segment("assistant\n")])


class Zephyr(Template):
    r"""<|role|>\ncontent</s>\n for every message; only </s> is a control token (Zephyr)."""

    name = "zephyr"

    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        segments = []
        for message in without_tools(self.name, messages, tools):
            segments += [
                Segment(f"<|{message.role}|>\n{message.content}"),
                Segment("</s>", control=True),
                Segment("\n"),
            ]
        return joined([*segments, Segment("<|assistant|>\n")])


class Llama2(Template):
    r"""<s>[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser [/INST] assistant </s> for every exchange, as
    Meta's generation.py does; [INST] is plain text."""

    name = "llama-2"

    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        system, turns = split_system(without_tools(self.name, messages, tools))
        turns = merged(turns)
        if not turns or turns[0].role != "user":
            turns.insert(0, Message("messages[0]", "user", ""))
        segments = []
        for place, message in enumerate(turns):
            content = message.content.strip()
            if message.role == "assistant":
                segments += [Segment(f" {content} "), Segment("</s>", control=True)]
                continue
            if place == 0 and system:
                content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{message.content}".strip()
            segments += [Segment("<s>", control=True), Segment(f"[INST] {content} [/INST]")]
        return joined(segments)


def without_tools(name: str, messages: Messages, tools: Tools | None) -> list[Message]:
    """The messages, checked; ValueError if tools are in play."""
    if check_tools(tools):
        raise ValueError(f"tools: the template {name} has no form for them")
    checked = check_messages(messages)
    for message in checked:
        if message.role == "tool" or message.tool_calls:
            field = "tool_calls" if message.tool_calls else "role"
            raise message.error(field, f"the template {name} has no form for tools")
    return checked
