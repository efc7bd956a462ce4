"""What a chat template is: messages -> segments of the prompt. Knows no tokenizer and no family."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Messages and tools have the shape of OpenAI's API; `messages.py` checks them.
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatTemplateError(ValueError):
    """There is no template, or it does not work; str() is one sentence for a person."""


class TemplateFault(ChatTemplateError):
    """The template itself is wrong: it is none, or raises an error, for these messages or any."""


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt: the text of one control token, or plain text that makes none."""

    text: str
    control: bool = False


class Template(ABC):
    """Puts a conversation into the form a family of models was trained on."""

    name: str  # of a built-in, or where the template comes from
    reason = ""  # why it is the one of a model

    @abstractmethod
    def render(self, messages: Messages, tools: Tools | None = None) -> list[Segment]:
        """The prompt, up to the place where the model's answer begins.

        What a person wrote is never in a control segment. ValueError names the message and the
        field that are wrong, ChatTemplateError (one too) says why the template cannot be used.
        """


def joined(segments: Sequence[Segment]) -> list[Segment]:
    """The same prompt without empty text and with neighbouring texts made one."""
    result: list[Segment] = []
    for segment in segments:
        if result and not (segment.control or result[-1].control):
            result[-1] = Segment(result[-1].text + segment.text)
        elif segment.text:
            result.append(segment)
    return result
