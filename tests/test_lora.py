"""LoRA adapters: what they add at run time, merged models, files that do not fit."""

import ctypes
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import reference
from command import DEMO, PROMPT, run
from conftest import TINY, dequantized, llama_metadata, llama_tensors
from numpy.typing import NDArray

from cpuinfer import LLM, lora, machine, requantize
from cpuinfer.config import ModelConfig
from cpuinfer.gguf import GGUFFile, ModelFormatError, open_gguf
from cpuinfer.merge import plan_merge
from cpuinfer.models.llama import Llama, Span
from cpuinfer.plan import memory_plan
from quant import dequantize, quantize
from quant.ggml_types import GGMLType
from quant.gguf_writer import write_gguf

Floats = NDArray[np.float32]
Keys = dict[str, Any]

KEYS: Keys = {
    "general.type": "adapter",
    "general.architecture": "llama",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
}
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, 40).astype(np.int32)


@dataclass
class Made:
    """An adapter's file and what it says of each matrix: A (rank, cols), B (rows, rank)."""

    path: Path
    factors: dict[str, tuple[Floats, Floats]]

    def gain(self, name: str, strength: float) -> NDArray[np.float64]:
        """What the matrix gains, in double precision."""
        a, b = (factor.astype(np.float64) for factor in self.factors[name])
        return strength * b @ a


def make(
    path: Path,
    model: GGUFFile,
    names: list[str] | None = None,
    rank: int = 3,
    seed: int = 0,
    keys: Keys | None = None,
    qtype: GGMLType = GGMLType.F32,
) -> Made:
    """An adapter for these matrices of a model (all of them); A has the type `qtype`."""
    rng = np.random.default_rng(seed)
    factors, tensors = {}, []
    for name in names or [name for name, t in model.tensors.items() if len(t.shape) == 2]:
        rows, cols = model.tensors[name].shape
        a = (0.3 / np.sqrt(rank) * rng.standard_normal((rank, cols))).astype(np.float32)
        b = (0.3 * rng.standard_normal((rows, rank))).astype(np.float32)
        packed = quantize(a, qtype)
        a = dequantize(packed, qtype)
        factors[name] = a, b
        if name == "token_embd.weight":  # transposed: (rows, rank) and (cols, rank)
            packed, b = quantize(b, GGMLType.F32), np.ascontiguousarray(a.T)
        kind = GGMLType.F32 if name == "token_embd.weight" else qtype
        tensors += [(f"{name}.lora_a", kind, packed), (f"{name}.lora_b", GGMLType.F32, b)]
    write_gguf(path, KEYS if keys is None else keys, tensors)
    return Made(path, factors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    """Random F32 weights with an output matrix of their own."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, llama_metadata(TINY), llama_tensors(TINY, output=GGMLType.F32))
    return open_gguf(path)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in F32, with an output matrix of its own."""
    file = open_gguf(DEMO)
    values = {name: dequantize(t.data, t.qtype) for name, t in file.tensors.items()}
    values |= {"output.weight": values["token_embd.weight"]}
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    tensors = [
        (name, GGMLType.F32, x[0] if name.endswith("norm.weight") else x)
        for name, x in values.items()
    ]
    write_gguf(path, file.metadata, tensors)
    return path


def opened(model: GGUFFile, path: Path, scale: float = 1.0) -> lora.Adapter:
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    return lora.open_adapter(path, scale, "llama", shapes)


def loaded(model: GGUFFile, *adapters: lora.Adapter, threads: int = 1) -> Llama:
    config = ModelConfig.from_gguf(model)
    return Llama(model, config, "f32", threads, adapters=adapters)


def logits(model: Llama, chunk: int = len(IDS)) -> Floats:
    """Every row, `chunk` tokens a pass."""
    cache = model.make_cache()
    parts = (IDS[start : start + chunk] for start in range(0, len(IDS), chunk))
    return np.concatenate([model.forward([Span(part, cache, len(part))]) for part in parts])


def weights(model: GGUFFile) -> dict[str, NDArray[np.float64]]:
    return {
        name: dequantized(t.data, t.qtype).reshape(t.shape) for name, t in model.tensors.items()
    }


# At run time


def test_logits_are_those_of_the_changed_weights(tiny: GGUFFile, tmp_path: Path) -> None:
    one = make(tmp_path / "one", tiny, rank=3, seed=1)
    other = make(tmp_path / "other", tiny, ["blk.1.attn_v.weight", "output.weight"], 20, seed=2)
    changed = weights(tiny)
    for name in changed:
        if name in one.factors:
            changed[name] += one.gain(name, 0.5 * 8 / 3)
        if name in other.factors:
            changed[name] += other.gain(name, -2 * 8 / 20)
    adapters = opened(tiny, one.path, 0.5), opened(tiny, other.path, -2)
    got = logits(loaded(tiny, *adapters))
    want = reference.logits(TINY, changed, IDS.tolist())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(logits(loaded(tiny)) - want).max() > 0.1 * np.abs(want).max()


@pytest.mark.parametrize("name", ["token_embd", "output", "blk.0.attn_k", "blk.1.ffn_down"])
def test_each_matrix_alone(name: str, tiny: GGUFFile, tmp_path: Path) -> None:
    name += ".weight"
    made = make(tmp_path / "a", tiny, [name], rank=5)
    changed = weights(tiny)
    changed[name] += made.gain(name, 8 / 5)
    got = logits(loaded(tiny, opened(tiny, made.path)))
    want = reference.logits(TINY, changed, IDS.tolist())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("chunk", "threads"), [(1, 1), (7, 3), (len(IDS), 2)])
