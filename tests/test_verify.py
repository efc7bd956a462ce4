"""The proof of a conversion finds what was broken, and nothing where nothing is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import outcome, random_weights, safetensors_bytes, write_checkpoint, write_json
from conftest import shared
from numpy.typing import NDArray

from cpuinfer import cli, convert, verify, verify_plot
from cpuinfer.gguf import open_gguf
from quant import plain
from quant.compare import BOUNDS, Errors, errors
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf
from quant.llama import SourceTensor
from quant.mixes import Wishes
from quant.source import read_source

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With a template, and norms near 1 as those of trained models, so that logits are tame."""
    directory = write_checkpoint(tmp_path)
    weights = random_weights()
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = np.abs(weights[name]) + 1
    (directory / "model.safetensors").write_bytes(safetensors_bytes(weights))
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    write_json(directory / "tokenizer_config.json", tokens | {"chat_template": TEMPLATE})
    return directory


def written(checkpoint: Path, mix: str = "F32") -> tuple[convert.Plan, Path]:
    plan = convert.plan(checkpoint, mix, Wishes())
    path = checkpoint.parent / "m.gguf"
    convert.run(plan, path, 2, lambda *_: None, lambda path: None)
    return plan, path


def examined(plan: convert.Plan, path: Path) -> verify.Report:
    return verify.examine(plan, path, 2, lambda *_: None)


def rewrite(
    path: Path, keys: dict[str, Any], change: Callable[[str, NDArray[np.uint8]], None]
) -> None:
    """The file with other keys and with bytes of its tensors changed."""
    file = open_gguf(path)
    tensors = []
    for tensor in file.tensors.values():
        data = tensor.data.copy()
        change(tensor.name, data)
        tensors.append((tensor.name, tensor.qtype, data.reshape(*tensor.shape[:-1], -1)))
    write_gguf(path, {**file.metadata, **keys}, tensors)


