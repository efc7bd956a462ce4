"""What GGUF says of each token, whatever kind of vocabulary it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# llama_token_type of llama.h
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# What llama.cpp's converter gives tokens that are in no model: never worth a merge.
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0

#: id -> (text, token type)
Added = Mapping[int, tuple[str, int]]


def entries(
    model: str,
    pre: str,
    texts: Sequence[str],
    types: Sequence[int],
    rows: int,
    added: Added,
    scores: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The keys that list a vocabulary: the tokens known from 0 on, `added` ones beyond or in their
    place, and unused ones up to `rows`. With `scores` the kind that merges by score."""
    tokens, kinds = list(texts), list(types)
    values = list(scores or [])
    for id in range(len(texts), rows):
        tokens.append(f"[PAD{id}]")
        kinds.append(UNUSED)
        values.append(_UNUSED_SCORE)
    for id, (text, kind) in added.items():
        if id < rows:
            tokens[id], kinds[id] = text, kind
            values[id : id + 1] = [_ADDED_SCORE]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
    }
    if scores is not None:
        metadata["tokenizer.ggml.scores"] = np.array(values, np.float32)
    return metadata
