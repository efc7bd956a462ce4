"""The vocabulary of a checkpoint -> the `tokenizer.ggml.*` metadata of a GGUF file.

From a SentencePiece model where there is one, otherwise from tokenizer.json (tokenizer_json.py).
Which of the ids begin and end a text is known in special_tokens.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant import tokenizer_json
from quant.checkpoint import Checkpoint
from quant.settings import CheckpointError
from quant.token_types import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Added, entries

# Mistral numbers the versions of its vocabulary in the name.
SENTENCEPIECE_FILES = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer.model.v2",
    "tokenizer.model.v1",
)


def vocabulary(checkpoint: Checkpoint, rows: int, added: Added) -> dict[str, Any]:
    """Tokens, scores or merges, and types, made as long as the embedding has `rows`.

    `added`: id -> (text, token type) for tokens that stand in settings of the checkpoint. Ids that
    nobody names become unused tokens `[PADn]`. CheckpointError where there is no vocabulary that
    is understood, or one with more tokens than rows.
    """
    if (path := sentencepiece_file(checkpoint)) is not None:
        return sentencepiece_metadata(path, rows, added)
    if checkpoint.has_file("tokenizer.json"):
        return tokenizer_json.metadata(checkpoint.settings("tokenizer.json"), rows, added)
    reason = "no such file, nor tokenizer.json"
    if checkpoint.has_file("tekken.json"):
        reason += "; tekken.json is not read yet, the Hugging Face form of the model has both"
    raise CheckpointError(checkpoint.directory, "tokenizer.model", reason)


def sentencepiece_file(checkpoint: Checkpoint) -> Path | None:
    """The SentencePiece model of a checkpoint, if there is one."""
    for name in SENTENCEPIECE_FILES:
        if checkpoint.has_file(name):
            return checkpoint.file(name)
    return None


def sentencepiece_metadata(path: Path, rows: int, added: Added | None = None) -> dict[str, Any]:
    """The vocabulary of a SentencePiece model, as `vocabulary` says."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise CheckpointError(path, "pieces", "not a SentencePiece model") from error
    n_pieces = pieces.GetPieceSize()
    if n_pieces > rows:
        raise CheckpointError(path, "pieces", f"{n_pieces}, more than the {rows} embeddings")

    texts = [pieces.IdToPiece(id) for id in range(n_pieces)]
    types = [_token_type(pieces, id) for id in range(n_pieces)]
    scores = [pieces.GetScore(id) for id in range(n_pieces)]
    metadata = entries("llama", "default", texts, types, rows, _beyond(texts, added or {}), scores)
    normalized = pieces.Normalize("a  b")
    metadata["tokenizer.ggml.add_space_prefix"] = normalized.startswith("\u2581")
    metadata["tokenizer.ggml.remove_extra_whitespaces"] = "\u2581\u2581" not in normalized
    special = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unknown": pieces.unk_id()}
    special["padding"] = pieces.pad_id()
    for role, id in special.items():
        if id >= 0:
            metadata[f"tokenizer.ggml.{role}_token_id"] = id
    return metadata


def _beyond(texts: list[str], added: Added) -> Mapping[int, tuple[str, int]]:
    """The added tokens that are no pieces of the model, or take a piece's place."""
    return {id: token for id, token in added.items() if texts[id : id + 1] != [token[0]]}


def _token_type(pieces: Any, id: int) -> int:
    if pieces.IsUnknown(id):
        return UNKNOWN
    if pieces.IsControl(id):
        return CONTROL
    if pieces.IsUnused(id):
        return UNUSED
    return BYTE if pieces.IsByte(id) else NORMAL
