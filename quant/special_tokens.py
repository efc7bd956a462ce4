"""What a checkpoint says of single tokens: added ones, those that begin and end a text, templates.

It is spread over config.json, generation_config.json, tokenizer_config.json, tokenizer.json,
added_tokens.json and chat_template.jinja, none of which has to be there.
"""

from typing import Any

import numpy as np

from quant.checkpoint import Checkpoint
from quant.settings import CheckpointError, Settings
from quant.token_types import CONTROL, USER_DEFINED, Added
from quant.tokenizer_json import begins_with_bos

# What a token that ends a turn, or a message to a tool, is called.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>")
_END_OF_MESSAGE = ("<|eom_id|>",)


def added_tokens(checkpoint: Checkpoint) -> Added:
    """id -> (text, token type) from the three files that may list them, the latest form last."""
    added: dict[int, tuple[str, int]] = {}
    plain = checkpoint.settings("added_tokens.json")
    for text in plain.values:
        added[plain.count(text)] = text, _kind(text, False)
    listed = checkpoint.settings("tokenizer.json").values.get("added_tokens") or []
    for entry in listed if isinstance(listed, list) else []:
        token = Settings(checkpoint.directory / "tokenizer.json", {"added_tokens": entry})
        token = token.section("added_tokens")
        id = token.values.get("id")
        if type(id) is not int or not 0 <= id < 2**31:
            raise token.wrong("added_tokens", f"{id!r} is no token id")
        text = token.text("content")
        added[id] = text, _kind(text, token.flag("special", False))
    decoder = checkpoint.settings("tokenizer_config.json").section("added_tokens_decoder")
    for key in decoder.values:
        token = decoder.section(key)
        if not key.isdecimal():
            raise decoder.wrong("added_tokens_decoder", f"{key!r} is no token id")
        text = token.text("content")
        added[int(key)] = text, _kind(text, token.flag("special", False))
    return added


def _kind(text: str, special: bool) -> int:
    """A token is control where the file says so or, as in llama.cpp's converter, looks so."""
    return CONTROL if special or (text.startswith("<|") and text.endswith("|>")) else USER_DEFINED


def special_ids(checkpoint: Checkpoint, vocab: dict[str, Any]) -> dict[str, Any]:
    """The ids that begin, end and fill a text.

    Each file that names some is heard: the ends are all of theirs. GGUF has one `eos`, and `eot`
    and `eom` for others; all of them are in `eos_token_ids` too, a key that Ollama writes.
    """
    named = _named(checkpoint, vocab["tokenizer.ggml.tokens"])
    found: dict[str, Any] = {
        f"tokenizer.ggml.{role}_token_id": id for role, id in named.items() if role != "eos"
    }
    ends: list[int] = []
    for settings in (checkpoint.config, checkpoint.settings("generation_config.json")):
        ends += [id for id in _ids(settings, "eos_token_id", vocab) if id not in ends]
        for role, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
            for id in _ids(settings, key, vocab)[:1]:
                found.setdefault(f"tokenizer.ggml.{role}_token_id", id)
    if "eos" in named:
        ends = [named["eos"], *(id for id in ends if id != named["eos"])]
    for role, id in _roles(ends, vocab["tokenizer.ggml.tokens"]).items():
        found[f"tokenizer.ggml.{role}_token_id"] = id
    if len(ends) > 1:
        found["tokenizer.ggml.eos_token_ids"] = np.array(ends, np.int32)
    return found


def token_text(checkpoint: Checkpoint, role: str) -> str | None:
    """The text of `bos`, `eos`, `unk` or `pad`, as tokenizer_config.json has it."""
    config = checkpoint.settings("tokenizer_config.json")
    value = config.values.get(f"{role}_token")
    if isinstance(value, dict):
        value = config.section(f"{role}_token").text("content")
    return value if isinstance(value, str) else None


def _named(checkpoint: Checkpoint, tokens: list[str]) -> dict[str, int]:
    """Role -> id of the tokens that tokenizer_config.json names by their text."""
    named = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        text = token_text(checkpoint, key)
        if text is not None and text in tokens:
            named[role] = tokens.index(text)
    return named


def _ids(settings: Settings, key: str, vocab: dict[str, Any]) -> list[int]:
    """The ids of a key that holds one, several or none."""
    if not settings.has(key):
        return []
    value = settings.values[key]
    ids: list[int] = value if isinstance(value, list) else [value]
    n_tokens = len(vocab["tokenizer.ggml.tokens"])
    if key == "pad_token_id" and ids == [-1]:  # Llama 2: none
        return []
    if not all(type(id) is int and 0 <= id < n_tokens for id in ids):
        raise settings.wrong(key, f"{value!r} is no token of this vocabulary")
    return ids


def _roles(ends: list[int], tokens: list[str]) -> dict[str, int]:
    """eos, eot and eom: the first is eos, others by what they are called, then in their order."""
    if not ends:
        return {}
    roles, rest = {"eos": ends[0]}, []
    for id in ends[1:]:
        if tokens[id] in _END_OF_TURN and "eot" not in roles:
            roles["eot"] = id
        elif tokens[id] in _END_OF_MESSAGE and "eom" not in roles:
            roles["eom"] = id
        else:
            rest.append(id)
    free = [role for role in ("eot", "eom") if role not in roles]
    return roles | dict(zip(free, rest, strict=False))


def tokenizer_settings(checkpoint: Checkpoint, vocab: dict[str, Any]) -> dict[str, Any]:
    """What is put around a text: BOS, EOS, a space. tokenizer_config.json decides; without its
    word, tokenizer.json does for byte-pair vocabularies, and others begin with BOS."""
    config = checkpoint.settings("tokenizer_config.json")
    bos = True
    if vocab["tokenizer.ggml.model"] == "gpt2":
        bos = begins_with_bos(checkpoint.settings("tokenizer.json"))
    found = {
        "tokenizer.ggml.add_bos_token": config.flag("add_bos_token", bos),
        "tokenizer.ggml.add_eos_token": config.flag("add_eos_token", False),
    }
    if config.has("add_prefix_space"):
        found["tokenizer.ggml.add_space_prefix"] = config.flag("add_prefix_space", True)
    return found


def chat_templates(checkpoint: Checkpoint) -> dict[str, Any]:
    """The templates word for word: the main one, and others by name."""
    if checkpoint.has_file("chat_template.jinja"):
        path = checkpoint.file("chat_template.jinja")
        try:
            return {"tokenizer.chat_template": path.read_bytes().decode()}
        except UnicodeDecodeError as error:
            raise CheckpointError(path, "text", f"not UTF-8: {error.reason}") from None
    config = checkpoint.settings("tokenizer_config.json")
    if not isinstance(config.values.get("chat_template"), list):
        has_one = config.has("chat_template")
        return {"tokenizer.chat_template": config.text("chat_template")} if has_one else {}
    metadata: dict[str, Any] = {}
    names = []
    for entry in config.values["chat_template"]:
        if not isinstance(entry, dict):
            raise config.wrong("chat_template", f"wanted a name and a template, got {entry!r}")
        template = Settings(config.path, entry)
        name = template.text("name")
        if name != "default":
            names.append(name)
        suffix = "" if name == "default" else f".{name}"
        metadata[f"tokenizer.chat_template{suffix}"] = template.text("template")
    if names:
        metadata["tokenizer.chat_templates"] = names
    return metadata
