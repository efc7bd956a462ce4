"""Chat: messages -> prompt ids, in the form a model was trained on.

A template (built in, or Jinja from the model file) makes segments, control tokens or plain text;
here they become ids. What a person wrote never becomes a control token.
"""

from collections.abc import Sequence

from cpuinfer.chat.choice import BUILT_IN, control_id, load_template
from cpuinfer.chat.spoken import keep_tokens
from cpuinfer.chat.template import ChatTemplateError, Messages, Segment, Template, Tools
from cpuinfer.gguf import escape
from cpuinfer.tokenizer import Tokenizer

__all__ = ["BUILT_IN", "ChatTemplateError", "Segment", "Template", "load_template", "prompt_ids"]


def prompt_ids(
    template: Template,
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    previous_ids: Sequence[int] = (),
) -> list[int]:
    """The ids of a conversation, up to where the model's answer begins; at their start BOS is there
    once if the template writes it or the file asks for it (add_bos_token).  As far as
    `previous_ids`, an earlier prompt with its reply, are the same text, their tokens stay.

    Raises what `Template.render` raises, and ChatTemplateError if the vocabulary lacks a control
    token of the template.
    """
    bos = tokenizer.bos_id
    ids = [bos] if tokenizer.add_bos and bos is not None else []
    for segment in template.render(messages, tools):
        if not segment.control:
            ids += _text_ids(tokenizer, ids, segment.text)
            continue
        token = control_id(tokenizer, segment.text)
        if token is None:
            raise ChatTemplateError(
                f"{template.name}: the model's vocabulary has no control token "
                f"{escape(segment.text)}"
            )
        if token != bos or ids != [bos]:
            ids.append(token)
    return keep_tokens(tokenizer, ids, previous_ids)


def _text_ids(tokenizer: Tokenizer, before: list[int], text: str) -> list[int]:
    """The ids of a text at the start of a prompt or after a control token, with the one space that
    `encode` puts in front there: if the text begins with a space, that is the one."""
    if not (before and tokenizer.add_space_prefix and text.startswith(" ")):
        return tokenizer.encode(text, add_bos=False)
    if text.strip(" "):
        return tokenizer.encode(text[1:], add_bos=False)
    control = tokenizer.token_text(before[-1])
    return tokenizer.encode(control + text, add_bos=False, parse_special=True)[1:]
