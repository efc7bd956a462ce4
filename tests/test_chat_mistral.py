"""Mistral's own prompts, against mistral-common."""

import json
import re
from typing import Any

import pytest
from chats import USER, mistral_cases, text_of
from test_tokenizer import converted, sentencepiece_model, shared

from cpuinfer.chat import BUILT_IN, ChatTemplateError, prompt_ids
from cpuinfer.chat.jinja import JinjaTemplate
from cpuinfer.chat.messages import short_id

VOCABULARIES = {"v1": "mistral-v1", "v2": "mistral-v3", "v3": "mistral-v3"}
INST, END_INST = 3, 4
# What mistral-common says when it refuses, and what we say.
REFUSALS = {
    "Tools not implemented": r"messages\[\d\].tool_calls: mistral-v1 has no form for calls",
    "either content or tool_calls": r"messages\[\d\].content: expected either text or tool_calls",
    "multiple tool results": r"messages\[7\].role: mistral-v2 has no form for several results",
}


@pytest.mark.parametrize("version, cases", [("v1", 21), ("v2", 21), ("v3", 21)])
def test_ids_of_mistral(version: str, cases: int) -> None:
    template = BUILT_IN[f"mistral-{version}"]()
    tokenizer = converted(VOCABULARIES[version])
    chats = mistral_cases(version)
    assert len(chats) == cases
    for case in chats:
        if "error" in case:
            reason = next(ours for theirs, ours in REFUSALS.items() if theirs in case["error"])
            with pytest.raises(ValueError, match=reason):
                prompt_ids(template, tokenizer, case["messages"], case["tools"])
        else:
            ids = prompt_ids(template, tokenizer, case["messages"], case["tools"])
            assert ids == case["tokens"], case["name"]


def test_text_of_mistral_with_tekken() -> None:
    template = BUILT_IN["mistral-v3-tekken"]()
    chats = mistral_cases("v3-tekken")
    assert len(chats) == 21
    for case in chats:
        if "error" in case:
            with pytest.raises(ValueError, match=REFUSALS["either content or tool_calls"]):
                template.render(case["messages"], case["tools"])
        else:
            assert text_of(template, case["messages"], case["tools"]) == case["text"]


def test_ids_of_mistral_v1_by_hand() -> None:
    """From mistral-common's tests."""
    messages = [{"role": "system", "content": "SYSTEM"}, *USER]
    ids = prompt_ids(BUILT_IN["mistral-v1"](), converted("mistral-v1"), messages)
    assert ids == [
        *(1, 733, 16289, 28793, 17121, 22526, 13, 13),
        *(28708, 733, 28748, 16289, 28793),
    ]


@pytest.mark.parametrize("content", ["", " ", "   ", " a", "  a ", "\na", "[INST] a</s>", "é\n"])
def test_contents_are_encoded_as_they_are(content: str) -> None:
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": content},
    ]
    ids = prompt_ids(BUILT_IN["mistral-v3"](), converted("mistral-v3"), messages)
    encode = sentencepiece_model("mistral-v3").encode
    turn = [INST, *encode(content), END_INST]
    assert ids == [1, *turn, *encode("b"), 2, *turn]


def test_call_ids_become_nine_letters_and_digits() -> None:
    calls = [
        {"id": name, "function": {"name": "f", "arguments": {}}}
        for name in ("call_0123456789abcdef", "call_x", "abcDEF123")
    ]
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        *[{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in calls],
    ]
    text = text_of(BUILT_IN["mistral-v3"](), messages)
    in_calls = re.findall('"id": "([a-zA-Z0-9]{9})"', text)
    assert in_calls == re.findall('"call_id": "([a-zA-Z0-9]{9})"', text)
    assert in_calls[2] == "abcDEF123"
    assert len({short_id(str(number)) for number in range(1000)}) == 1000


@pytest.mark.parametrize(
    "content, written",
    [
        ("", "{}"),
        ("32", "32"),
        ('{"é": [1,2]}', '{"é": [1, 2]}'),
        ("sunny", '"sunny"'),
        ("[" * 100_000, None),
        ("1" * 5000, None),
    ],
)
def test_results_of_tools(content: str, written: str | None) -> None:
    messages = [
        *USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "abcDEF123", "content": content},
    ]
    text = text_of(BUILT_IN["mistral-v3"](), messages)
    written = json.dumps(content) if written is None else written
    assert text.endswith(
        f'[TOOL_RESULTS] {{"content": {written}, "call_id": "abcDEF123"}}[/TOOL_RESULTS]'
    )


@pytest.mark.parametrize(
    "arguments, written",
    [
        (None, "{}"),
        ("", "{}"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        ('{"b":1,"a":2.0}', '{"b": 1, "a": 2.0}'),
        ("0", "0"),
        ("null", "null"),
        ("{'a'", "\"{'a'\""),
    ],
)
def test_arguments_of_calls(arguments: Any, written: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [*USER, {"role": "assistant", "tool_calls": [call]}]
    text = text_of(BUILT_IN["mistral-v3"](), messages)
    assert text.endswith(f'[TOOL_CALLS] [{{"name": "f", "arguments": {written}}}]</s>')


def test_a_conversation_may_begin_with_the_assistant() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "assistant", "content": "b"}]
    assert text_of(BUILT_IN["mistral-v3"](), messages) == "<s>[INST] S\n\n[/INST] b</s>"


def test_mistral_v3_needs_its_control_tokens() -> None:
    with pytest.raises(ChatTemplateError, match=r"mistral-v3: .* no control token \[INST\]"):
        prompt_ids(BUILT_IN["mistral-v3"](), converted("mistral-v1"), USER)


def test_mistral_v1_template_in_jinja_gives_the_ids_of_the_built_in() -> None:
    text = shared("chat/mistral_templates/v1_spm.jinja").read_text("utf-8")
    template = JinjaTemplate(text, "v1_spm", converted("mistral-v1"))
    chats = [case for case in mistral_cases("v1") if "tokens" in case]
    assert len(chats) == 11
    for case in chats:
        assert prompt_ids(template, converted("mistral-v1"), case["messages"]) == case["tokens"]