@pytest.mark.parametrize("mix", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_a_right_file_has_no_faults(checkpoint: Path, mix: str) -> None:
    plan, path = written(checkpoint, mix)
    report = examined(plan, path)
    assert report["faults"] == []
    verify.check(report)
    assert [tensor["name"] for tensor in report["tensors"]] == list(open_gguf(path).tensors)
    assert report["vocabulary"]["compared"] > 20
    assert report["template"] == {"compared": 3, "refused": 0, "differ": []}
    if mix == "F32":
        assert report["logits"]["same_argmax"] == report["logits"]["tokens"] == 40


def test_a_changed_weight_is_found(checkpoint: Path) -> None:
    plan, path = written(checkpoint)

    def change(name: str, data: NDArray[np.uint8]) -> None:
        if name == "blk.1.ffn_up.weight":
            data.view(np.float32)[3, 5] += 0.001

    rewrite(path, {}, change)
    (fault,) = examined(plan, path)["faults"]
    assert fault.startswith("blk.1.ffn_up.weight: relative error")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_named(checkpoint: Path, value: float) -> None:
    plan, path = written(checkpoint)

    def change(name: str, data: NDArray[np.uint8]) -> None:
        if name == "blk.0.attn_v.weight":
            data.view(np.float32)[3, 5] = value

    rewrite(path, {}, change)
    report = examined(plan, path)
    assert report["faults"] == ["blk.0.attn_v.weight: 1 values are no finite numbers"]
    with pytest.raises(verify.Unproven, match=r"blk\.0\.attn_v\.weight: 1 values are no finite"):
        verify.check(report)


def test_rows_in_the_wrong_order_are_found(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q and k as Hugging Face orders them: each tensor is its source, and the model another one."""
    plan = convert.plan(checkpoint, "F32", Wishes())
    wrong = tuple(
        replace(c, tensor=replace(c.tensor, head_dim=0) if c.tensor.head_dim else c.tensor)
        for c in plan.conversions
    )
    plan = replace(plan, conversions=wrong)
    path = checkpoint.parent / "m.gguf"
    convert.run(plan, path, 2, lambda *_: None, lambda path: None)
    report = examined(plan, path)
    assert not any(tensor["relative_error"] for tensor in report["tensors"])
    (fault,) = report["faults"]
    assert fault.startswith("logits: relative error")


def test_another_vocabulary_is_found(checkpoint: Path) -> None:
    """A score that makes another merge come first; a piece with another text."""
    plan, path = written(checkpoint)
    scores = open_gguf(path).array("tokenizer.ggml.scores", np.float32).copy()
    scores[259:600] = scores[259:600][::-1]
    rewrite(path, {"tokenizer.ggml.scores": scores}, lambda name, data: None)
    report = examined(plan, path)
    assert report["vocabulary"]["differ"]
    assert any(fault.startswith("vocabulary: ") for fault in report["faults"])


@pytest.mark.parametrize(
    "keys",
    [
        {"tokenizer.chat_template": TEMPLATE.replace("bos", "eos")},
        {"tokenizer.ggml.bos_token_id": 2},
    ],
)
def test_another_template_is_found(checkpoint: Path, keys: dict[str, Any]) -> None:
    plan, path = written(checkpoint)
    rewrite(path, keys, lambda name, data: None)
    report = examined(plan, path)
    assert len(report["template"]["differ"]) == 3
    assert any(fault.startswith("template: ") for fault in report["faults"])


@pytest.mark.parametrize(
    ("template", "compared"),
    [
        ("{{ raise_exception('no') }}", 0),
        ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}", 2),
    ],
)
def test_what_a_template_refuses_or_leaves_out(
    checkpoint: Path, template: str, compared: int
) -> None:
    """Is no fault of the file: the engine then tries a plainer conversation."""
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": template})
    report = examined(*written(checkpoint))
    assert report["template"] == {"compared": compared, "refused": 3 - compared, "differ": []}
    assert report["faults"] == []


def test_a_file_that_is_not_right_does_not_appear(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user wants it all the same."""
    whole = SourceTensor.rows

    def rows(self: SourceTensor, start: int, end: int) -> NDArray[np.float32]:
        monkeypatch.setattr(SourceTensor, "rows", whole)  # once, when the file is written
        values: NDArray[np.float32] = -whole(self, start, end)
        return values

    monkeypatch.setattr(SourceTensor, "rows", rows)
    output = checkpoint.parent / "out.gguf"
    code, error = outcome(capfd, checkpoint, output, "--threads", "1")
    assert code == 65
    assert "token_embd.weight: relative error 2, more than F16 explains (0.001)" in error
    assert "--no-verify" in error
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    monkeypatch.setattr(SourceTensor, "rows", rows)
    assert cli.main(["convert", str(checkpoint), str(output), "--no-verify"]) == 0
    assert output.exists()


def test_report_for_people(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = checkpoint.parent / "m.gguf"
    assert cli.main(["convert", str(checkpoint), str(output), "--type", "q8_0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("verified 13 Q8_0: relative error 0.00") for line in lines)
    assert any(line.endswith("texts split and joined alike") for line in lines)
    assert "template: 3 of 3 conversations rendered alike" in lines
    assert any(line.startswith("logits: relative error 0.0") for line in lines)
    assert lines[-1].startswith(f"{output}: ")


def test_plot(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output, picture = checkpoint.parent / "m.gguf", checkpoint.parent / "errors.png"
    options = ["--type", "q8_0", "--plot", str(picture), "--json"]
    assert cli.main(["convert", str(checkpoint), str(output), *options]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    tensors = json.loads(capsys.readouterr().out)["verification"]["tensors"]
    layers, others = verify_plot.series(tensors)
    assert set(others) == {"token_embd"}
    assert {kind: [layer for layer, _ in points] for kind, points in layers.items()} == {
        kind: [0, 1]
        for kind in (
            *("attn_q", "attn_k", "attn_v", "attn_output"),
            *("ffn_gate", "ffn_up", "ffn_down"),
        )
        if kind != "ffn_down"  # F16, and exact in it
    }
    assert sorted(checkpoint.parent.iterdir()) == sorted([checkpoint, output, picture])


# The plain pass and the errors themselves


@pytest.mark.parametrize("model", ["mistral-window", "mistral-full"])
def test_plain_pass_is_transformers_own(model: str) -> None:
    source = shared(f"hf/{model}")
    reference = np.load(source / "reference.npz")
    logits = plain.logits(read_source(source), reference["ids"].tolist())
    np.testing.assert_allclose(logits[:, reference["columns"]], reference["logits"], atol=5e-5)
    np.testing.assert_array_equal(logits.argmax(axis=1), reference["argmax"])


def test_errors() -> None:
    """3 and 4 against 3 and 5; values that are no numbers are counted alone."""
    source = np.array([[3.0, 4.0]], np.float32)
    found = errors(source, np.array([[3.0, 5.0]], np.float32))
    assert found == Errors(25.0, 1.0, 1.0, 0)
    assert found.relative == pytest.approx(0.2)
    bad = errors(source, np.array([[np.nan, 4.0]], np.float32))
    assert bad == Errors(16.0, 0.0, 0.0, 1)
    assert errors(source, np.full((1, 2), np.inf, np.float32)) == Errors(n_bad=2)
    both = found + bad
    assert both == Errors(41.0, 1.0, 1.0, 1)
    assert Errors().relative == 0
    assert Errors(0.0, 1.0, 1.0).relative == np.inf


def test_every_type_has_a_bound() -> None:
    assert set(BOUNDS) == set(GGMLType)
