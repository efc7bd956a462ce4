"""Which type each tensor of a model gets: llama.cpp's mixes, tensor for tensor.

A mix is named for most of its weights: Q4_K_M is mostly Q4_K. The rules are those of
llama_tensor_get_type of llama-quant.cpp for architecture `llama`, by the kind of tensor and its
layer. A tensor whose rows the type's blocks do not divide gets another one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quant.ggml_types import GGMLType
from quant.ggml_types import GGMLType as T


@dataclass(frozen=True)
class Model:
    """What of a model its mix depends on: heads of q for one of k and v, experts of a layer."""

    n_layers: int
    group_size: int
    n_experts: int = 0

    @property
    def is_70b(self) -> bool:
        """Llama 2 or 3 of 70 billion weights, as llama.cpp tells them by their layers."""
        return self.n_layers == 80 and self.group_size > 1

    def more(self, layer: int) -> bool:
        """Whether a layer gets more bits in the _M mixes: the ends, and every third between."""
        eighth = self.n_layers // 8
        return layer < eighth or layer >= 7 * self.n_layers // 8 or (layer - eighth) % 3 == 2


# (model, layer, whether there are importances) -> type; None leaves the mix's own.
Rule = Callable[[Model, int, bool], GGMLType | None]


@dataclass(frozen=True)
class Mix:
    """`qtype` for what no rule names (by kind of tensor); `file_type` is llama.h's llama_ftype."""

    file_type: int
    qtype: GGMLType
    rules: Mapping[str, Rule] = field(default_factory=dict)


def _always(qtype: GGMLType) -> Rule:
    return lambda model, layer, weighted: qtype


def _first(part: int, qtype: GGMLType, rest: GGMLType | None = None) -> Rule:
    """`qtype` in the first of `part` parts of the layers."""
    return lambda model, layer, weighted: qtype if layer < model.n_layers // part else rest


def _up_to(count: int, qtype: GGMLType, rest: GGMLType | None = None) -> Rule:
    """`qtype` in the first `count` layers."""
    return lambda model, layer, weighted: qtype if layer < count else rest


def _more(qtype: GGMLType) -> Rule:
    return lambda model, layer, weighted: qtype if model.more(layer) else None


def _grouped(qtype: GGMLType, otherwise: GGMLType) -> Rule:
    """`qtype` where a matrix of v is small, since four heads or more share it."""
    return lambda model, layer, weighted: qtype if model.group_size >= 4 else otherwise


def _by_experts(dense: GGMLType | None, sparse: GGMLType | None) -> Rule:
    """One type for models without experts, one for those with eight, as Mixtral has."""
    return lambda model, layer, weighted: sparse if model.n_experts == 8 else dense


def _if_weighted(qtype: GGMLType) -> Rule:
    """`qtype` in the first eighth of the layers, where importances would lead 4 bits astray."""
    return lambda model, layer, weighted: (
        qtype if weighted and layer < model.n_layers // 8 else None
    )


MIXES = {
    "F32": Mix(0, T.F32),
    "F16": Mix(1, T.F16),
    "BF16": Mix(32, T.BF16),
    "Q8_0": Mix(7, T.Q8_0),
    "Q4_0": Mix(2, T.Q4_0, {"ffn_down": _if_weighted(T.Q4_1)}),
    "Q4_1": Mix(3, T.Q4_1),
    "Q5_0": Mix(8, T.Q5_0, {"ffn_down": _if_weighted(T.Q5_1)}),
    "Q5_1": Mix(9, T.Q5_1),
    "Q2_K": Mix(
        10,
        T.Q2_K,
        {
            "attn_v": _grouped(T.Q4_K, T.Q3_K),
            "ffn_down": _always(T.Q3_K),
            "attn_output": _by_experts(T.Q3_K, T.Q5_K),
        },
    ),
    "Q3_K_S": Mix(11, T.Q3_K, {"attn_output": _by_experts(None, T.Q5_K)}),
    "Q3_K_M": Mix(
        12,
        T.Q3_K,
        {
            "attn_v": _up_to(2, T.Q5_K, T.Q4_K),
            "ffn_down": _first(16, T.Q5_K, T.Q4_K),
            "attn_output": _by_experts(T.Q4_K, T.Q5_K),
        },
    ),
    "Q3_K_L": Mix(
        13,
        T.Q3_K,
        {
            "attn_v": _always(T.Q5_K),
            "ffn_down": _always(T.Q5_K),
            "attn_output": _by_experts(T.Q5_K, None),
        },
    ),
    "Q4_K_S": Mix(
        14,
        T.Q4_K,
        {
            "attn_v": _up_to(4, T.Q5_K),
            "ffn_down": _first(8, T.Q5_K),
            "attn_output": _by_experts(None, T.Q5_K),
        },
    ),
    "Q4_K_M": Mix(
        15,
        T.Q4_K,
        {
            "attn_v": _more(T.Q6_K),
            "ffn_down": _more(T.Q6_K),
            "attn_output": _by_experts(None, T.Q5_K),
        },
    ),
    "Q5_K_S": Mix(16, T.Q5_K),
    "Q5_K_M": Mix(17, T.Q5_K, {"attn_v": _more(T.Q6_K), "ffn_down": _more(T.Q6_K)}),
    "Q6_K": Mix(18, T.Q6_K),
}

