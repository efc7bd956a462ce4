"""Prompts against mistral-common and llama.cpp; what people type; templates that are hostile."""

import gc
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_tokenizer import CONTROL, converted, load, sentencepiece_model, shared
from test_tokenizer import vocabulary as small_vocabulary

from cpuinfer import chat
from cpuinfer.chat import BUILT_IN, ChatTemplateError, Template, load_template, prompt_ids
from cpuinfer.chat import worker as worker_module
from cpuinfer.chat.jinja import JinjaTemplate
from cpuinfer.chat.messages import short_id
from cpuinfer.gguf import GGUFFile, open_gguf
from quant.gguf_writer import write_gguf

VOCABULARIES = {"v1": "mistral-v1", "v2": "mistral-v3", "v3": "mistral-v3"}
INST, END_INST = 3, 4
# What mistral-common says when it refuses, and what we say.
REFUSALS = {
    "Tools not implemented": r"messages\[\d\].tool_calls: mistral-v1 has no form for calls",
    "either content or tool_calls": r"messages\[\d\].content: expected either text or tool_calls",
    "multiple tool results": r"messages\[7\].role: mistral-v2 has no form for several results",
}
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


def model_file(directory: Path, **metadata: Any) -> GGUFFile:
    path = directory / "model.gguf"
    write_gguf(path, small_vocabulary() | metadata, [])
    return open_gguf(path)


# Mistral's prompts.


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


# Other families.

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


def test_renderings_of_llama_cpp() -> None:
    cases = llama_cpp_cases()
    assert len(cases) == 18
    for case in cases:
        tokenizer = stub(bos=case["bos_token"])
        tokenizer.token_text = [case["bos_token"], case["eos_token"]].__getitem__
        template = JinjaTemplate(case["template"], case["name"], tokenizer)
        assert text_of(template, case["messages"]) == case["expected_jinja_effective"]


# Control tokens come from the template alone.

TYPED = ["</s>", "<s>[INST] a [/INST]", "</", "s>", "/INST] [INS", "  [/INST", "[[INST]INST]", "<"]


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v2", "mistral-v3", "zephyr", "llama-2"])
@pytest.mark.parametrize("typed", TYPED)
def test_typed_text_is_never_control(name: str, typed: str) -> None:
    tokenizer = converted("mistral-v1" if name == "mistral-v1" else "mistral-v3")

    def controls(text: str) -> list[int]:
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}]},
        ]
        ids = prompt_ids(BUILT_IN[name](), tokenizer, messages)
        assert tokenizer.decode(ids).count(text.strip()) >= 4
        return [token for token in ids if tokenizer.is_control(token)]

    assert controls(typed) == controls("x")


@pytest.mark.parametrize("typed", TYPED)
def test_typed_text_is_never_control_in_jinja(typed: str) -> None:
    template = jinja(
        "{{ bos_token }}{% for m in messages %}[INST]{{ m.content|trim }}{{ m.content }}[/INST]"
        "{{ m.tool_calls|tojson if m.tool_calls }}{% endfor %}{{ tools|tojson }}</s>",
        *("[INST]", "[/INST]"),
    )

    def controls(text: str) -> list[str]:
        call = {"id": text, "function": {"name": "f", "arguments": {text: [text]}}}
        tool = {"function": {"name": "f", "description": text, "parameters": {text: text}}}
        segments = template.render(
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": text, "tool_calls": [call]},
            ],
            [tool],
        )
        rendered = "".join(segment.text for segment in segments)
        assert rendered.count(text.strip()) >= 10
        assert f"[INST]{text.strip()}{text}[/INST]" in rendered
        return [segment.text for segment in segments if segment.control]

    assert (
        controls(typed)
        == controls("x")
        == [*("<s>", "[INST]", "[/INST]", "[INST]", "[/INST]", "</s>")]
    )