def test_bits_depend_on_neither_chunks_nor_threads(
    chunk: int, threads: int, tiny: GGUFFile, tmp_path: Path
) -> None:
    adapter = opened(tiny, make(tmp_path / "a", tiny, rank=20).path)
    once = logits(loaded(tiny, adapter))
    np.testing.assert_array_equal(logits(loaded(tiny, adapter, threads=threads), chunk), once)


@pytest.mark.parametrize("qtype", [GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_adapters_of_other_types(qtype: GGMLType, tiny: GGUFFile, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    made = make(tmp_path / "a", tiny, [name], rank=2, qtype=qtype)
    changed = weights(tiny)
    changed[name] += made.gain(name, 8 / 2)
    got = logits(loaded(tiny, opened(tiny, made.path)))
    want = reference.logits(TINY, changed, IDS.tolist())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_alpha_0_stands_for_the_rank(tiny: GGUFFile, tmp_path: Path) -> None:
    zero = make(tmp_path / "zero", tiny, rank=4, keys=KEYS | {"adapter.lora.alpha": 0.0})
    four = make(tmp_path / "four", tiny, rank=4, keys=KEYS | {"adapter.lora.alpha": 4.0})
    got, want = (logits(loaded(tiny, opened(tiny, made.path))) for made in (zero, four))
    np.testing.assert_array_equal(got, want)


def test_a_of_one_row_may_have_one_dimension(tiny: GGUFFile, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    made = make(tmp_path / "a", tiny, [name], rank=1)
    a, b = made.factors[name]
    tensors = [(f"{name}.lora_a", GGMLType.F32, a[0]), (f"{name}.lora_b", GGMLType.F32, b)]
    write_gguf(tmp_path / "flat", KEYS, tensors)
    got, want = (logits(loaded(tiny, opened(tiny, tmp_path / path))) for path in ("flat", "a"))
    np.testing.assert_array_equal(got, want)


def test_quantized_matrices_gain_the_same(tiny: GGUFFile, tmp_path: Path) -> None:
    """Of activations that 8 bits hold exactly the products are exact, but for single precision."""
    path = tmp_path / "q.gguf"
    write_gguf(path, llama_metadata(TINY), llama_tensors(TINY, GGMLType.Q8_0))
    model = open_gguf(path)
    name = "blk.0.attn_k.weight"
    made = make(tmp_path / "a", model, [name])
    plain, changed = loaded(model), loaded(model, opened(model, made.path))
    x = np.random.default_rng(1).integers(-127, 128, (5, TINY.dim)).astype(np.float32)
    x[:, ::32] = 127
    before = plain.blk[0].attn_q_k_v.multiply(x, None)
    after = changed.blk[0].attn_q_k_v.multiply(x, None)
    want = x.astype(np.float64) @ made.gain(name, 8 / 3).T
    np.testing.assert_allclose(after[1] - before[1], want, rtol=0, atol=1e-5 * abs(want).max())
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[2], before[2])


# Files that do not fit


def refused(tiny: GGUFFile, path: Path, tensors: list[Any], keys: Keys = KEYS) -> str:
    write_gguf(path, keys, tensors)
    with pytest.raises(ModelFormatError) as error:
        opened(tiny, path)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.type", "model", "'model', expected 'adapter'"),
        ("general.type", None, "missing, expected 'adapter'"),
        ("adapter.type", "dora", "'dora', expected 'lora'"),
        ("general.architecture", "qwen2", "'qwen2', expected 'llama'"),
        ("adapter.lora.alpha", None, "the key is missing"),
        ("adapter.lora.alpha", float("nan"), "expected a finite number"),
        ("adapter.alora.invocation_tokens", np.array([1], np.uint32), "not supported"),
    ],
)
def test_keys_that_are_wrong(
    key: str, value: object, message: str, tiny: GGUFFile, tmp_path: Path
) -> None:
    keys = {name: v for name, v in (KEYS | {key: value}).items() if v is not None}
    made = make(tmp_path / "a", tiny, keys=keys)
    with pytest.raises(ModelFormatError, match=message) as error:
        opened(tiny, made.path)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("matrix", "a", "b", "message"),
    [
        ("blk.2.attn_q.weight", (3, 64), (64, 3), "no matrix blk.2.attn_q.weight"),
        ("blk.0.attn_norm.weight", (3, 64), (64, 3), "no matrix blk.0.attn_norm.weight"),
        ("blk.0.attn_k.weight", (3, 64), (64, 3), r"expected (3, 64) and (32, 3)"),
        ("blk.0.attn_k.weight", (4, 64), (32, 3), r"expected (3, 64) and (32, 3)"),
        ("blk.0.attn_k.weight", (64, 3), (3, 32), r"expected (32, 64) and (32, 32)"),
        ("token_embd.weight", (3, 64), (50, 3), r"expected (50, 3) and (64, 3)"),
        ("blk.0.attn_k.weight", (3, 64), None, "there is no blk.0.attn_k.weight.lora_b"),
        ("blk.0.attn_k.weight", None, (32, 3), "there is no blk.0.attn_k.weight.lora_a"),
    ],
)
def test_tensors_that_do_not_fit(
    matrix: str,
    a: tuple[int, ...] | None,
    b: tuple[int, ...] | None,
    message: str,
    tiny: GGUFFile,
    tmp_path: Path,
) -> None:
    shapes = {f"{matrix}.lora_a": a, f"{matrix}.lora_b": b}
    tensors = [
        (name, GGMLType.F32, np.ones(shape, np.float32)) for name, shape in shapes.items() if shape
    ]
    assert message in refused(tiny, tmp_path / "a", tensors)


