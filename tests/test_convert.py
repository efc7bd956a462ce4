"""`cpuinfer convert`: checkpoints in both forms become GGUF files, tensor by tensor."""

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import (
    DIM,
    HEAD_DIM,
    HIDDEN,
    MISTRAL_LAYER,
    PARAMS,
    VOCAB_KEYS,
    Weights,
    as_checkpoint,
    assert_is_the_tiny_vocabulary,
    edit_json,
    gguf_name,
    gguf_rows,
    metadata,
    random_weights,
    run,
    safetensors_bytes,
    write_checkpoint,
    write_json,
    write_shards,
)
from command import DEMO
from conftest import shared

from cpuinfer import LLM, cli, convert
from quant.compare import BOUNDS
from quant.ggml_types import GGMLType
from quant.mixes import MIXES, Wishes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_shards(write_checkpoint(tmp_path))


def read_safetensors(path: Path) -> Weights:
    """The BF16 weights of a file, by its description."""
    raw = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", raw)[0]
    weights = {}
    for name, info in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        assert info["dtype"] == "BF16"
        begin, end = info["data_offsets"]
        bits = np.frombuffer(raw[start + begin : start + end], "<u2").astype("<u4") << 16
        weights[name] = bits.view("<f4").reshape(info["shape"])
    return weights