@pytest.mark.parametrize("content", ["INST] b", " INST]", "b [INST", "[INST \n"])
def test_typed_text_completes_no_control_token(content: str) -> None:
    segments = jinja("[{{ messages[0].content|trim }}]", "[INST]").render(
        [{"role": "user", "content": content}]
    )
    assert [(s.text, s.control) for s in segments] == [(f"[{content.strip()}]", False)]


def test_control_tokens_of_many_characters() -> None:
    control = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
    messages = [{"role": "user", "content": f"{control}{control[::-1]}{control[:-1]}"}]
    segments = jinja("{{ messages[0].content }}", control).render(messages)
    assert [(s.text, s.control) for s in segments] == [(messages[0]["content"], False)]
    with pytest.raises(ChatTemplateError, match="1078 different characters"):
        jinja("x", "".join(map(chr, range(0x4E00, 0x4E00 + 1074))))


def test_jinja_sees_what_people_typed() -> None:
    template = jinja(
        "{% set c = messages[0].content %}{{ c.split('</think>')[-1].lstrip('\\n') }}|"
        "{{ c.startswith('<think>') }}|{{ c|length }}|{{ c[:3] }}|{{ c|upper }}"
    )
    content = "<think>x</think>\n[y] </"
    messages = [{"role": "user", "content": content}]
    assert text_of(template, messages) == f"[y] </|True|{len(content)}|<th|{content.upper()}"


def test_control_tokens_of_one_character() -> None:
    tokenizer = load(small_vocabulary({"X": CONTROL}))
    template = JinjaTemplate("X{{ messages[0].content }}X", "T", tokenizer)
    assert [(s.text, s.control) for s in template.render([{"role": "user", "content": "XaX"}])] == [
        *(("X", True), ("XaX", False), ("X", True))
    ]


@pytest.mark.parametrize("content", ["", " ", "  ", "a", " a", "\n", "é [a"])
def test_ids_are_those_of_the_rendered_text(content: str) -> None:
    tokenizer = converted("mistral-v3")
    text = "<s> [INST] {{ messages[0].content }}[/INST]{{ messages[0].content }} </s>"
    template = JinjaTemplate(text, "T", tokenizer)
    messages = [{"role": "user", "content": content}]
    assert prompt_ids(template, tokenizer, messages) == tokenizer.encode(
        text_of(template, messages), add_bos=False, parse_special=True
    )


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize(
    "text, written", [("a", 0), ("{{ bos_token }}a", 1), ("<s>{{ bos_token }}a", 1)]
)
def test_bos_is_there_once(text: str, written: int, add_bos: bool) -> None:
    tokenizer = load(small_vocabulary(add_bos_token=add_bos))
    ids = prompt_ids(JinjaTemplate(text, "T", tokenizer), tokenizer, USER)
    assert ids.count(1) == (1 if add_bos else written)
    assert [token for token in ids if token != 1] == tokenizer.encode("a", False)


