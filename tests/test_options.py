"""Command lines -> the parameters of SamplingParams and of LLM."""

import dataclasses
import inspect
import math

import pytest

from cpuinfer import options
from cpuinfer.llm import LLM
from cpuinfer.sampling import SamplingParams


def test_what_is_not_given_is_left_to_the_defaults() -> None:
    arguments = options.parse(["generate"])
    assert options.sampling(arguments) == {}
    assert options.loading(arguments) == {"kv_type": "f16"}
    assert inspect.signature(LLM).parameters["kv_type"].default == "f16"


def test_every_parameter_has_an_option() -> None:
    line = (
        "generate m.gguf -n 5 --temperature 0.5 --top-k 3 --top-p 0.4 --min-p 0.1 --typical-p 0.9 "
        "--repeat-penalty 1.1 --repeat-last-n -1 --frequency-penalty -0.5 --presence-penalty 0.2 "
        "--logit-bias 3=-inf --logit-bias 4=1.5 --seed 9 --stop a --stop=-b --logprobs 2 "
        "--ignore-eos --context-length 64 --threads 3 --sliding-window 16 --kv-type f32 "
        "--no-speculation"
    )
    arguments = options.parse(line.split())
    given = options.sampling(arguments)
    assert set(given) == {field.name for field in dataclasses.fields(SamplingParams)}
    assert SamplingParams(**given) == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.4,
        min_p=0.1,
        typical_p=0.9,
        repeat_penalty=1.1,
        repeat_last_n=-1,
        frequency_penalty=-0.5,
        presence_penalty=0.2,
        logit_bias={3: -math.inf, 4: 1.5},
        seed=9,
        stop=["a", "-b"],
        logprobs=2,
        ignore_eos=True,
    )
    assert options.loading(arguments) == {
        "context_length": 64,
        "threads": 3,
        "sliding_window": 16,
        "kv_type": "f32",
        "speculation": False,
    }


def test_force_is_of_the_memory_where_nothing_is_replaced() -> None:
    for line in ("generate --force", "bench --force", "perplexity -f x --force"):
        assert options.loading(options.parse(line.split()))["force"] is True, line
    replaced = options.parse(["imatrix", "-f", "x", "--force"])
    assert "force" not in options.loading(replaced) and replaced.force


@pytest.mark.parametrize("window", ["auto", "off"])
def test_words_for_the_window(window: str) -> None:
    arguments = options.parse(["inspect", "m.gguf", "--sliding-window", window])
    assert options.loading(arguments)["sliding_window"] == window


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    params = SamplingParams()
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_last_n"):
        option = f"--{name.replace('_', '-')} "
        after = shown[shown.rindex(option) :]
        assert f"(default: {getattr(params, name):g})" in after[:120], name
