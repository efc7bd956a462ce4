"""The built-in templates of other families."""

import pytest
from chats import USER, llama_cpp_cases, text_of

from cpuinfer.chat import BUILT_IN

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Q"},
]


def test_text_of_chatml() -> None:
    case = next(case for case in llama_cpp_cases() if case["name"].startswith("teknium/"))
    template = BUILT_IN["chatml"]()
    assert text_of(template, case["messages"]) == case["expected_builtin"]
    controls = {segment.text for segment in template.render(CHAT) if segment.control}
    assert controls == {"<|im_start|>", "<|im_end|>"}


def test_text_of_zephyr() -> None:
    """The model card of Zephyr-7B-beta."""
    assert text_of(BUILT_IN["zephyr"](), CHAT) == (
        "<|system|>\nS</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n"
        "<|user|>\nQ</s>\n<|assistant|>\n"
    )


def test_text_of_llama_2() -> None:
    """chat_completion in Meta's generation.py."""
    assert text_of(BUILT_IN["llama-2"](), [*CHAT, {"role": "user", "content": " R "}]) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHello [/INST] Hi there </s><s>[INST] Q\n\n R [/INST]"
    )


@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama-2"])
def test_families_without_tools(name: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "1"}
    template = BUILT_IN[name]()
    with pytest.raises(ValueError, match="^tools: "):
        template.render(USER, [{"function": {"name": "f"}}])
    with pytest.raises(ValueError, match=r"^messages\[1\].tool_calls: "):
        template.render([*USER, call])
    with pytest.raises(ValueError, match=r"^messages\[1\].role: "):
        template.render([*USER, result])
