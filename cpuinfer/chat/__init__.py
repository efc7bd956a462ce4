"""Chat: messages -> prompt ids, in the form a model was trained on.

A template (built in, or Jinja from the model file) makes segments, control tokens or plain text;
here they become ids. What a person wrote never becomes a control token.
"""

import hashlib
from pathlib import Path

from cpuinfer.chat.families import ChatML, Llama2, Zephyr
from cpuinfer.chat.jinja import JinjaTemplate
from cpuinfer.chat.mistral import MistralV1, MistralV2, MistralV3, MistralV3Tekken
from cpuinfer.chat.template import ChatTemplateError, Messages, Segment, Template, Tools
from cpuinfer.gguf import GGUFFile, escape
from cpuinfer.tokenizer import Tokenizer

__all__ = ["BUILT_IN", "ChatTemplateError", "Segment", "Template", "load_template", "prompt_ids"]

BUILT_IN: dict[str, type[Template]] = {
    template.name: template
    for template in (
        MistralV1,
        MistralV2,
        MistralV3,
        MistralV3Tekken,
        ChatML,
        Zephyr,
        Llama2,
    )
}

MAX_TEMPLATE_BYTES = 64 << 10

# SHA-256 of templates that Mistral publishes, less the line break at the end. mistral-common's
# v1_spm, v2_spm, v3_spm and v3:
_KNOWN: dict[str, type[Template]] = {
    "a87c3bae1f7d071e0ec34315bc2b664ab208c6424fd989c09f6d337a6e99c98f": MistralV1,
    "a14893fb15048a4b1173cfea936a62505bcb1294bc73d806c47fac6a45fd01c3": MistralV2,
    "7d9cb61f581f3560c8a899b8275000c6375ca4b76365fc059d92d523448396a5": MistralV3,
    "f7fc2b7dce565c78406331c29d3847dbfc91a2a68ebc8f604d261f68d04128a5": MistralV3Tekken,
}
# Those in the first model files of 7B Instruct v0.1, v0.2 and v0.3. They know no system message,
# and omit a space in front of the model's words that mistral-common puts there.
_KNOWN_V1_OR_V3 = (
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7",
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495",
)


def load_template(file: GGUFFile, tokenizer: Tokenizer, choice: str | None) -> Template:
    """The template of a model: `choice` names a built-in or a Jinja file, None means the one in the
    model file.

    ChatTemplateError says what is missing or broken, ModelFormatError that the file's key is not
    text, OSError that the Jinja file cannot be read.
    """
    if choice in BUILT_IN:
        return BUILT_IN[choice]()
    model = escape(str(file.path))
    if choice is None:
        origin = f"the chat template of {model}"
        data = file.text("tokenizer.chat_template", "").encode()
        if not data:
            raise ChatTemplateError(
                f"{model} has no chat template; name one with `template`: "
                f"{', '.join(BUILT_IN)}, or the path of a Jinja file"
            )
    else:
        origin = f"the chat template {escape(choice)}"
        data = _read(choice)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise ChatTemplateError(f"{origin} is longer than {MAX_TEMPLATE_BYTES >> 10} KiB")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ChatTemplateError(f"{origin} is not UTF-8") from None
    known = _known(text, tokenizer)
    return JinjaTemplate(text, origin, tokenizer) if known is None else known()


def prompt_ids(
    template: Template, tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None
) -> list[int]:
    """The ids of a conversation, up to where the model's answer begins; at their start BOS is there
    once if the template writes it or the file asks for it (add_bos_token).

    Raises what `Template.render` raises, and ChatTemplateError if the vocabulary lacks a control
    token of the template.
    """
    bos = tokenizer.bos_id
    ids = [bos] if tokenizer.add_bos and bos is not None else []
    for segment in template.render(messages, tools):
        if not segment.control:
            ids += _text_ids(tokenizer, ids, segment.text)
            continue
        token = _control_id(tokenizer, segment.text)
        if token is None:
            raise ChatTemplateError(
                f"{template.name}: the model's vocabulary has no control token "
                f"{escape(segment.text)}"
            )
        if token != bos or ids != [bos]:
            ids.append(token)
    return ids


def _text_ids(tokenizer: Tokenizer, before: list[int], text: str) -> list[int]:
    """The ids of a text at the start of a prompt or after a control token, with the one space that
    `encode` puts in front there: if the text begins with a space, that is the one."""
    if not (before and tokenizer.add_space_prefix and text.startswith(" ")):
        return tokenizer.encode(text, add_bos=False)
    if text.strip(" "):
        return tokenizer.encode(text[1:], add_bos=False)
    control = tokenizer.token_text(before[-1])
    return tokenizer.encode(control + text, add_bos=False, parse_special=True)[1:]


def _control_id(tokenizer: Tokenizer, text: str) -> int | None:
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    return ids[0] if len(ids) == 1 and tokenizer.is_control(ids[0]) else None


def _known(text: str, tokenizer: Tokenizer) -> type[Template] | None:
    """The built-in that stands for a template of Mistral's."""
    digest = hashlib.sha256(text.removesuffix("\n").encode()).hexdigest()
    if digest in _KNOWN_V1_OR_V3:
        return MistralV1 if _control_id(tokenizer, "[INST]") is None else MistralV3
    return _KNOWN.get(digest)


def _read(path: str) -> bytes:
    """A Jinja file, or enough of it to see that it is too long."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_TEMPLATE_BYTES + 1)
    except FileNotFoundError:
        raise ChatTemplateError(
            f"there is no chat template {escape(path)}, neither a Jinja file nor one of "
            f"{', '.join(BUILT_IN)}"
        ) from None