@pytest.mark.parametrize(("a", "b"), [([64, 0], [0, 32]), ([64, 1], [])])
def test_factors_without_a_rank(a: list[int], b: list[int], tiny: GGUFFile, tmp_path: Path) -> None:
    keys = [
        gguf_files.key(key, gguf_files.F32 if isinstance(v, float) else gguf_files.STRING, v)
        for key, v in KEYS.items()
    ]
    name, end = "blk.0.attn_k.weight", 4 * int(np.prod(a))
    tensors = [
        gguf_files.tensor(f"{name}.lora_a", a),
        gguf_files.tensor(f"{name}.lora_b", b, offset=end),
    ]
    path = tmp_path / "a"
    path.write_bytes(gguf_files.gguf(keys, tensors, bytes(end + 4)))
    with pytest.raises(ModelFormatError, match="shapes .* expected"):
        opened(tiny, path)


def test_other_tensors_are_refused(tiny: GGUFFile, tmp_path: Path) -> None:
    norm = ("blk.0.attn_norm.weight", GGMLType.F32, np.ones(64, np.float32))
    assert "blk.0.attn_norm.weight" in refused(tiny, tmp_path / "a", [norm])
    assert "there are none" in refused(tiny, tmp_path / "b", [])


def test_a_tied_embedding_cannot_be_adapted(tiny: GGUFFile, tmp_path: Path) -> None:
    path = tmp_path / "tied.gguf"
    write_gguf(path, llama_metadata(TINY), llama_tensors(TINY))
    for name, reason in (("token_embd", "same matrix"), ("output", "no matrix output.weight")):
        made = make(tmp_path / name, tiny, [f"{name}.weight"])
        with pytest.raises(ModelFormatError, match=reason):
            opened(open_gguf(path), made.path)


