"""Which template a model has."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from chats import USER, model_file, text_of
from command import PROMPT, child, variant
from test_tokenizer import converted, load, shared
from test_tokenizer import vocabulary as small_vocabulary

from cpuinfer import LLM, ModelFormatError
from cpuinfer.chat import BUILT_IN, ChatTemplateError, choice, load_template
from cpuinfer.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", BUILT_IN)
def test_templates_by_name(tmp_path: Path, name: str) -> None:
    file = model_file(tmp_path, template="x")
    template = load_template(file, load(small_vocabulary()), name)
    assert (template.name, template.reason) == (name, "as chosen")


def test_template_of_the_model_file(tmp_path: Path) -> None:
    file = model_file(tmp_path, template="{{ bos_token }}x\n")
    template = load_template(file, load(small_vocabulary()), None)
    assert text_of(template, USER) == "<s>x"
    assert template.reason == "from the model file"


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
    file = model_file(tmp_path, template=text)
    template = load_template(file, load(small_vocabulary()), None)
    assert template.name == name
    assert template.reason == "Mistral's own, which the model file has"


def test_templates_of_first_mistral_files_go_by_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"old").hexdigest()
    monkeypatch.setattr(choice, "_KNOWN_V1_OR_V3", (digest,))
    file = model_file(tmp_path, template="old")
    assert load_template(file, converted("mistral-v1"), None).name == "mistral-v1"
    assert load_template(file, converted("mistral-v3"), None).name == "mistral-v3"


# Files without a template.


@pytest.mark.parametrize(
    "name, template",
    [
        ("mistralai_mistral-7b-instruct-v0.1", "mistral-v1"),  # files of 2023
        ("mistralai_mistral-7b-instruct-v0.2", "mistral-v1"),
        ("Mistral 7B Instruct v0.2", "mistral-v1"),  # and of 2024
        ("models--mistralai--Mistral-7B-Instruct-v0.3", "mistral-v3"),
        ("huggingfaceh4_zephyr-7b-beta", "zephyr"),
        ("zephyr-7B-alpha.Q4_0.gguf", "zephyr"),
        ("teknium_openhermes-2.5-mistral-7b", "chatml"),
        ("openhermes-2-mistral-7b.Q5_K_M", "chatml"),
        ("ehartford_dolphin-2.1-mistral-7b", "chatml"),
        ("cognitivecomputations_dolphin-2.2.1-mistral-7b", "chatml"),
        ("Llama-2-13b-chat-hf", "llama-2"),
    ],
)
def test_templates_by_the_name_of_the_model(tmp_path: Path, name: str, template: str) -> None:
    controls = {"mistral-v3": ["[INST]"], "chatml": ["<|im_start|>"]}.get(template, [])
    named = model_file(tmp_path, "some.gguf", controls, name=name)
    found = load_template(named, load_tokenizer(named), None)
    assert found.name == template
    assert found.reason == f"the model file has none, its name is {name}"
    # What the file is called counts where the metadata say nothing of use.
    called = model_file(tmp_path, f"{name}.Q4_0.gguf", controls, name="LLaMA v2")
    found = load_template(called, load_tokenizer(called), None)
    assert (found.name, found.reason[-10:]) == (template, ".Q4_0.gguf")


def test_template_by_the_parts_of_a_name(tmp_path: Path) -> None:
    parts = {"basename": "Mistral", "size_label": "7B", "finetune": "Instruct", "version": "v0.2"}
    file = model_file(tmp_path, **parts)
    template = load_template(file, load(small_vocabulary()), None)
    assert template.name == "mistral-v1"
    assert template.reason.endswith(" its name is Mistral-7B-Instruct-v0.2")


@pytest.mark.parametrize(
    "name",
    [
        "Mistral-7B-v0.1",
        "mistral-7b-v0.3",
        "Llama-2-7b-hf",
        "mistral-7b-instruct-v0.25",
        "dolphin-llama2-7b",
        "notzephyr-7b-beta",
        # Of these the vocabulary lacks a control token.
        "Mistral-7B-Instruct-v0.3",
        "openhermes-2.5-mistral-7b",
        "dolphin-2.6-mistral-7b",
    ],
)
def test_models_without_a_template(tmp_path: Path, name: str) -> None:
    file = model_file(tmp_path, "some.gguf", name=name)
    with pytest.raises(ChatTemplateError) as caught:
        load_template(file, load_tokenizer(file), None)
    said = str(caught.value)
    assert "some.gguf has no chat template" in said and "\n" not in said
    assert "`generate`" in said and "--template: mistral-v1, " in said


# Model files with a template that is broken.


@pytest.mark.parametrize(
    "template, reason",
    [
        ("a\nb{% for x in %}", "line 2: Expected an expression, got 'end of statement block' ("),
        ("x" * ((64 << 10) + 1), "is longer than 64 KiB ("),
        ("{% macro \x1b %}", r"line 1: unexpected char '\x1b' at 9 ("),
    ],
)
def test_a_broken_template_of_a_model_file(tmp_path: Path, template: str, reason: str) -> None:
    file = model_file(tmp_path, template=template)
    with pytest.raises(ModelFormatError) as caught:
        load_template(file, load(small_vocabulary()), None)
    start = f"{file.path}: tokenizer.chat_template: {reason}"
    assert str(caught.value).startswith(start)
    assert "`generate` works without it, --template chooses another" in str(caught.value)


def test_a_broken_template_refuses_chat_and_nothing_else(tmp_path: Path) -> None:
    path = variant(tmp_path / "broken.gguf", {"tokenizer.chat_template": "a\n{{ messages["})

    def run(*argv: str | Path) -> subprocess.CompletedProcess[bytes]:
        return child(*argv, stdin=None, input=b"Hello")

    refused = run("chat", path)
    assert (refused.returncode, refused.stdout) == (65, b"")
    assert refused.stderr.count(b"\n") == 1 and b"template: line 2: " in refused.stderr
    assert run("chat", path, "--template", "zephyr", "-n", "1").returncode == 0
    assert run("generate", path, "-p", PROMPT, "-n", "2").returncode == 0
    with LLM(path) as llm, pytest.raises(ModelFormatError, match="line 2: "):
        assert llm.generate(PROMPT, max_tokens=2).completion_tokens == 2
        llm.chat(USER)
