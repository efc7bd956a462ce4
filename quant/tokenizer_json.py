"""tokenizer.json of Hugging Face's tokenizers library -> the vocabulary keys of a GGUF file.

Two kinds of byte-pair vocabularies come in it. One works on bytes (Llama 3): GGUF's `gpt2`, with
the merges as they are and the name of the rule that splits text first. The other is a SentencePiece
model in other clothes (byte_fallback, U+2581 for a space): GGUF's `llama`, which merges by score.
"""

import re
from collections.abc import Iterator
from typing import Any

from quant.settings import Settings
from quant.token_types import BYTE, NORMAL, UNKNOWN, UNUSED, Added, entries

_BYTE = re.compile("<0x[0-9A-F]{2}>")

# How text is split before it is merged -> llama.cpp's name for it (tokenizer.ggml.pre).
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


def metadata(tokenizer: Settings, rows: int, added: Added) -> dict[str, Any]:
    """Tokens, types, and merges or scores, for an embedding of `rows`; CheckpointError for a kind
    of vocabulary that GGUF's two would not split text like."""
    model = tokenizer.section("model")
    kind = model.text("type", "BPE")
    if kind != "BPE":
        raise tokenizer.wrong("model", f"type {kind}, only BPE is read")
    ids = model.section("vocab")
    texts = _texts(ids, rows)
    pieces = [text if text is not None else f"[PAD{id}]" for id, text in enumerate(texts)]
    types = [NORMAL if text is not None else UNUSED for text in texts]
    merges = list(_merges(model))
    for id, (_, token_type) in added.items():
        if id < len(types):
            types[id] = token_type
    if not model.flag("byte_fallback", False):
        found = entries("gpt2", _split(tokenizer), pieces, types, rows, added)
        found["tokenizer.ggml.merges"] = [" ".join(map(_spaceless, merge)) for merge in merges]
        return found
    for id, text in enumerate(pieces):
        if _BYTE.fullmatch(text):
            types[id] = BYTE
    unknown = ids.values.get(model.text("unk_token", ""))
    if unknown is not None:
        types[unknown] = UNKNOWN
    beyond = {id: token for id, token in added.items() if pieces[id : id + 1] != [token[0]]}
    found = entries("llama", "default", pieces, types, rows, beyond, _scores(pieces, merges))
    found["tokenizer.ggml.add_space_prefix"] = _puts_space(tokenizer)
    if unknown is not None:
        found["tokenizer.ggml.unknown_token_id"] = unknown
    return found


def begins_with_bos(tokenizer: Settings) -> bool:
    """Whether the post-processor puts a special token in front of a text."""
    outer = tokenizer.section("post_processor")
    for step in (outer, *_steps(outer, "processors")):
        template = step.values.get("single")
        if isinstance(template, list) and template and isinstance(template[0], dict):
            return "SpecialToken" in template[0]
    return False


def _texts(ids: Settings, rows: int) -> list[str | None]:
    """Id -> text, None where no token has an id."""
    if not ids.values:
        raise ids.wrong("vocab", "there are no tokens")
    for text, id in ids.values.items():
        if type(id) is not int or not 0 <= id < rows:
            raise ids.wrong("vocab", f"token {text!r} has id {id!r}, of {rows} embeddings")
    texts: list[str | None] = [None] * (max(ids.values.values()) + 1)
    for text, id in ids.values.items():
        if texts[id] is not None:
            raise ids.wrong("vocab", f"two tokens have id {id}")
        texts[id] = text
    return texts


def _merges(model: Settings) -> Iterator[tuple[str, str]]:
    """The pairs, written "a b" or, since 2024, ["a", "b"]."""
    merges = model.values.get("merges")
    if not isinstance(merges, list):
        raise model.wrong("merges", "wanted a list")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(p) is str for p in pair):
            raise model.wrong("merges", f"wanted two tokens, got {merge!r}")
        yield pair[0], pair[1]


def _spaceless(piece: str) -> str:
    """A space inside a piece as llama.cpp's converter writes it: it separates pieces."""
    return piece.replace(" ", chr(ord(" ") + 256))


def _scores(texts: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """What makes merging by score go in the order of the merges: the rank of a token's first."""
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    return [-float(ranks.get(text, 0)) for text in texts]


def _split(tokenizer: Settings) -> str:
    """llama.cpp's name for the rule that text is split by; a wrong one would change numbers and
    names without a word."""
    outer = tokenizer.section("pre_tokenizer")
    for step in (outer, *_steps(outer, "pretokenizers")):
        rule = step.section("pattern").values.get("Regex")
        if rule in _SPLITS:
            return _SPLITS[rule]
    raise tokenizer.wrong("pre_tokenizer", "it splits text by a rule that is not known")


def _puts_space(tokenizer: Settings) -> bool:
    """Whether a space goes in front of a text: a normalizer or a pre-tokenizer does it."""
    normalizer, splitter = tokenizer.section("normalizer"), tokenizer.section("pre_tokenizer")
    steps = [normalizer, *_steps(normalizer, "normalizers")]
    if any(step.text("type", "") == "Prepend" for step in steps):
        return True
    steps = [splitter, *_steps(splitter, "pretokenizers")]
    return any(
        step.text("type", "") == "Metaspace"
        and step.text("prepend_scheme", "always") != "never"
        and step.flag("add_prefix_space", True)
        for step in steps
    )


def _steps(outer: Settings, key: str) -> list[Settings]:
    """The members of a sequence of normalizers, pre-tokenizers or processors."""
    members = outer.values.get(key) or []
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise outer.wrong(key, "wanted a list of objects")
    return [Settings(outer.path, member) for member in members]
