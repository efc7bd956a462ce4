"""The whole Llama model in plain NumPy, float64: no cache, no ring, an explicit (T, T) mask.

Written from the papers (arXiv 2302.13971, 2310.06825) to be compared with, not to be fast.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cpuinfer.config import ModelConfig

Array = NDArray[np.float64]


def logits(config: ModelConfig, weights: Mapping[str, Array], tokens: list[int]) -> Array:
    """tokens (T,) -> (T, V). `weights` are those of a GGUF file as floats, by their names."""
    c = config
    mask = visible(len(tokens), c.sliding_window)
    turns = rope_turns(c, len(tokens), weights.get("rope_freqs.weight"))
    x = weights["token_embd.weight"][tokens]  # (T, D)
    for layer in range(c.n_layers):
        w = {
            name.split(".")[2]: value
            for name, value in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        h = rms_norm(x, w["attn_norm"], c.norm_eps)
        q = rope((h @ w["attn_q"].T).reshape(-1, c.n_heads, c.head_dim), turns)
        k = rope((h @ w["attn_k"].T).reshape(-1, c.n_kv_heads, c.head_dim), turns)
        v = (h @ w["attn_v"].T).reshape(-1, c.n_kv_heads, c.head_dim)
        x = x + attention(q, k, v, mask).reshape(len(x), -1) @ w["attn_output"].T
        h = rms_norm(x, w["ffn_norm"], c.norm_eps)
        x = x + (silu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    output = weights.get("output.weight", weights["token_embd.weight"])
    return rms_norm(x, weights["output_norm.weight"], c.norm_eps) @ output.T


def visible(length: int, window: int | None) -> NDArray[np.bool_]:
    """(T, T), True where the query of a row sees the key of a column: at most `window` keys, its
    own included."""
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


def attention(q: Array, k: Array, v: Array, mask: NDArray[np.bool_]) -> Array:
    """q (T, H, d), k and v (S, K, d), mask (T, S) -> (T, H, d)"""
    group = q.shape[1] // k.shape[1]
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[2])
        scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
    return out


def rope_turns(config: ModelConfig, length: int, factors: Array | None) -> NDArray[np.complex128]:
    """(T, rope_dim / 2) complex numbers of magnitude 1: the angle each pair is turned by."""
    frequencies = config.rope_theta ** (-np.arange(0, config.rope_dim, 2) / config.rope_dim)
    if factors is not None:
        frequencies = frequencies / factors
    angles = np.arange(length)[:, None] * frequencies / config.rope_scale
    return np.exp(1j * angles)


def rope(x: Array, turns: NDArray[np.complex128]) -> Array:
    """x (T, H, d): pairs (2i, 2i + 1) as complex numbers, the first of them turned."""
    rotated = 2 * turns.shape[1]
    pairs = x[..., 0:rotated:2] + 1j * x[..., 1:rotated:2]
    pairs = pairs * turns[:, None, :]
    out = x.copy()
    out[..., 0:rotated:2], out[..., 1:rotated:2] = pairs.real, pairs.imag
    return out


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x (T, D) / root mean square * weight (D,)"""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """x * sigmoid(x)"""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))
