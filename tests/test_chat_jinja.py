"""Templates in Jinja, against llama.cpp and as Hugging Face's transformers renders them."""

import re

import pytest
from chats import USER, jinja, llama_cpp_cases, stub, text_of

from cpuinfer.chat.jinja import JinjaTemplate


def test_renderings_of_llama_cpp() -> None:
    cases = llama_cpp_cases()
    assert len(cases) == 18
    for case in cases:
        tokenizer = stub(bos=case["bos_token"])
        tokenizer.token_text = [case["bos_token"], case["eos_token"]].__getitem__
        template = JinjaTemplate(case["template"], case["name"], tokenizer)
        assert text_of(template, case["messages"]) == case["expected_jinja_effective"]


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