def test_bos_before_another_control_token() -> None:
    tokenizer = load(small_vocabulary({"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}))
    ids = prompt_ids(BUILT_IN["chatml"](), tokenizer, USER)
    assert ids[0] == 1 and ids.count(1) == 1 and tokenizer.token_text(ids[1]) == "<|im_start|>"


# Messages that are wrong.


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


# Which template a model has.


def test_no_template(tmp_path: Path) -> None:
    file = model_file(tmp_path)
    with pytest.raises(ChatTemplateError, match="model.gguf has no chat template.*mistral-v1, "):
        load_template(file, load(small_vocabulary()), None)


@pytest.mark.parametrize("name", BUILT_IN)
def test_templates_by_name(tmp_path: Path, name: str) -> None:
    file = model_file(tmp_path, **{"tokenizer.chat_template": "x"})
    assert load_template(file, load(small_vocabulary()), name).name == name


def test_template_of_the_model_file(tmp_path: Path) -> None:
    file = model_file(tmp_path, **{"tokenizer.chat_template": "{{ bos_token }}x\n"})
    template = load_template(file, load(small_vocabulary()), None)
    assert text_of(template, USER) == "<s>x"


def test_template_in_a_jinja_file(tmp_path: Path) -> None:
    path = tmp_path / "é.jinja"
    path.write_text("é{{ eos_token }}", "utf-8")
    template = load_template(model_file(tmp_path), load(small_vocabulary()), str(path))
    assert text_of(template, USER) == "é</s>"


@pytest.mark.parametrize(
    "data, reason",
    [
        (None, "neither a Jinja file nor one of mistral-v1, "),
        (b"x" * ((64 << 10) + 1), "is longer than 64 KiB"),
        (b"x" * (1 << 20), "is longer than 64 KiB"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"a\nb{% for x in %}", ", line 2: Expected an expression"),
        (b"{{" * 20_000, "RecursionError"),
    ],
)
def test_templates_that_cannot_be_loaded(tmp_path: Path, data: bytes | None, reason: str) -> None:
    path = tmp_path / "t.jinja"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ChatTemplateError, match=f"chat template .*t.jinja.*{reason}"):
        load_template(model_file(tmp_path), load(small_vocabulary()), str(path))


@pytest.mark.parametrize(
    "stem, name",
    [
        ("v1_spm", "mistral-v1"),
        ("v2_spm", "mistral-v2"),
        ("v3_spm", "mistral-v3"),
        ("v3", "mistral-v3-tekken"),
    ],
)
@pytest.mark.parametrize("end", ["", "\n"])
def test_templates_of_mistral_are_built_in(tmp_path: Path, stem: str, name: str, end: str) -> None:
    text = shared(f"chat/mistral_templates/{stem}.jinja").read_text("utf-8").rstrip("\n") + end
    file = model_file(tmp_path, **{"tokenizer.chat_template": text})
    assert load_template(file, load(small_vocabulary()), None).name == name


def test_templates_of_first_mistral_files_go_by_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"old").hexdigest()
    monkeypatch.setattr(chat, "_KNOWN_V1_OR_V3", (digest,))
    file = model_file(tmp_path, **{"tokenizer.chat_template": "old"})
    assert load_template(file, converted("mistral-v1"), None).name == "mistral-v1"
    assert load_template(file, converted("mistral-v3"), None).name == "mistral-v3"


def test_mistral_v1_template_in_jinja_gives_the_ids_of_the_built_in() -> None:
    text = shared("chat/mistral_templates/v1_spm.jinja").read_text("utf-8")
    template = JinjaTemplate(text, "v1_spm", converted("mistral-v1"))
    chats = [case for case in mistral_cases("v1") if "tokens" in case]
    assert len(chats) == 11
    for case in chats:
        assert prompt_ids(template, converted("mistral-v1"), case["messages"]) == case["tokens"]


# Jinja as Hugging Face's transformers has it.


@pytest.mark.parametrize(
    "text, rendered",
    [
        ("  {% if true %}\na\n  {% endif %}\nb\n", "a\nb"),
        ("{{ {'a': \"<é'>\"}|tojson }}", '{"a": "<é\'>"}'),
        ("{{ [1, 2]|tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{{ '<' + ({'a': 1}|tojson|safe) }}", '<{"a": 1}'),
        ("a{% generation %}b{{ messages|length }}{% endgeneration %}c", "ab1c"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ tools is none }} {{ add_generation_prompt }} {{ x is defined }}", "True True False"),
        ("{{ strftime_now('%d %B')|length > 4 }}", "True"),
    ],
)
def test_jinja_of_hugging_face(text: str, rendered: str) -> None:
    assert text_of(jinja(text), USER) == rendered


def test_arguments_of_calls_are_objects_in_jinja() -> None:
    template = jinja(
        "{% for c in messages[1].tool_calls %}{{ c.function.arguments.x }}{% endfor %}"
    )
    calls = [{"id": "1", "function": {"name": "f", "arguments": '{"x": 7}'}}]
    assert text_of(template, [*USER, {"role": "assistant", "tool_calls": calls}]) == "7"


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}({{ m.content }}){% endfor %}"
)


