"""Train the small model that ships with cpuinfer, and write it as a GGUF file.

    python tools/train_demo.py train --text DIR --minutes 110 --out cpuinfer/data/demo.gguf
    python tools/train_demo.py export CHECKPOINT OUT.gguf
    python tools/train_demo.py sample CHECKPOINT --prompt "Once upon a time"

DIR holds `tinystories/` and `english_novels/`. Training runs on one CPU thread for the given
wall-clock time, learning rate schedule included, and saves a checkpoint (`.pt`, beside the
output) every ten minutes. Needs PyTorch (2.9 or later), which nothing else here does.
"""

import argparse
import hashlib
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import torch
from demo_text import BOS, EOS, read_novels, read_stories, train_tokenizer
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]  # parameters under their GGUF names; matrices are (outputs, inputs)

SEQUENCE = 512  # tokens of one training row
BATCH = 8  # rows of one step
DROPOUT = 0.1  # the stories are few and seen many times
HELD_OUT = 20  # one story in this many is never trained on


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, under the names of `cpuinfer.config.ModelConfig`."""

    dim: int = 256
    hidden_dim: int = 768
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 2048
    window: int = 128  # keys a query sees, its own included
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    context_length: int = 2048


def encode(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return all texts as one row of ids, each between BOS and EOS."""
    ids: list[int] = []
    for text in texts:
        ids += [BOS, *tokenizer.encode(text), EOS]
    return torch.tensor(ids)


# --- model -----------------------------------------------------------------------------------


def initial(shape: Shape) -> Weights:
    """Return random parameters; projections into the residual stream start smaller."""
    dim, kv = shape.dim, shape.n_kv_heads * shape.head_dim
    sizes = {
        "attn_norm": (dim,),
        "attn_q": (shape.n_heads * shape.head_dim, dim),
        "attn_k": (kv, dim),
        "attn_v": (kv, dim),
        "attn_output": (dim, shape.n_heads * shape.head_dim),
        "ffn_norm": (dim,),
        "ffn_gate": (shape.hidden_dim, dim),
        "ffn_up": (shape.hidden_dim, dim),
        "ffn_down": (dim, shape.hidden_dim),
    }
    weights = {"token_embd.weight": 0.03 * torch.randn(shape.vocab_size, dim)}
    for layer in range(shape.n_layers):
        for name, size in sizes.items():
            depth = 2 * shape.n_layers if name in ("attn_output", "ffn_down") else 1
            value = torch.ones(size) if len(size) == 1 else 0.03 / depth**0.5 * torch.randn(size)
            weights[f"blk.{layer}.{name}.weight"] = value
    weights["output_norm.weight"] = torch.ones(dim)
    return weights


