"""A plain float pass over the weights of a checkpoint, in its own names and its own order of rows.

Slow, and with nothing of the engine or of the GGUF file in it: what it computes is what the
checkpoint means, so that a file converted from it can be held against it.
"""

import numpy as np
from numpy.typing import NDArray

from quant.llama import SourceTensor
from quant.source import Source

Array = NDArray[np.float64]


def logits(source: Source, tokens: list[int]) -> Array:
    """tokens (T,) -> (T, vocab_size), float64; for models without experts."""
    sizes = source.sizes
    assert not sizes.n_experts
    named = {tensor.name.removesuffix(".weight"): tensor for tensor in source.tensors}
    embedding = named["token_embd"]
    x = np.concatenate([_own_rows(embedding, token, token + 1) for token in tokens])  # (T, D)
    turns = _turns(source, len(tokens), named.get("rope_freqs"))
    mask = _visible(len(tokens), sizes.sliding_window)
    for layer in range(sizes.n_layers):
        w = {name: _whole(named[f"blk.{layer}.{name}"]) for name in _LAYER}
        h = _rms_norm(x, w["attn_norm"], sizes.norm_eps)
        q = _rope((h @ w["attn_q"].T).reshape(-1, sizes.n_heads, sizes.head_dim), turns, source)
        k = _rope((h @ w["attn_k"].T).reshape(-1, sizes.n_kv_heads, sizes.head_dim), turns, source)
        v = (h @ w["attn_v"].T).reshape(-1, sizes.n_kv_heads, sizes.head_dim)
        x = x + _attention(q, k, v, mask).reshape(len(x), -1) @ w["attn_output"].T
        h = _rms_norm(x, w["ffn_norm"], sizes.norm_eps)
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    h = _rms_norm(x, _whole(named["output_norm"]), sizes.norm_eps)
    return h @ _whole(named.get("output", embedding)).T


_LAYER = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


def _own_rows(tensor: SourceTensor, start: int, end: int) -> Array:
    """Rows as the checkpoint orders them."""
    return tensor.parts[0].rows(start, end).astype(np.float64)


def _whole(tensor: SourceTensor) -> Array:
    return _own_rows(tensor, 0, tensor.n_rows).reshape(tensor.shape)


def _visible(length: int, window: int | None) -> NDArray[np.bool_]:
    """(T, T): the query of a row sees itself and what is before it, `window` keys at most."""
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < (window or length))


def _turns(source: Source, length: int, factors: SourceTensor | None) -> NDArray[np.complex128]:
    """(T, head_dim / 2) complex numbers of magnitude 1."""
    sizes = source.sizes
    frequencies = sizes.rope_theta ** (-np.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    if factors is not None:
        frequencies = frequencies / _whole(factors)
    angles: Array = np.outer(np.arange(length) / sizes.rope_scale, frequencies)
    turns: NDArray[np.complex128] = np.exp(1j * angles)
    return turns


def _rope(x: Array, turns: NDArray[np.complex128], source: Source) -> Array:
    """x (T, H, d), its pairs turned: halves of a head, or neighbours, as the checkpoint has it."""
    shape = (*x.shape[:2], 2, -1) if source.form.halves else (*x.shape[:2], -1, 2)
    pairs = np.moveaxis(x.reshape(shape), 2 if source.form.halves else 3, 0)  # (2, T, H, d / 2)
    turned = (pairs[0] + 1j * pairs[1]) * turns[:, None, :]
    axis = 2 if source.form.halves else 3
    return np.stack([turned.real, turned.imag], axis).reshape(x.shape)


def _attention(q: Array, k: Array, v: Array, mask: NDArray[np.bool_]) -> Array:
    """q (T, H, d), k and v (T, K, d) -> (T, H, d)"""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[2])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out: Array = np.einsum("hts,shd->thd", weights, v)
    return out


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    scale: Array = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return x * scale * weight
