"""Perplexity and KL divergence: the formulae, the positions that count, the command."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import DEMO, Result, child, run, variant
from conftest import shared
from numpy.typing import NDArray

from cpuinfer import LLM, perplexity
from cpuinfer.models.llama import CHUNK
from cpuinfer.perplexity import Estimate, Unsuitable
from cpuinfer.progress import Progress
from cpuinfer.tokenizer import Tokenizer
from tools import perplexity as perplexity_tool

TEXT = "The old man’s house stood by the sea. Nobody had lived there for 30 years. " * 60


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with LLM(DEMO) as llm:
        return llm.tokenizer


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def logits_of(*probs: list[float]) -> NDArray[np.float32]:
    """Logits with these probabilities, each row shifted by another constant."""
    shift = 7.0 * np.arange(len(probs))[:, None]
    return (np.log(probs) + shift).astype(np.float32)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """By way of log2, so as not to be the code that is tested."""
    x = logits.astype(np.float64) / math.log(2)
    return (x - np.logaddexp2.reduce(x, axis=1)[:, None]) * math.log(2)


# Formulae, by hand


def test_a_surprise_is_the_negative_logarithm_of_the_probability() -> None:
    logits = logits_of([0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.0625, 0.0625, 0.875])
    nll = perplexity.score(logits, np.array([0, 2, 1], np.int32))["nll"]
    assert nll == pytest.approx([math.log(2), math.log(8), math.log(16)], abs=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, -3e38], [-1e5, -1e5]], np.float32)
    nll = perplexity.score(logits, np.array([0, 1], np.int32))["nll"]
    assert nll == pytest.approx([0, math.log(2)])
    certain = perplexity.perplexity(np.array([1e4, 1e4]))
    assert certain["value"] == math.inf


def test_perplexity_and_its_uncertainty() -> None:
    # Nats of log 2 and log 8: their mean is log 4, their variance log(2)^2, over n - 1 = 1.
    found = perplexity.perplexity(np.log([2.0, 8.0]))
    assert found == pytest.approx({"value": 4, "uncertainty": 4 * math.log(2)})
    # Three times as many of each: over n - 1 = 5.
    found = perplexity.perplexity(np.log([2.0, 8.0] * 3))
    assert found == pytest.approx({"value": 4, "uncertainty": 4 * math.log(2) / math.sqrt(5)})


def test_divergence_from_the_base_of_one_token() -> None:
    logits, base = logits_of([0.25, 0.75]), logits_of([0.5, 0.5])
    there = perplexity.compare(logits, base, np.array([1], np.int32))
    assert there["kl"] == pytest.approx([0.5 * math.log(4 / 3)], abs=1e-6)
    assert there["nll"] == pytest.approx([math.log(4 / 3)], abs=1e-6)
    assert there["base_nll"] == pytest.approx([math.log(2)], abs=1e-6)
    back = perplexity.compare(base, logits, np.array([1], np.int32))
    assert back["kl"] == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], abs=1e-6)


def test_the_likeliest_tokens_are_compared() -> None:
    logits = logits_of([0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7])
    base = logits_of([0.8, 0.1, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4])
    found = perplexity.compare(logits, base, np.zeros(3, np.int32))
    assert found["same_top"].tolist() == [1, 0, 1]


def test_figures_of_a_divergence() -> None:
    kl = np.arange(201.0)  # 0 to 200: the 99th percentile is 198
    p, base_p = np.full(201, 0.5), np.full(201, 0.25)
    p[:2] = 0.75, 0.25
    same = np.arange(201) % 3 < 2  # 134 of 201
    found = perplexity.divergence(
        {"nll": -np.log(p), "base_nll": -np.log(base_p), "kl": kl, "same_top": 1.0 * same}
    )
    assert found["kl_divergence"] == pytest.approx(
        {
            "value": 100,
            "uncertainty": math.sqrt((201**2 - 1) / 12 / 200),
            "median": 100,
            "percentile_99": 198,
            "maximum": 200,
        }
    )
    agreement = {"value": 2 / 3, "uncertainty": math.sqrt(2 / 9 / 200)}
    assert found["same_top"] == pytest.approx(agreement)
    change = found["probability_change"]
    assert change["value"] == pytest.approx(0.25)
    assert change["uncertainty"] == pytest.approx(math.sqrt(2 * 0.25**2 / 201 / 200))


# Chunks


def test_chunks_begin_with_bos_and_what_is_left_over_goes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    rows = perplexity.split(tokenizer, TEXT, 100)
    assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:]
    assert rows.shape == (len(ids) // 100, 100) and len(ids) % 100
    assert (rows[:, 0] == tokenizer.bos_id).all()
    assert rows[:, 1:].tolist() == [ids[n + 1 : n + 100] for n in range(0, len(rows) * 100, 100)]


def test_a_model_without_bos_keeps_the_first_tokens(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_bos_token": False}
    with LLM(variant(tmp_path / "no_bos.gguf", keys)) as llm:
        rows = perplexity.split(llm.tokenizer, TEXT, 64)
        ids = llm.tokenizer.encode(TEXT)
    assert ids[0] != llm.tokenizer.bos_id
    assert rows.reshape(-1).tolist() == ids[: rows.size]


def test_two_chunks_are_the_least(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    half = len(ids) // 2
    assert len(perplexity.split(tokenizer, TEXT, half)) == 2
    with pytest.raises(Unsuitable, match=f"has {len(ids)} tokens.* at least {2 * half + 2}"):
        perplexity.split(tokenizer, TEXT, half + 1)
    with pytest.raises(ValueError, match="at least 8"):
        perplexity.split(tokenizer, TEXT, 7)


# Models


def scored(llm: LLM, rows: NDArray[np.int32]) -> NDArray[np.float64]:
    """(n, V) log-probabilities for the tokens after the first of each row's second half."""
    length = rows.shape[1]
    return np.concatenate(
        [log_softmax(llm.logits(row.tolist())[length // 2 : length - 1]) for row in rows]
    )


def targets(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    return rows[:, rows.shape[1] // 2 + 1 :].reshape(-1)


@pytest.mark.parametrize(
    "length",
    [
        64,  # one pass
        65,
        CHUNK + 1,  # the last token of all would be a pass of its own
        2 * CHUNK + 88,  # scored tokens begin within the second pass of three
    ],
)
def test_the_second_half_of_each_chunk_is_scored(length: int) -> None:
    with LLM(DEMO, context_length=length) as llm:
        rows = perplexity.split(llm.tokenizer, TEXT, length)[:3]
        report = perplexity.examine(llm, TEXT, chunks=len(rows))
        expected = -scored(llm, rows)[np.arange(len(targets(rows))), targets(rows)]
    count = len(rows) * (length - length // 2 - 1)
    assert (report["tokens"], report["chunks"]) == (count, len(rows)) and len(expected) == count
    assert report["perplexity"] == pytest.approx(
        {
            "value": math.exp(expected.mean()),
            "uncertainty": math.exp(expected.mean()) * expected.std() / math.sqrt(count - 1),
        },
        rel=1e-9,
    )


def test_all_chunks_are_read_unless_fewer_are_asked_for() -> None:
    calls: list[tuple[int, int, float]] = []
    with LLM(DEMO, context_length=64) as llm:
        n = len(perplexity.split(llm.tokenizer, TEXT, 64))
        whole = perplexity.examine(llm, TEXT, on_scored=lambda *call: calls.append(call))
        assert whole["chunks"] == n == perplexity.examine(llm, TEXT, chunks=n + 9)["chunks"]
        part = perplexity.examine(llm, TEXT, chunks=2)
    assert [done for done, _, _ in calls] == [31 * i for i in range(n + 1)]
    assert {total for _, total, _ in calls} == {31 * n}
    assert calls[2][2] == pytest.approx(part["perplexity"]["value"])
    assert calls[-1][2] == pytest.approx(whole["perplexity"]["value"])


def test_two_models_side_by_side(tmp_path: Path) -> None:
    keys = {"llama.rope.freq_base": 5000.0}
    path = variant(tmp_path / "other.gguf", keys)
    with LLM(DEMO, context_length=300) as llm, LLM(path, context_length=300) as base:
        report = perplexity.examine(llm, TEXT, chunks=2, base=base)
        alone = perplexity.examine(base, TEXT, chunks=2)
        rows = perplexity.split(llm.tokenizer, TEXT, 300)[:2]
        log_p, log_base = scored(llm, rows), scored(base, rows)
    assert report["base"]["model"] == str(path)
    assert report["base"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-9)
    kl = (np.exp(log_base) * (log_base - log_p)).sum(axis=1)
    found = report["kl_divergence"]
    assert kl.mean() > 1e-3 and found["value"] == pytest.approx(kl.mean(), rel=1e-9)
    assert found["maximum"] == pytest.approx(kl.max(), rel=1e-9)
    assert found["median"] == pytest.approx(np.sort(kl)[len(kl) // 2 - 1 : len(kl) // 2 + 1].mean())
    same = (log_p.argmax(axis=1) == log_base.argmax(axis=1)).mean()
    assert report["same_top"]["value"] == pytest.approx(same) and same < 1
    places = np.arange(len(kl)), targets(rows)
    change = np.exp(log_p[places]) - np.exp(log_base[places])
    assert report["probability_change"]["value"] == pytest.approx(change.mean(), rel=1e-9)


def test_a_model_does_not_differ_from_itself() -> None:
    with LLM(DEMO, context_length=64) as llm:
        report = perplexity.examine(llm, TEXT, chunks=3, base=llm)
    assert set(report["kl_divergence"].values()) == {0}
    assert report["same_top"] == {"value": 1, "uncertainty": 0}
    assert report["base"]["perplexity"] == report["perplexity"]


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
@pytest.mark.parametrize(
    ("model", "length"), [("models/stories260K.gguf", 128), (DEMO, 512)], ids=["stories", "demo"]
)
def test_the_perplexity_of_llama_cpp(model: str | Path, length: int, kv_type: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = shared(model) if isinstance(model, str) else model
    text = shared("text/wiki.test.raw").read_text(encoding="utf-8")[:20_000]
    kinds = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}
    kind: Any = kinds[kv_type]
    peer = llama_cpp.Llama(
        str(path), n_ctx=length, logits_all=True, type_k=kind, type_v=kind, verbose=False
    )
    ids = peer.tokenize(text.encode(), add_bos=True, special=False)
    nll: list[float] = []
    for start in range(0, len(ids) - length + 1, length):
        chunk = [peer.token_bos(), *ids[start + 1 : start + length]]
        peer.reset()
        peer.eval(chunk)
        places = range(length // 2, length - 1)
        log_probs = log_softmax(peer.scores[places.start : places.stop])
        nll += [-log_probs[i, chunk[place + 1]] for i, place in enumerate(places)]
    peer.close()
    # llama.cpp gives models of this architecture no window, even where the file has one.
    with LLM(path, length, sliding_window="off", kv_type=kv_type) as llm:  # type: ignore[arg-type]
        report = perplexity.examine(llm, text)
    assert report["tokens"] == len(nll)
    assert report["perplexity"]["value"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-3)


# The command


def document(result: Result) -> dict[str, Any]:
    assert result.code == 0 and result.err == "" and result.out.count("\n") == 1, result
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_the_command(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["perplexity", "-f", text_file, "--ctx", "64", "--chunks", "5", "--kv-type", "f32"]
    with LLM(DEMO, context_length=64, kv_type="f32") as llm:
        expected = perplexity.examine(llm, TEXT, chunks=5)
    assert document(run(capsys, *argv, "--json")) == {"text": str(text_file), **expected}
    value, uncertainty = expected["perplexity"].values()
    assert run(capsys, *argv, "--threads", "1") == Result(
        0,
        f"perplexity   {value:.4f} +/- {uncertainty:.5f}\nscored       155 tokens of 5 x 64\n",
        "",
    )


def test_the_command_with_a_base(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = variant(tmp_path / "other.gguf", {"llama.rope.freq_base": 5000.0})
    argv = ["perplexity", DEMO, "-f", text_file, "--ctx", "64", "--kl-divergence", other]
    found = document(run(capsys, *argv, "--json"))
    assert found["model"] == str(DEMO) and found["base"]["model"] == str(other)
    lines = run(capsys, *argv).out.splitlines()
    names = ["perplexity", "scored", "base", "KL", "same top", "change of p"]
    assert [line[:13].rstrip() for line in lines] == names
    assert str(other) in lines[2]
    assert f"{100 * found['same_top']['value']:.3f} +/- " in lines[4]


def test_chunks_have_512_tokens_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    result = child("perplexity", DEMO, "-f", "-", "--json", input=TEXT.encode(), stdin=None)
    found = json.loads(result.stdout)
    assert (found["context_length"], found["chunks"]) == (512, 2)
    shown = run(capsys, "perplexity", "--help")
    assert shown.code == 0 and "(default: 512)" in " ".join(shown.out.split())


def test_the_script(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(DEMO), "-f", str(text_file), "--ctx", "64", "--chunks", "1", "--json"]
    assert perplexity_tool.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 1


@pytest.mark.parametrize(
    ("code", "argv", "words"),
    [
        (2, [], ["--file"]),
        (2, ["-f", "TEXT", "--ctx", "7"], ["7"]),
        (2, ["-f", "TEXT", "--ctx", "2049"], ["context_length", "2049", "2048"]),
        (2, ["-f", "TEXT", "--ctx", "64", "--chunks", "0"], ["chunks", "0"]),
        (65, ["-f", "TEXT", "--ctx", "2048"], ["TEXT", "tokens", "4096"]),
        (65, ["-f", "MODEL"], ["MODEL", "UTF-8"]),
        (66, ["-f", "no-such-text"], ["no-such-text"]),
        (66, ["-f", "TEXT", "--kl-divergence", "no-such.gguf"], ["no-such.gguf"]),
        (65, ["-f", "TEXT", "--kl-divergence", "TEXT"], ["TEXT", "GGUF"]),
    ],
)
def test_what_is_refused(
    code: int,
    argv: list[str],
    words: list[str],
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"TEXT": str(text_file), "MODEL": str(DEMO)}
    result = run(capsys, "perplexity", *(names.get(word, word) for word in argv))
    assert (result.code, result.out) == (code, ""), result
    assert result.err.count("\n") == 1
    for word in words:
        assert names.get(word, word) in result.err


def test_models_with_other_tokens_are_not_compared(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(DEMO) as llm:
        scores = -np.arange(llm.tokenizer.vocab_size, dtype=np.float32)
    other = variant(tmp_path / "other.gguf", {"tokenizer.ggml.scores": scores[::-1].copy()})
    argv = ["perplexity", "-f", text_file, "--ctx", "64", "--kl-divergence"]
    result = run(capsys, *argv, other)
    assert result.code == 65 and "tokenizers split this text unalike" in result.err
    result = run(capsys, *argv, shared("models/stories260K.gguf"))
    assert result.code == 65 and "of 2048 and 512 tokens" in result.err, result


def test_logits_that_are_no_numbers(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(tmp_path / "nan.gguf", nan="output_norm.weight")
    result = run(capsys, "perplexity", path, "-f", text_file, "--ctx", "64")
    assert (result.code, result.out) == (65, "") and "no numbers" in result.err


# What a terminal shows


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_an_estimate_knows_the_time_left() -> None:
    stage = Estimate("perplexity", 50, 200, 1000.0, 1040.0, perplexity=6.25)
    assert stage.line(1040.0) == "perplexity 6.2500 of 50/200 tokens  ETA 0:02:00"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_estimates_are_drawn_on_terminals(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 100.1, 110.0])
    monkeypatch.setattr(perplexity.time, "monotonic", lambda: next(times))
    draw = perplexity.shown_on(Progress(stream))
    draw(0, 40, math.nan)
    draw(10, 40, 5.0)  # too soon
    draw(20, 40, 6.0)
    expected = "\rperplexity 6.0000 of 20/40 tokens  ETA 0:00:10" if stream.isatty() else ""
    assert stream.getvalue().rstrip(" ") == expected