def rotate(y: Tensor, angle: Tensor) -> Tensor:
    """Apply RoPE to adjacent pairs (2i, 2i + 1) of y (..., W, n, D); angle (T / W, W, 1, D / 2)."""
    a, b, cos, sin = y[..., 0::2], y[..., 1::2], angle.cos(), angle.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attention(s: Shape, q: Tensor, k: Tensor, v: Tensor, angle: Tensor) -> Tensor:
    """Return the attention output (B, T, n_heads * D) for q, k, v (B, T, n * D).

    Blocks of W positions (the window) see their own keys and the block before; the mask leaves
    each query the W keys up to its own. T is a multiple of W.
    """
    w, (rows, length) = s.window, q.shape[:2]
    blocks, group = rows * length // w, s.n_heads // s.n_kv_heads
    q, k, v = (y.view(rows, length // w, w, -1, s.head_dim) for y in (q, k, v))

    def with_previous(y: Tensor) -> Tensor:  # -> (blocks * n_kv_heads, 2W, D)
        before = F.pad(y, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((before, y), 2).transpose(2, 3).reshape(-1, 2 * w, s.head_dim)

    behind = torch.arange(w)[:, None] + w - torch.arange(2 * w)  # query minus key position
    mask = ((behind >= 0) & (behind < w)).repeat(length // w, 1, 1, 1)
    mask[0, ..., :w] = False  # nothing comes before the first block
    v = with_previous(v)
    k = with_previous(rotate(k, angle).to(v.dtype))
    q = (rotate(q, angle) * s.head_dim**-0.5).to(v.dtype)
    q = q.view(blocks, w, s.n_kv_heads, group, s.head_dim).permute(0, 2, 3, 1, 4)
    scores = torch.bmm(q.reshape(-1, group * w, s.head_dim), k.transpose(1, 2)).float()
    scores = scores.view(rows, length // w, s.n_heads, w, 2 * w)
    odds = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1).to(v.dtype)
    out = torch.bmm(odds.view(-1, group * w, 2 * w), v)
    out = out.view(blocks, s.n_heads, w, s.head_dim).transpose(1, 2)
    return out.reshape(rows, length, -1)


def forward(s: Shape, weights: Weights, ids: Tensor, dropout: float = 0.0) -> Tensor:
    """Return logits (B, T, V) for ids (B, T); T is a multiple of the window."""
    length = ids.shape[1]
    freq = s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
    angle = (torch.arange(length)[:, None] * freq).view(length // s.window, s.window, 1, -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (s.dim,), weights[f"{name}.weight"], s.norm_eps)

    def dropped(y: Tensor) -> Tensor:  # the same features for all positions of a row: cheap
        return y * F.dropout(torch.ones(len(ids), 1, s.dim), dropout).to(y.dtype)

    x = weights["token_embd.weight"][ids]
    for layer in range(s.n_layers):

        def linear(y: Tensor, name: str, layer: int = layer) -> Tensor:
            return F.linear(y, weights[f"blk.{layer}.{name}.weight"])

        y = norm(x, f"blk.{layer}.attn_norm")
        q, k, v = (linear(y, name) for name in ("attn_q", "attn_k", "attn_v"))
        x = x + dropped(linear(attention(s, q, k, v, angle), "attn_output"))
        y = norm(x, f"blk.{layer}.ffn_norm")
        y = F.silu(linear(y, "ffn_gate")) * linear(y, "ffn_up")
        x = x + dropped(linear(y, "ffn_down"))
    return F.linear(norm(x, "output_norm"), weights["token_embd.weight"])


def loss_of(s: Shape, weights: Weights, rows: Tensor, dropout: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats a token of rows (B, T + 1), run in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = forward(s, weights, rows[:, :-1], dropout)
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(s: Shape, weights: Weights, stream: Tensor) -> float:
    """Return the loss over the held-out stories."""
    rows = stream[: (len(stream) - 1) // SEQUENCE * SEQUENCE + 1].unfold(0, SEQUENCE + 1, SEQUENCE)
    with torch.no_grad():
        return float(loss_of(s, weights, rows))


def sample(
    s: Shape, weights: Weights, tokenizer: Any, prompt: str, tokens: int, temperature: float,
    seed: int = 0, top_k: int = 40,
) -> str:  # fmt: skip
    """Return `prompt` continued by at most `tokens` tokens."""
    rng = torch.Generator().manual_seed(seed)
    ids = [BOS, *tokenizer.encode(prompt)]
    for _ in range(tokens):
        seen = ids[-SEQUENCE:]  # as far as the layers' windows reach together
        padded = seen + [EOS] * (-len(seen) % s.window)
        with torch.no_grad():
            logits = forward(s, weights, torch.tensor([padded]))[0, len(seen) - 1]
        values, best = logits.topk(top_k if temperature > 0 else 1)
        odds = torch.softmax(values / (temperature or 1.0), 0)
        token = int(best[torch.multinomial(odds, 1, generator=rng)])
        if token == EOS:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[1:]))


# --- training --------------------------------------------------------------------------------


def story_share(done: float) -> float:
    """Return the share of rows drawn from the stories when `done` (0..1) of the time is over."""
    return 0.2 + 0.5 * max(0.0, (done - 0.6) / 0.4)


def rate(done: float) -> float:
    """Return the learning rate's factor: a short warm-up, then a cosine to zero."""
    return min(1.0, done / 0.01) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def save(path: Path, shape: Shape, weights: Weights, tokenizer: bytes) -> None:
    """Write a checkpoint, complete or not at all."""
    part = path.with_suffix(".part")
    torch.save({"shape": asdict(shape), "tokenizer": tokenizer, "model": weights}, part)
    os.replace(part, path)


def load(path: Path) -> tuple[Shape, Weights, Any]:
    """Return a checkpoint's shape, parameters and tokenizer."""
    state = torch.load(path, weights_only=True)
    tokenizer = spm.SentencePieceProcessor(model_proto=state["tokenizer"])
    return Shape(**state["shape"]), state["model"], tokenizer


def prepare(folder: Path, rng: random.Random) -> tuple[bytes, list[Tensor]]:
    """Return the tokenizer and the ids of the stories, the novels and the held-out stories."""
    stories = read_stories(folder / "tinystories")
    held = [s for s in stories if hashlib.sha256(s.encode()).digest()[0] % HELD_OUT == 0]
    stories = sorted(set(stories) - set(held))
    novels = read_novels(folder / "english_novels", stories)
    rng.shuffle(stories)
    rng.shuffle(novels)
    serialized = train_tokenizer(stories * 2 + novels[:2000], Shape().vocab_size)
    tokenizer = spm.SentencePieceProcessor(model_proto=serialized)
    streams = [encode(tokenizer, texts) for texts in (stories, novels, held)]
    print("tokens of stories, novels, held-out stories:", *map(len, streams), flush=True)
    return serialized, streams


def train(text: Path, minutes: float, out: Path) -> None:
    """Train for `minutes` of wall-clock time, write a checkpoint beside `out`, then `out`."""
    begin = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    shape, checkpoint = Shape(), out.with_suffix(".pt")
    serialized, (stories, novels, held) = prepare(text, rng)
    tokenizer = spm.SentencePieceProcessor(model_proto=serialized)
    weights = {name: w.requires_grad_() for name, w in initial(shape).items()}
    matrices = [w for name, w in weights.items() if w.ndim == 2 and name.startswith("blk.")]
    others = [w for name, w in weights.items() if w.ndim == 1 or not name.startswith("blk.")]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=0.003, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    torch._dynamo.config.suppress_errors = True  # without a C++ compiler: slower, not an error
    compiled_loss = torch.compile(loss_of)
    begin, minutes = time.monotonic(), minutes - (time.monotonic() - begin) / 60
    step, mean, shown, saved = 0, 0.0, 0.0, 0.0
    while (spent := (time.monotonic() - begin) / 60) < minutes:
        done = spent / minutes
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(done)
        streams = [stories if rng.random() < story_share(done) else novels for _ in range(BATCH)]
        starts = [rng.randrange(len(stream) - SEQUENCE) for stream in streams]
        rows = [s[at : at + SEQUENCE + 1] for s, at in zip(streams, starts, strict=True)]
        loss = compiled_loss(shape, weights, torch.stack(rows), DROPOUT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        mean += (loss.item() - mean) / min(step, 20)
        if spent - shown >= 1:
            speed = step * BATCH * SEQUENCE / (60 * spent)
            print(f"{spent:.1f} min, step {step}, {speed:.0f} tokens/s, {mean:.3f}", flush=True)
            shown = spent
        if spent - saved >= 10:
            save(checkpoint, shape, weights, serialized)
            print(f"held-out loss {held_out_loss(shape, weights, held):.3f}", flush=True)
            print(sample(shape, weights, tokenizer, "Once upon a time", 100, 0.8), flush=True)
            saved = spent
    print(f"{step} steps, held-out loss {held_out_loss(shape, weights, held):.3f}", flush=True)
    save(checkpoint, shape, weights, serialized)
    export(checkpoint, out)


# --- GGUF ------------------------------------------------------------------------------------


def metadata(shape: Shape, tokenizer: Any) -> dict[str, Any]:
    """Return the GGUF metadata of the model and its vocabulary."""
    ids = range(tokenizer.get_piece_size())
    types = [
        2 if tokenizer.is_unknown(i) else 3 if tokenizer.is_control(i)
        else 6 if tokenizer.is_byte(i) else 1 for i in ids
    ]  # fmt: skip
    return {
        "general.architecture": "llama",
        "general.name": "cpuinfer demo",
        "general.description": "A tiny model trained on TinyStories and old English novels, to "
        "show that cpuinfer works. It writes simple English and knows nothing.",
        "general.license": "apache-2.0",
        "general.file_type": 7,  # mostly Q8_0
        "llama.context_length": shape.context_length,
        "llama.embedding_length": shape.dim,
        "llama.block_count": shape.n_layers,
        "llama.feed_forward_length": shape.hidden_dim,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": shape.norm_eps,
        "llama.attention.sliding_window": shape.window,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": shape.rope_theta,
        "llama.vocab_size": shape.vocab_size,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [tokenizer.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(tokenizer.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        # It was never taught to answer: what is said is continued.
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    }


def export(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint as GGUF: matrices in Q8_0, norms in F32."""
    from quant.ggml_types import GGMLType
    from quant.gguf_writer import write_gguf

    shape, weights, tokenizer = load(checkpoint)
    tensors: list[tuple[str, GGMLType, np.ndarray]] = [
        (name, GGMLType.Q8_0 if weight.ndim == 2 else GGMLType.F32, weight.detach().numpy())
        for name, weight in weights.items()
    ]
    write_gguf(out, metadata(shape, tokenizer), tensors)
    print(f"{out}: {out.stat().st_size} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands train, export, sample."""
    parser = argparse.ArgumentParser(description="Train the model bundled with cpuinfer.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train and write the GGUF file")
    command.add_argument("--text", type=Path, required=True, help="folder with the two corpora")
    command.add_argument("--minutes", type=float, default=110, help="wall-clock time (110)")
    command.add_argument("--out", type=Path, required=True, help="GGUF file to write")
    command = commands.add_parser("export", help="write a checkpoint as GGUF")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("out", type=Path)
    command = commands.add_parser("sample", help="print text from a checkpoint")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--prompt", default="Once upon a time")
    command.add_argument("--tokens", type=int, default=150)
    command.add_argument("--temperature", type=float, default=0.8)
    command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.command == "train":
        train(args.text, args.minutes, args.out)
    elif args.command == "export":
        export(args.checkpoint, args.out)
    else:
        trained = load(args.checkpoint)
        print(sample(*trained, args.prompt, args.tokens, args.temperature, args.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
