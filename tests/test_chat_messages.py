"""Messages and tools that are wrong."""

from typing import Any

import pytest
from chats import USER, text_of

from cpuinfer.chat import BUILT_IN


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "messages: there is none"),
        ("a", "messages: expected a list, found str"),
        ([7], r"messages\[0\]: expected a message .*, found int"),
        ([*USER, {"content": "a"}], r"messages\[1\].role: expected one of .*, found None"),
        ([{"role": "tools", "content": "a"}], r"messages\[0\].role: .*, found 'tools'"),
        ([{"role": [], "content": "a"}], r"messages\[0\].role: "),
        ([{"role": "user"}], r"messages\[0\].content: expected text .*, found none"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: expected text .*, found int"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content: no text, character 1"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\]: expected a part"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"messages\[0\].content\[0\].type: only 'text' is supported, found 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text: "),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], r"messages\[0\].tool_calls: only"),
        ([{"role": "assistant", "tool_calls": 1}], r"messages\[0\].tool_calls: expected a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\].tool_calls\[0\].function: "),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}],
            r"messages\[0\].tool_calls\[0\].function.name: expected .*, found 'a b'",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
            r"messages\[0\].tool_calls\[0\].function.arguments: expected JSON .*, found int",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "id": 1}]}],
            r"messages\[0\].tool_calls\[0\].id: expected text, found int",
        ),
        ([*USER, {"role": "assistant", "content": "", "prefix": True}], r"messages\[1\].prefix: "),
        ([*USER, {"role": "assistant", "content": ""}], r"messages\[1\].content: expected either"),
        ([*USER, {"role": "tool", "content": "a"}], r"messages\[1\].role: .* cannot follow 'user'"),
        (
            [
                *USER,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "a"},
            ],
            r"messages\[2\].tool_call_id: missing",
        ),
    ],
)
def test_wrong_messages(messages: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        BUILT_IN["mistral-v3"]().render(messages)


@pytest.mark.parametrize(
    "tools, reason",
    [
        ("a", "tools: expected a list, found str"),
        ([1], r"tools\[0\]: expected an object"),
        ([{"type": "retrieval"}], r"tools\[0\].type: expected 'function', found"),
        ([{"function": 1}], r"tools\[0\].function: expected an object, found int"),
        ([{"function": {"name": ""}}], r"tools\[0\].function.name: "),
        ([{"function": {"name": "f", "description": 1}}], r"tools\[0\].function.description: "),
        ([{"function": {"name": "f", "parameters": []}}], r"tools\[0\].function.parameters: "),
        (
            [{"function": {"name": "f", "parameters": {"a": {1}}}}],
            r"tools\[0\]: cannot be written as JSON: ",
        ),
    ],
)
def test_wrong_tools(tools: Any, reason: str) -> None:
    for name in ("mistral-v1", "mistral-v3"):
        with pytest.raises(ValueError, match=f"^{reason}"):
            BUILT_IN[name]().render(USER, tools)


def test_developer_is_system() -> None:
    messages = [{"role": "developer", "content": "S"}, *USER]
    assert text_of(BUILT_IN["mistral-v3"](), messages) == "<s>[INST] S\n\na[/INST]"
