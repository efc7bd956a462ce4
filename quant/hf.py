"""Hugging Face's form of a Llama, Mistral or Mixtral checkpoint: config.json and its names.

The rows of q and k are ordered for RoPE on halves of a head (transformers' rotate_half).
"""

from quant.llama import Form, Llama3Rope, Sizes, check_heads
from quant.settings import Settings

MODEL_TYPES = ("llama", "mistral", "mixtral")

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."

FORM = Form(
    names={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": _LAYER + "input_layernorm",
        "attn_q": _LAYER + "self_attn.q_proj",
        "attn_k": _LAYER + "self_attn.k_proj",
        "attn_v": _LAYER + "self_attn.v_proj",
        "attn_output": _LAYER + "self_attn.o_proj",
        "ffn_norm": _LAYER + "post_attention_layernorm",
        "ffn_gate": _LAYER + "mlp.gate_proj",
        "ffn_up": _LAYER + "mlp.up_proj",
        "ffn_down": _LAYER + "mlp.down_proj",
        "ffn_gate_inp": _LAYER + "block_sparse_moe.gate",
        "ffn_gate_exps": _EXPERT + "w1",
        "ffn_down_exps": _EXPERT + "w2",
        "ffn_up_exps": _EXPERT + "w3",
    },
    ignored=("rotary_emb.inv_freq",),
    halves=True,
)


def read_sizes(config: Settings) -> Sizes:
    """What config.json says; CheckpointError for what is missing, wrong, or would make an engine
    compute something else than the checkpoint says."""
    _check_model(config)
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    if not config.has("head_dim") and dim % n_heads:
        raise config.wrong("num_attention_heads", f"{n_heads} does not divide {dim} dimensions")
    theta, scale, llama3 = _rope(config)
    mixture = config.text("model_type") == "mixtral"
    sizes = Sizes(
        dim=dim,
        hidden_dim=config.count("intermediate_size"),
        n_layers=config.count("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=config.count("num_key_value_heads", n_heads),
        head_dim=config.count("head_dim", max(1, dim // n_heads)),
        vocab_size=config.count("vocab_size"),
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=theta,
        context_length=config.count("max_position_embeddings"),
        sliding_window=config.count("sliding_window") if config.has("sliding_window") else None,
        tied=config.flag("tie_word_embeddings", False),
        rope_scale=scale,
        llama3_rope=llama3,
        n_experts=config.count("num_local_experts") if mixture else 0,
        n_experts_used=config.count("num_experts_per_tok") if mixture else 0,
    )
    check_heads(config, sizes, "num_key_value_heads", "head_dim")
    return sizes


def _check_model(config: Settings) -> None:
    model_type = config.text("model_type")
    if model_type not in MODEL_TYPES:
        raise config.wrong("model_type", f"{model_type}, wanted {' or '.join(MODEL_TYPES)}")
    if config.has("auto_map"):
        raise config.wrong("auto_map", "the model brings its own code, which is not run")
    if config.text("hidden_act", "silu") != "silu":
        raise config.wrong("hidden_act", f"{config.text('hidden_act')}, wanted silu")
    if config.has("quantization_config"):
        raise config.wrong("quantization_config", "the weights are quantized already")


def _rope(config: Settings) -> tuple[float, float, Llama3Rope | None]:
    """Theta, the divisor of positions, and Llama 3's stretching.

    transformers 5 keeps all of it in `rope_parameters`; before, theta stood alone (10000 where it
    is missing) and the rest in `rope_scaling`.
    """
    key = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    section = config.section(key)
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = section.text("rope_type", section.text("type", "default"))
    if kind == "default":
        return theta, 1.0, None
    if kind == "linear":
        return theta, section.number("factor"), None
    if kind != "llama3":
        raise config.wrong(key, f"rope type {kind} is not supported yet")
    llama3 = Llama3Rope(
        section.number("factor"),
        section.number("low_freq_factor"),
        section.number("high_freq_factor"),
        section.count("original_max_position_embeddings"),
    )
    if llama3.low_freq_factor >= llama3.high_freq_factor:
        raise config.wrong(key, "low_freq_factor is not below high_freq_factor")
    return theta, 1.0, llama3
