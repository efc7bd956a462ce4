"""A SentencePiece model -> the `tokenizer.ggml.*` metadata of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quant.checkpoint import CheckpointError

# llama_token_type of llama.h
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# What llama.cpp's converter gives pieces that are not in the model: never worth a merge.
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0


def sentencepiece_metadata(
    path: Path, rows: int, added: Mapping[int, tuple[str, int]] | None = None
) -> dict[str, Any]:
    """The vocabulary of a SentencePiece model, made as long as the embedding has `rows`.

    `added`: id -> (text, token type) for tokens beyond the model's pieces. Ids that nobody names
    become unused tokens `[PADn]`. CheckpointError when the file is no such model or has more
    pieces than rows.
    """
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise CheckpointError(path, "pieces", "not a SentencePiece model") from error
    n_pieces = pieces.GetPieceSize()
    if n_pieces > rows:
        raise CheckpointError(path, "pieces", f"{n_pieces}, more than the {rows} embeddings")

    tokens = [pieces.IdToPiece(id) for id in range(n_pieces)]
    scores = [pieces.GetScore(id) for id in range(n_pieces)]
    types = [_token_type(pieces, id) for id in range(n_pieces)]
    for id in range(n_pieces, rows):
        text, token_type = (added or {}).get(id, (f"[PAD{id}]", UNUSED))
        tokens.append(text)
        scores.append(_UNUSED_SCORE if token_type == UNUSED else _ADDED_SCORE)
        types.append(token_type)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }
    special = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unknown": pieces.unk_id()}
    special["padding"] = pieces.pad_id()
    for role, id in special.items():
        if id >= 0:
            metadata[f"tokenizer.ggml.{role}_token_id"] = id
    return metadata


def _token_type(pieces: Any, id: int) -> int:
    if pieces.IsUnknown(id):
        return UNKNOWN
    if pieces.IsControl(id):
        return CONTROL
    if pieces.IsUnused(id):
        return UNUSED
    return BYTE if pieces.IsByte(id) else NORMAL