# What a row gets that the blocks of a type do not divide; F16 where these do not either.
FALLBACKS = {
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}

# Parts of names that a rule may be for.
_KINDS = ("attn_v.weight", "attn_k.weight", "attn_output.weight", "ffn_down")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Wishes:
    """What a user wants otherwise: `tensor_types` are (pattern, type), the first that is found in
    a name counts; `pure` leaves the rules out."""

    pure: bool = False
    output_type: GGMLType | None = None
    token_embedding_type: GGMLType | None = None
    tensor_types: Sequence[tuple[str, GGMLType]] = ()


def target_types(
    tensors: Mapping[str, tuple[tuple[int, ...], GGMLType]],
    mix: Mix,
    model: Model,
    wishes: Wishes,
    weighted: bool = False,
) -> dict[str, GGMLType]:
    """The type that each tensor, name -> (shape, present type), is to have.

    `weighted`: there are importances. Norms, vectors and the like keep their type.
    """
    tied = "output.weight" not in tensors
    targets = {}
    for name, (shape, qtype) in tensors.items():
        targets[name] = qtype
        if is_matrix(name, shape):
            output = name == "output.weight" or (tied and name == "token_embd.weight")
            chosen = _wished(name, mix, wishes)
            if chosen is None and wishes.pure:
                chosen = mix.qtype
            if chosen is None:
                chosen = (
                    _of_output(shape[-1], mix, wishes)
                    if output
                    else _of_layer(name, mix, model, weighted)
                )
            targets[name] = _fitting(chosen, shape[-1])
    return targets


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one of those that are quantized."""
    return (
        math.prod(shape[:-1]) > 1
        and name.endswith("weight")
        and "_norm.weight" not in name
        and "ffn_gate_inp.weight" not in name
    )


def _wished(name: str, mix: Mix, wishes: Wishes) -> GGMLType | None:
    """The type that the user gave a tensor. Patterns are for block formats only, as there."""
    if name == "token_embd.weight" and wishes.token_embedding_type is not None:
        return wishes.token_embedding_type
    if name == "output.weight" and wishes.output_type is not None:
        return wishes.output_type
    if mix.qtype.block_size > 1:
        for pattern, qtype in wishes.tensor_types:
            if re.search(pattern, name):
                return qtype
    return None


def _of_output(cols: int, mix: Mix, wishes: Wishes) -> GGMLType:
    """The output matrix, or the embedding that is used as one, takes more bits than the rest."""
    if mix.qtype.block_size == 1:
        return mix.qtype
    if wishes.output_type is not None:
        return wishes.output_type
    return T.Q8_0 if mix.qtype is T.Q8_0 or cols % mix.qtype.block_size else T.Q6_K


def _of_layer(name: str, mix: Mix, model: Model, weighted: bool) -> GGMLType:
    kind = next((kind for kind in _KINDS if kind in name), "")
    found = _LAYER.match(name)
    if mix.qtype.block_size == 1 or found is None:
        return mix.qtype
    kind = kind.removesuffix(".weight")
    if model.n_experts == 8 and kind in ("attn_k", "attn_v"):
        return T.Q8_0  # small beside the experts
    rule = mix.rules.get(kind)
    chosen = (rule and rule(model, int(found[1]), weighted)) or mix.qtype
    if kind == "attn_v" and model.is_70b and chosen in (T.Q3_K, T.Q4_K):
        return T.Q5_K
    return chosen


def _fitting(qtype: GGMLType, cols: int) -> GGMLType:
    """`qtype`, or what takes its place for rows that its blocks do not divide."""
    if cols % qtype.block_size == 0:
        return qtype
    fallback = FALLBACKS.get(qtype, T.F16)
    return T.F16 if cols % fallback.block_size else fallback