def assert_same_tensors(
    reader: gguf.GGUFReader, source: Weights, head_dim: int, qtype: str, fallback: str = "F16"
) -> None:
    """Every tensor of the source and no other, bit for bit what gguf-py makes of its values."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {gguf_name(name) for name in source}
    for name, x in source.items():
        tensor = tensors[gguf_name(name)]
        kind = gguf.GGMLQuantizationType[qtype]
        if x.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif x.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType[fallback]
        assert tensor.tensor_type == kind, name
        assert tensor.shape.tolist() == list(x.shape[::-1]), name
        want = gguf.quants.quantize(gguf_rows(name, x, head_dim), kind)
        np.testing.assert_array_equal(tensor.data.view("u1"), want.view("u1"), err_msg=name)


@pytest.mark.parametrize("qtype", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize(("model", "head_dim"), [("mistral-window", 32), ("mistral-full", 64)])
def test_tensors_of_real_checkpoints(tmp_path: Path, model: str, head_dim: int, qtype: str) -> None:
    source = shared(f"hf/{model}")
    reader = run(source, tmp_path / "m.gguf", "--type", qtype)
    weights = read_safetensors(source / "model.safetensors")
    assert_same_tensors(reader, weights, head_dim, qtype)


@pytest.mark.parametrize("model", ["mistral-window", "mistral-full"])
def test_metadata_of_real_checkpoints(tmp_path: Path, model: str) -> None:
    source = shared(f"hf/{model}")
    reader = run(source, tmp_path / "m.gguf", "--type", "BF16")
    found = metadata(reader)
    vocab = {key: found.pop(f"tokenizer.ggml.{key}") for key in VOCAB_KEYS}
    window = model == "mistral-window"
    head_dim = 32 if window else 64
    want = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.size_label": gguf.size_label(sum(t.n_elements for t in reader.tensors), 0, 0, 0),
        "general.name": model,
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 1024,
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.block_count": 3 if window else 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": 1e4 if window else 1e6,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    if window:
        want["llama.attention.sliding_window"] = 24
    assert found == want
    assert_is_the_tiny_vocabulary(vocab)
    types = {key: reader.fields[f"tokenizer.ggml.{key}"].types[-1].name for key in VOCAB_KEYS}
    assert types == {"tokens": "STRING", "scores": "FLOAT32", "token_type": "INT32"}


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type(checkpoint: Path, capfd: pytest.CaptureFixture[str], qtype: str) -> None:
    """Rows of 80 values (ffn_down) fall back to F16, and the tool says so."""
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", qtype, "--pure", "--json")
    assert_same_tensors(reader, random_weights(), HEAD_DIM, qtype)
    captured = capfd.readouterr()
    report = json.loads(captured.out)
    types = {tensor["name"]: tensor["type"] for tensor in report["tensors"]}
    assert types == {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert report["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert ("2 tensors have rows that blocks do not divide" in captured.err) == (qtype[0] == "Q")
    names = {"F32": "ALL_F32"}
    file_type = gguf.LlamaFileType[names.get(qtype, f"MOSTLY_{qtype}")]
    assert metadata(reader)["general.file_type"] == file_type


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", ["mistral-window", "mistral-full"])
def test_logits_of_every_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, mix: str
) -> None:
    """Against transformers: exact in float types; every type within its stated bound."""
    source, output = shared(f"hf/{model}"), tmp_path / "m.gguf"
    assert cli.main(["convert", str(source), str(output), "--type", mix, "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)["verification"]
    assert proof["faults"] == []
    for tensor in proof["tensors"]:
        bound = BOUNDS[GGMLType[tensor["type"]]]
        assert tensor["relative_error"] <= bound, tensor
        assert tensor["relative_error"] > 0 or bound <= 4e-3, tensor
    reference = np.load(source / "reference.npz")
    with LLM(output, kv_type="f32") as llm:
        logits = llm.logits(reference["ids"].tolist())
    error = np.abs(logits[:, reference["columns"]] - reference["logits"]).max()
    agreement = np.mean(logits.argmax(axis=1) == reference["argmax"])
    if mix in ("F32", "F16", "BF16"):
        assert error < 2e-4
        assert agreement == 1
    elif mix == "Q8_0":
        assert agreement >= 0.95


def test_agreement_of_a_trained_model(tmp_path: Path) -> None:
    """The likeliest token after each of a story's: random weights, whose tokens are all about
    equally likely, say little of that."""
    source, output = as_checkpoint(DEMO, tmp_path / "demo"), tmp_path / "m.gguf"
    with LLM(DEMO) as llm:
        story = llm.generate("Once upon a time", max_tokens=200, temperature=0.8, seed=1)
        ids = [*llm.tokenizer.encode("Once upon a time"), *story.token_ids]
    likeliest = {}
    for mix in ("F32", "Q8_0", "Q6_K"):
        run(source, output, "--type", mix, "--force")
        with LLM(output, kv_type="f32") as llm:
            likeliest[mix] = llm.logits(ids).argmax(axis=1)
    assert np.mean(likeliest["Q8_0"] == likeliest["F32"]) >= 0.95
    assert np.mean(likeliest["Q6_K"] == likeliest["F32"]) >= 0.95


def test_shards_of_bf16_and_f16(sharded: Path) -> None:
    reader = run(sharded, sharded.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, random_weights(), HEAD_DIM, "F32")


def test_threads_do_not_change_a_byte(sharded: Path) -> None:
    for name, threads in (("a", "1"), ("b", "8")):
        run(sharded, sharded.parent / name, "--type", "Q4_0", "--threads", threads)
    assert (sharded.parent / "a").read_bytes() == (sharded.parent / "b").read_bytes()


def test_tied_embedding_ignores_a_copy(checkpoint: Path) -> None:
    """lm_head.weight beside tie_word_embeddings, and old rotary buffers, are no weights."""
    weights = random_weights()
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes(weights | extra))
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, weights, HEAD_DIM, "F32")


def test_separate_output(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    weights = random_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][::-1].copy()
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes(weights))
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, weights, HEAD_DIM, "F32")


def mistral_form(checkpoint: Path, weights: Weights, **params: Any) -> Path:
    """The same model as params.json and consolidated.safetensors: other names, and the rows of q
    and k in the order of GGUF."""
    own = {}
    for name, x in weights.items():
        plain = {
            "model.embed_tokens.weight": "tok_embeddings.weight",
            "model.norm.weight": "norm.weight",
        }
        if name not in plain:
            layer, kind = name.removeprefix("model.layers.").split(".", 1)
            plain[name] = f"layers.{layer}.{MISTRAL_LAYER[kind.removesuffix('.weight')]}.weight"
        own[plain[name]] = gguf_rows(name, x, HEAD_DIM)
    own["output.weight"] = own["tok_embeddings.weight"]
    directory = checkpoint.parent / "own"
    directory.mkdir()
    (directory / "consolidated.safetensors").write_bytes(safetensors_bytes(own, "BF16"))
    write_json(directory / "params.json", PARAMS | params)
    shutil.copy(checkpoint / "tokenizer.model", directory / "tokenizer.model.v3")
    return directory


def test_the_two_forms_give_the_same_model(checkpoint: Path) -> None:
    """But for what only one of them knows: how long a context is."""
    weights = random_weights()
    own = mistral_form(checkpoint, weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes(weights))
    edit_json(checkpoint / "config.json", tie_word_embeddings=False)
    theirs = run(checkpoint, checkpoint.parent / "hf.gguf", "--type", "F32")
    ours = run(own, checkpoint.parent / "own.gguf", "--type", "F32")
    assert_same_tensors(ours, weights, HEAD_DIM, "F32")
    different = {"general.name": "own", "llama.context_length": 32768}
    assert metadata(ours) == metadata(theirs) | different


@pytest.mark.parametrize(
    ("params", "theta"),
    [
        ({}, 500000.0),
        ({"rope_theta": None}, 1e4),
        ({"rope_theta": None, "sliding_window": None}, 1e6),
    ],
)
def test_theta_of_mistrals_form(checkpoint: Path, params: dict[str, Any], theta: float) -> None:
    """mistral-inference: 10,000 with a window, a million without one."""
    own = mistral_form(checkpoint, random_weights(), **params)
    found = metadata(run(own, checkpoint.parent / "m.gguf"))
    assert found["llama.rope.freq_base"] == theta


def mixture(checkpoint: Path) -> Weights:
    """The checkpoint with three experts a layer instead of one feed-forward part."""
    weights = {n: x for n, x in random_weights().items() if ".mlp." not in n}
    rng = np.random.default_rng(1)
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        weights[f"{moe}.gate.weight"] = rng.standard_normal((3, DIM), np.float32)
        for expert in range(3):
            for name, shape in (
                ("w1", (HIDDEN, DIM)),
                ("w2", (DIM, HIDDEN)),
                ("w3", (HIDDEN, DIM)),
            ):
                weights[f"{moe}.experts.{expert}.{name}.weight"] = rng.standard_normal(
                    shape, np.float32
                )
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes(weights))
    edit_json(
        checkpoint / "config.json", model_type="mixtral", num_local_experts=3, num_experts_per_tok=2
    )
    return weights


def test_experts_are_stacked(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = mixture(checkpoint)
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", "F32")
    found = metadata(reader)
    assert (found["llama.expert_count"], found["llama.expert_used_count"]) == (3, 2)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        gate = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        assert gate.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(gate.data, weights[f"{moe}.gate.weight"])
        for own, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            want = np.stack([weights[f"{moe}.experts.{e}.{own}.weight"] for e in range(3)])
            np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_{name}_exps.weight"].data, want)
    assert "does not run mixtures of experts yet" in capfd.readouterr().err


def test_experts_verified(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of all experts, though the engine cannot run them; the gate stays F32."""
    mixture(checkpoint)
    output = checkpoint.parent / "m.gguf"
    assert cli.main(["convert", str(checkpoint), str(output), "--type", "q8_0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "mixtures" in report["verification"]["logits"]["skipped"]
    types = {tensor["name"]: tensor["type"] for tensor in report["tensors"]}
    assert types["blk.0.ffn_gate_exps.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


def key_of(checkpoint: Path, key: str, **config: Any) -> Any:
    """What a changed config.json writes under a key; None when the key is absent."""
    edit_json(checkpoint / "config.json", **config)
    return metadata(run(checkpoint, checkpoint.parent / "m.gguf", "--force")).get(key)


def test_rope_theta_old_and_new(checkpoint: Path) -> None:
    key = "llama.rope.freq_base"
    assert key_of(checkpoint, key) == 500000.0
    assert key_of(checkpoint, key, rope_parameters={"rope_theta": 2e4}, rope_theta=...) == 2e4
    assert key_of(checkpoint, key, rope_parameters={"rope_type": "default"}) == 1e4
    assert key_of(checkpoint, key, rope_parameters=..., rope_scaling=None) == 1e4


def test_linear_scaling(checkpoint: Path) -> None:
    """Of both forms of config.json, the older one too; the engine reads what was written."""
    for section in ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}):
        key = "llama.rope.scaling.factor"
        assert key_of(checkpoint, key, rope_scaling=section) == 4.0
        assert key_of(checkpoint, "llama.rope.scaling.type") == "linear"


def test_llama3_scaling(checkpoint: Path) -> None:
    """Meta's apply_scaling, written out: short waves stay, long ones are stretched by the factor,
    and between the two there is a slope."""
    section = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    edit_json(checkpoint / "config.json", rope_scaling=section)
    reader = run(checkpoint, checkpoint.parent / "m.gguf", "--type", "Q8_0")
    (factors,) = (t for t in reader.tensors if t.name == "rope_freqs.weight")
    want = []
    for i in range(HEAD_DIM // 2):
        wave = 2 * np.pi * 500000.0 ** (2 * i / HEAD_DIM)
        if wave < 8192 / 4:
            want.append(1.0)
        elif wave > 8192 / 1:
            want.append(8.0)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            want.append(1 / ((1 - smooth) / 8 + smooth))
    assert want[0] == 1.0 and want[-1] == 8.0 and any(1 < factor < 8 for factor in want)
    np.testing.assert_allclose(factors.data, want, rtol=1e-6)


def test_sliding_window(checkpoint: Path) -> None:
    key = "llama.attention.sliding_window"
    assert key_of(checkpoint, key) == 16
    assert key_of(checkpoint, key, sliding_window=None) is None
    assert key_of(checkpoint, key, sliding_window=...) is None


def test_checkpoint_in_a_hugging_face_cache(checkpoint: Path) -> None:
    """There, files are links from snapshots/REVISION to blobs."""
    cache = checkpoint.parent / "models--tiny"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = cache / "blobs" / f"hash-of-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    reader = run(snapshot, checkpoint.parent / "m.gguf", "--type", "F32")
    assert_same_tensors(reader, random_weights(), HEAD_DIM, "F32")


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """At most three times the largest tensor, whatever the number of layers, stays allocated."""
    weights: Weights = {}
    big = {"vocab_size": 1030, "hidden_size": 512, "intermediate_size": 8192, "head_dim": 128}
    shapes = {
        "self_attn.q_proj": (512, 512),
        "self_attn.k_proj": (256, 512),
        "self_attn.v_proj": (256, 512),
        "self_attn.o_proj": (512, 512),
        "mlp.gate_proj": (8192, 512),
        "mlp.up_proj": (8192, 512),
        "mlp.down_proj": (512, 8192),
        "input_layernorm": (512,),
        "post_attention_layernorm": (512,),
    }
    for layer in range(4):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(shape, np.float32)
    weights["model.embed_tokens.weight"] = np.ones((1030, 512), np.float32)
    weights["model.norm.weight"] = np.ones(512, np.float32)
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").write_bytes(safetensors_bytes(weights))
    edit_json(directory / "config.json", num_hidden_layers=4, **big)
    largest, total = 8192 * 512 * 4, sum(x.nbytes for x in weights.values())
    assert total > 9 * largest
    plan = convert.plan(directory, "F32", Wishes())
    convert.run(plan, tmp_path / "a", 2, lambda *_: None, lambda path: None)  # compiles, imports
    tracemalloc.start()
    try:
        plan = convert.plan(directory, "F32", Wishes())
        convert.run(plan, tmp_path / "b", 2, lambda *_: None, lambda path: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert largest < peak < 3 * largest


def test_dry_run_writes_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(checkpoint.parent.rglob("*"))
    arguments = [str(checkpoint), "nowhere/m.gguf", "--type", "q4_k_m", "--dry-run"]
    assert cli.main(["convert", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(checkpoint.parent.rglob("*")) == before
    assert len(lines) == len(random_weights()) + 2
    assert any(line.startswith("blk.1.attn_q.weight ") and "-> Q5_0" in line for line in lines)
