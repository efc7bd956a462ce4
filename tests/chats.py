"""Conversations, templates and files to render them with, for the tests of chat."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from test_tokenizer import CONTROL, shared
from test_tokenizer import vocabulary as small_vocabulary

from cpuinfer.chat import Template
from cpuinfer.chat.jinja import JinjaTemplate
from cpuinfer.gguf import GGUFFile, open_gguf
from quant.gguf_writer import write_gguf

USER = [{"role": "user", "content": "a"}]


def mistral_cases(version: str) -> list[dict[str, Any]]:
    cases = json.loads(shared("chat/mistral_chat_tokens.json").read_text("utf-8"))["cases"]
    return [case for case in cases if case["tokenizer_version"] == version]


def llama_cpp_cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(shared("chat/chat_templates.json").read_text("utf-8"))[
        "cases"
    ]
    return cases


def text_of(template: Template, messages: Any, tools: Any = None) -> str:
    return "".join(segment.text for segment in template.render(messages, tools))


def stub(*controls: str, bos: str | None = "<s>") -> Any:
    """A tokenizer as a Jinja template needs it: BOS, </s>, and the other control tokens."""
    texts = [bos or "", "</s>", *controls]
    return SimpleNamespace(
        vocab_size=len(texts),
        bos_id=None if bos is None else 0,
        eos_id=1,
        token_text=lambda token: texts[token],
        is_control=lambda token: True,
    )


def jinja(text: str, *controls: str) -> JinjaTemplate:
    return JinjaTemplate(text, "T", stub(*controls))


def model_file(
    directory: Path, called: str = "model.gguf", controls: Sequence[str] = (), /, **general: str
) -> GGUFFile:
    """A file with the small vocabulary and these control tokens; `general` are its general.* keys,
    `template` among them its chat template."""
    metadata = small_vocabulary(dict.fromkeys(controls, CONTROL))
    if "template" in general:
        metadata["tokenizer.chat_template"] = general.pop("template")
    metadata |= {f"general.{key}": value for key, value in general.items()}
    write_gguf(directory / called, metadata, [])
    return open_gguf(directory / called)