def test_values_that_are_no_numbers(tiny: GGUFFile, tmp_path: Path) -> None:
    name = "blk.0.attn_k.weight"
    made = make(tmp_path / "a", tiny, [name])
    a, b = made.factors[name]
    b[3, 1] = np.nan
    tensors = [(f"{name}.lora_a", GGMLType.F32, a), (f"{name}.lora_b", GGMLType.F32, b)]
    write_gguf(made.path, KEYS, tensors)
    with pytest.raises(ModelFormatError, match=r"blk\.0\.attn_k\.weight\.lora_b.*no number"):
        loaded(tiny, opened(tiny, made.path))
    other = make(tmp_path / "b", tiny, [name])
    with pytest.raises(ModelFormatError, match=r"a value times .*e\+300 is infinite"):
        loaded(tiny, opened(tiny, other.path, 1e300))


# The class and the command line


def test_scales(demo: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    ids = list(range(3, 20))

    def of(*adapters: Any) -> Floats:
        with LLM(demo, kv_type="f32", lora=adapters) as llm:
            return llm.logits(ids)

    np.testing.assert_array_equal(of((made.path, 0.0)), of())
    np.testing.assert_array_equal(of(made.path), of((made.path, 1.0)))
    assert np.abs(of(made.path) - of()).max() > 0.1
    twice = of((made.path, 0.25), (made.path, 0.25))
    np.testing.assert_allclose(twice, of((made.path, 0.5)), rtol=0, atol=1e-4)


def test_a_text_with_an_adapter(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    words = ["generate", demo, "-p", PROMPT, "-n", "20", "--temperature", "0"]
    with LLM(demo, lora=[(made.path, 0.5)]) as llm:
        expected = llm.generate(PROMPT, max_tokens=20, temperature=0).text
    found = run(capsys, *words, "--lora", f"{made.path}:0.5")
    assert (found.code, found.out) == (0, f"{PROMPT}{expected}\n")
    assert run(capsys, *words).out != found.out
    assert run(capsys, *words, "--lora", f"{made.path}:0").out == run(capsys, *words).out


def test_perplexity_with_an_adapter(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. " * 20, encoding="utf-8")
    words = ["perplexity", demo, "-f", text, "--ctx", "32", "--chunks", "2", "--json"]

    def of(*more: str) -> float:
        found = run(capsys, *words, *more)
        assert found.code == 0
        value: float = json.loads(found.out)["perplexity"]["value"]
        return value

    plain, none, some = of(), of("--lora", f"{made.path}:0"), of("--lora", f"{made.path}")
    assert plain == none and abs(some - plain) > 0.01 * plain


def test_memory_is_planned_with_the_adapters(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_gguf(demo)
    made = make(tmp_path / "a.gguf", file, rank=8)
    nbytes = 4 * sum(a.size + b.size for a, b in made.factors.values())
    alone = memory_plan(file, ModelConfig.from_gguf(file), "f16", 64).total
    for available, lora_fits in ((alone + nbytes, True), (alone + nbytes - 1, False)):
        monkeypatch.setattr(machine, "memory_available", lambda there=available: there)
        LLM(demo, context_length=64).close()
        if lora_fits:
            LLM(demo, context_length=64, lora=[made.path]).close()
        else:
            with pytest.raises(machine.NotEnoughMemory):
                LLM(demo, context_length=64, lora=[made.path])


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("{a}:nan", 2, "must be finite"),
        ("{a}:x", 66, "No such file"),
        ("{model}", 65, "expected 'adapter'"),
        ("{directory}", 66, "directory"),
    ],
)
def test_adapters_that_cannot_be_used(
    given: str,
    code: int,
    message: str,
    demo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    adapter = given.format(a=made.path, model=demo, directory=tmp_path)
    found = run(capsys, "generate", demo, "-p", PROMPT, "--lora", adapter)
    assert (found.code, found.out, found.err.count("\n")) == (code, "", 1)
    assert message in found.err


# Merging


def merged(model: GGUFFile, out: Path, *adapters: lora.Adapter, mix: str | None = None) -> GGUFFile:
    requantize.run(plan_merge(model, adapters, mix), out, 2, lambda *_: None)
    return open_gguf(out)


def test_logits_of_a_merged_model(tiny: GGUFFile, tmp_path: Path) -> None:
    one = opened(tiny, make(tmp_path / "one", tiny, seed=1).path, 0.5)
    other = opened(tiny, make(tmp_path / "other", tiny, rank=9, seed=2).path)
    want = logits(loaded(tiny, one, other))
    got = logits(loaded(merged(tiny, tmp_path / "m", one, other)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("qtype", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_tensors_keep_their_type(qtype: GGMLType, tmp_path: Path) -> None:
    path = tmp_path / "q.gguf"
    write_gguf(path, llama_metadata(TINY), llama_tensors(TINY, qtype))
    model, name = open_gguf(path), "blk.1.attn_output.weight"
    made = make(tmp_path / "a", model, [name])
    after = merged(model, tmp_path / "m", opened(model, made.path))
    assert dict(after.metadata) == dict(model.metadata)
    assert list(after.tensors) == list(model.tensors)
    for other, tensor in model.tensors.items():
        assert after.tensors[other].qtype is tensor.qtype
        if other != name:
            np.testing.assert_array_equal(after.tensors[other].data, tensor.data)
    want = weights(model)[name] + made.gain(name, 8 / 3)
    assert after.tensors[name].data.tobytes() == quantize(want.astype(np.float32), qtype).tobytes()


def test_another_type(tiny: GGUFFile, tmp_path: Path) -> None:
    made = make(tmp_path / "a", tiny)
    after = merged(tiny, tmp_path / "m", opened(tiny, made.path), mix="Q8_0")
    name = "blk.0.attn_q.weight"
    assert after.tensors[name].qtype is GGMLType.Q8_0
    want = weights(tiny)[name] + made.gain(name, 8 / 3)
    step = np.abs(want).max() / 127
    np.testing.assert_allclose(weights(after)[name], want, rtol=0, atol=0.51 * step)


def test_the_command(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    out = tmp_path / "out.gguf"
    found = run(capsys, "merge", demo, f"{made.path}:0.5", out, "--json")
    assert (found.code, found.err) == (0, "")
    report = json.loads(found.out)
    assert report["adapters"] == [{"file": str(made.path), "scale": 0.5, "tensors": 30}]
    assert (report["changed"], report["tensors"]) == (30, 39)
    ids = list(range(3, 20))
    with LLM(out, kv_type="f32") as one, LLM(demo, kv_type="f32", lora=[(made.path, 0.5)]) as other:
        got, want = one.logits(ids), other.logits(ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_outputs_that_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    for path in (demo, made.path):
        before = path.read_bytes()
        found = run(capsys, "merge", demo, made.path, path, "--force")
        assert found.code == 2 and "input and output are the same file" in found.err
        assert path.read_bytes() == before
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    assert run(capsys, "merge", demo, made.path, out).code == 73
    assert out.read_text() == "mine"
    assert run(capsys, "merge", demo, made.path, out, "--force").code == 0
    assert run(capsys, "merge", demo, made.path, out, "--force", "--threads", "0").code == 2


def test_a_failure_leaves_nothing(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that F16 cannot hold."""
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    found = run(capsys, "merge", demo, f"{made.path}:1e9", tmp_path / "out", "--type", "F16")
    assert found.code == 65 and "F16 cannot hold" in found.err and found.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [made.path]


def test_merging_into_quantized_weights_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "blk.0.attn_q.weight"
    made = make(tmp_path / "a.gguf", open_gguf(DEMO), [name])
    found = run(capsys, "merge", DEMO, made.path, tmp_path / "out.gguf")
    assert found.code == 0 and "1 tensors of" in found.err and "quantized already" in found.err


# llama.cpp, where it is installed


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[Any]:
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    silent = module.llama_log_callback(lambda *_: None)
    module.llama_log_set(silent, ctypes.c_void_p(0))
    yield module
    module.llama_log_set(ctypes.cast(None, module.llama_log_callback), ctypes.c_void_p(0))


def test_logits_are_llama_cpp_s(llama_cpp: Any, demo: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo), rank=16)
    ids = np.random.default_rng(2).integers(3, 2000, 60).tolist()
    theirs = llama_cpp.Llama(
        str(demo),
        n_ctx=64,
        logits_all=True,
        lora_path=str(made.path),
        lora_scale=0.5,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    theirs.eval(ids)
    want = np.array(theirs.scores[: len(ids)])
    theirs.close()
    with LLM(demo, kv_type="f32", lora=[(made.path, 0.5)]) as llm:
        got = llm.logits(ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max())


def test_keys_and_values_are_told_apart_by_adapters_and_their_scales(
    demo: Path, tmp_path: Path
) -> None:
    made = make(tmp_path / "a.gguf", open_gguf(demo))
    keys = set()
    for adapters in ([], [(made.path, 0.5)], [(made.path, 1.0)]):
        with LLM(demo, lora=adapters) as llm:
            keys.add(llm.key)
    assert len(keys) == 3
