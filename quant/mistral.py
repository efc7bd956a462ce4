"""Mistral's own form of a checkpoint: params.json and the names of mistral-inference.

The rows of q and k are ordered for RoPE on neighbours, as in GGUF, and stay where they are.
"""

from quant.llama import Form, Sizes, check_heads
from quant.settings import Settings

_LAYER = "layers.{layer}."
_EXPERT = _LAYER + "feed_forward.experts.{expert}."
# params.json does not say how long a context is; the 7B models, both Mixtrals and their
# published config.json agree on this.
_CONTEXT_LENGTH = 32768

_UNSUPPORTED = {
    "quantization": "the weights are quantized already",
    "vision_encoder": "a model that sees pictures",
    "yarn": "this scaling of positions is not supported yet",
    "llama_4_scaling": "this scaling of attention is not supported yet",
    "lora": "an adapter, not a whole model",
}

FORM = Form(
    names={
        "token_embd": "tok_embeddings",
        "output_norm": "norm",
        "output": "output",
        "attn_norm": _LAYER + "attention_norm",
        "attn_q": _LAYER + "attention.wq",
        "attn_k": _LAYER + "attention.wk",
        "attn_v": _LAYER + "attention.wv",
        "attn_output": _LAYER + "attention.wo",
        "ffn_norm": _LAYER + "ffn_norm",
        "ffn_gate": _LAYER + "feed_forward.w1",
        "ffn_down": _LAYER + "feed_forward.w2",
        "ffn_up": _LAYER + "feed_forward.w3",
        "ffn_gate_inp": _LAYER + "feed_forward.gate",
        "ffn_gate_exps": _EXPERT + "w1",
        "ffn_down_exps": _EXPERT + "w2",
        "ffn_up_exps": _EXPERT + "w3",
    },
    ignored=("rope.freqs",),
    halves=False,
)


def read_sizes(config: Settings) -> Sizes:
    """What params.json says; CheckpointError for what is missing, wrong or not supported."""
    for key, reason in _UNSUPPORTED.items():
        if config.has(key):
            raise config.wrong(key, reason)
    dim, n_heads = config.count("dim"), config.count("n_heads")
    if not config.has("head_dim") and dim % n_heads:
        raise config.wrong("n_heads", f"{n_heads} does not divide {dim} dimensions")
    window = config.count("sliding_window") if config.has("sliding_window") else None
    context = config.count("max_position_embeddings", _CONTEXT_LENGTH)
    mixture = config.section("moe")
    sizes = Sizes(
        dim=dim,
        hidden_dim=config.count("hidden_dim"),
        n_layers=config.count("n_layers"),
        n_heads=n_heads,
        n_kv_heads=config.count("n_kv_heads", n_heads),
        head_dim=config.count("head_dim", max(1, dim // n_heads)),
        vocab_size=config.count("vocab_size"),
        norm_eps=config.number("norm_eps"),
        # mistral-inference: models without a window were made for longer texts
        rope_theta=config.number("rope_theta", 1_000_000.0 if window is None else 10_000.0),
        context_length=config.count("max_seq_len", context),
        sliding_window=window,
        tied=config.flag("tied_embeddings", False),
        n_experts=mixture.count("num_experts") if mixture.values else 0,
        n_experts_used=mixture.count("num_experts_per_tok") if mixture.values else 0,
    )
    check_heads(config, sizes, "n_kv_heads", "head_dim")
    return sizes