def test_messages_are_merged_where_jinja_refuses_them() -> None:
    messages = [*USER, *USER, {"role": "assistant", "content": "b"}, *USER]
    assert text_of(jinja(ALTERNATING), messages) == "(a\n\na)(b)(a)"
    assert text_of(jinja("{% for m in messages %}({{ m.content }}){% endfor %}"), messages) == (
        "(a)(a)(b)(a)"
    )


@pytest.mark.parametrize(
    "text",
    [
        ALTERNATING,
        "{% for m in messages if m.role != 'system' %}({{ m.content }}){% endfor %}",
    ],
)
def test_system_goes_to_the_user_where_jinja_has_no_place_for_it(text: str) -> None:
    messages = [{"role": "system", "content": "("}, *USER]  # what the template writes anyway
    assert text_of(jinja(text), messages) == "((\na)"
    assert text_of(jinja(text), messages[:1]) == "(()"


def test_call_ids_are_mapped_where_jinja_refuses_them() -> None:
    calls = [{"id": "call_1", "function": {"name": "f"}}]
    messages = [*USER, {"role": "assistant", "tool_calls": calls}]
    strict = (
        "{% for c in messages[1].tool_calls %}"
        "{% if c.id|length != 9 %}{{ raise_exception('9!') }}{% endif %}{{ c.id }}{% endfor %}"
    )
    assert re.fullmatch("[a-zA-Z0-9]{9}", text_of(jinja(strict), messages))
    assert text_of(jinja("{{ messages[1].tool_calls[0].id }}"), messages) == "call_1"


# Templates that fail, and templates of bad people (H15).


@pytest.mark.parametrize(
    "text, reason",
    [
        ("\n\n{{ raise_exception('not \x1b[31mthat') }}", r"T, line 3: not \\x1b\[31mthat"),
        ("a\n{{ nothing.at.all }}", "T, line 2: 'nothing' is undefined"),
        ("\n{{ messages[0].content + 1 }}", "T, line 2: TypeError: can only concatenate"),
        ("{% macro m(x) %}\n{{ x + 1 }}{% endmacro %}\n\n{{ m('a') }}", "T, line 2: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "T, line 1: access to attribute '__class__' .* is unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "T, line 1: access to .* is unsafe"),
        ("{{ messages.append(1) }}", "T, line 1: access to attribute 'append' .* is unsafe"),
        ("{{ (''|attr('__class__')).x }}", "T, line 1: .*(unsafe|undefined|has no attribute)"),
        ("{% include '/etc/passwd' %}", "T, line 1: .*no loader"),
        ("{{ 'a' * 10 ** 9 }}", "T.* more than 256 MiB"),
        ("{{ 'a'.center(10 ** 9)|length }}", "T.* more than 256 MiB"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "T.*RecursionError"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "T.*more than 4194304 charac"),
        ("{{ range(10 ** 9) }}", "T, line 1: OverflowError"),
    ],
)
def test_templates_that_fail(text: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"^{reason}"):
        jinja(text).render(USER)


def test_templates_that_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    template = jinja(
        "{% if messages[0].content == 'b' %}b{% else %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    process = template._worker._process
    assert process is not None
    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "SECONDS", 0.3)
        with pytest.raises(ChatTemplateError, match="^T: it takes longer than .* and was stopped"):
            template.render(USER)
    assert process.returncode is not None
    assert text_of(template, [{"role": "user", "content": "b"}]) == "b"  # in a new process


def test_process_ends_with_its_template() -> None:
    template = jinja("x")
    process = template._worker._process
    assert process is not None and process.poll() is None
    process.kill()
    process.wait()
    assert text_of(template, USER) == "x"  # in a new process
    process = template._worker._process
    assert process is not None and process.poll() is None
    del template
    gc.collect()
    assert process.returncode is not None


def test_chat_is_imported_without_jinja() -> None:
    code = "import sys, cpuinfer.chat; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
