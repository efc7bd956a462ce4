"""Which template a model is given: the one a person names, else the model file's own, else the one
that the file's name tells of.

A template of the model file that Mistral published is recognised by its hash and replaced by the
built-in, which also has tools and a place for system messages.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cpuinfer.chat.families import ChatML, Llama2, Zephyr
from cpuinfer.chat.jinja import JinjaTemplate
from cpuinfer.chat.mistral import MistralV1, MistralV2, MistralV3, MistralV3Tekken
from cpuinfer.chat.template import ChatTemplateError, Template, TemplateFault
from cpuinfer.gguf import GGUFFile, escape
from cpuinfer.tokenizer import Tokenizer

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

_KEY = "tokenizer.chat_template"

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


class _Named(NamedTuple):
    """Models whose names match, and the template they were trained with."""

    pattern: re.Pattern[str]
    template: type[Template]
    control: str | None  # a token without which a vocabulary is not theirs


def _named(pattern: str, template: type[Template], control: str | None = None) -> _Named:
    return _Named(re.compile(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])"), template, control)


# Files of 2023 have no template. Names are compared in small letters, with - for whatever stands
# between words. The sources are the models' cards on huggingface.co.
_NAMED = (
    # mistralai/Mistral-7B-Instruct-v0.1, -v0.2: mistral_common.tokens.tokenizers, v1
    _named("mistral-7b-instruct-v0-[12]", MistralV1),
    # mistralai/Mistral-7B-Instruct-v0.3: v3
    _named("mistral-7b-instruct-v0-3", MistralV3, "[INST]"),
    # HuggingFaceH4/zephyr-7b-alpha, -beta: tokenizer_config.json
    _named("zephyr-7b-(?:alpha|beta)", Zephyr),
    # teknium/OpenHermes-2-Mistral-7B, OpenHermes-2.5-Mistral-7B: "Prompt Format"
    _named("openhermes-2(?:-5)?-mistral-7b", ChatML, "<|im_start|>"),
    # ehartford/dolphin-2.0-mistral-7b to cognitivecomputations/dolphin-2.8: "Prompt format"
    _named("dolphin-2-[0-9](?:-[0-9])?-mistral-7b", ChatML, "<|im_start|>"),
    # meta-llama/Llama-2-7b-chat-hf, -13b-, -70b-: generation.py of the release
    _named("llama-2-(?:7|13|70)b-chat", Llama2),
)


def load_template(file: GGUFFile, tokenizer: Tokenizer, choice: str | None) -> Template:
    """The template of a model, `reason` saying why this one: `choice` names a built-in or a Jinja
    file, None means the one in the model file or of its name.

    ChatTemplateError says that there is none or what is wrong with the chosen one, ModelFormatError
    what is wrong with that of the model file, OSError that the Jinja file cannot be read.
    """
    if choice in BUILT_IN:
        return _for_reason(BUILT_IN[choice](), "as chosen")
    if choice is not None:
        origin = f"the chat template {escape(choice)}"
        return _for_reason(_jinja(_read(choice), origin, tokenizer), "as chosen")
    data = file.text(_KEY, "").encode()
    if not data:
        return _by_name(file, tokenizer)
    known = _known(data, tokenizer)
    if known is not None:
        return _for_reason(known(), "Mistral's own, which the model file has")
    origin = f"the chat template of {escape(str(file.path))}"
    try:
        return _for_reason(_jinja(data, origin, tokenizer), "from the model file")
    except TemplateFault as error:
        reason = str(error).removeprefix(origin).lstrip(", ")
        advice = "`generate` works without it, --template chooses another"
        raise file.error(_KEY, f"{reason} ({advice})") from None


def control_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The control token with this text, if there is one."""
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    return ids[0] if len(ids) == 1 and tokenizer.is_control(ids[0]) else None


def _for_reason(template: Template, reason: str) -> Template:
    template.reason = reason
    return template


def _by_name(file: GGUFFile, tokenizer: Tokenizer) -> Template:
    for name in _names(file):
        words = re.sub("[^a-z0-9]+", "-", name.lower())
        for named in _NAMED:
            if named.pattern.search(words) and (
                named.control is None or control_id(tokenizer, named.control) is not None
            ):
                reason = f"the model file has none, its name is {escape(name)}"
                return _for_reason(named.template(), reason)
    raise ChatTemplateError(
        f"{escape(str(file.path))} has no chat template, and no name of a chat model: continue "
        f"texts with `generate`, or choose one with --template: {', '.join(BUILT_IN)}, or the "
        "path of a Jinja file"
    )


def _names(file: GGUFFile) -> Iterator[str]:
    """What a model calls itself (mistralai_mistral-7b-instruct-v0.2; Mistral-7B, Instruct, v0.2),
    and what its file is called."""
    yield file.text("general.name", "")
    parts = ("basename", "size_label", "finetune", "version")
    texts = [file.text(f"general.{part}", "") for part in parts]
    yield "-".join(text for text in texts if text)
    yield file.path.name


def _jinja(data: bytes, origin: str, tokenizer: Tokenizer) -> Template:
    if len(data) > MAX_TEMPLATE_BYTES:
        raise TemplateFault(f"{origin} is longer than {MAX_TEMPLATE_BYTES >> 10} KiB")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise TemplateFault(f"{origin} is not UTF-8") from None
    return JinjaTemplate(text, origin, tokenizer)


def _known(data: bytes, tokenizer: Tokenizer) -> type[Template] | None:
    """The built-in that stands for a template of Mistral's."""
    digest = hashlib.sha256(data.removesuffix(b"\n")).hexdigest()
    if digest in _KNOWN_V1_OR_V3:
        return MistralV1 if control_id(tokenizer, "[INST]") is None else MistralV3
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
