"""Text <-> ids, for the vocabulary inside a model file.

spm.py checks SentencePiece vocabularies and hands them to the sentencepiece library, stream.py
turns ids into text one by one. Knows nothing of chat templates: those join ids of control tokens
and of `Tokenizer.encode(content, add_bos=False)`.
"""

import re
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np

from cpuinfer.gguf import GGUFFile
from cpuinfer.tokenizer.spm import TokenType, Vocabulary, encoder
from cpuinfer.tokenizer.stream import StopStrings, StreamDecoder

__all__ = ["StopStrings", "StreamDecoder", "Tokenizer", "load_tokenizer"]

_SUPPORTED = ("llama",)


def load_tokenizer(file: GGUFFile) -> "Tokenizer":
    """The tokenizer of a model file; ModelFormatError names the key that is wrong, missing or asks
    for a kind of tokenizer that is not supported."""
    key = "tokenizer.ggml.model"
    model = file.text(key)
    if model not in _SUPPORTED:
        reason = f"tokenizer {model!r} is not supported, only: {', '.join(_SUPPORTED)}"
        raise file.error(key, reason)
    vocabulary = Vocabulary.from_gguf(file)
    return Tokenizer(vocabulary, encoder(file, vocabulary))


class Tokenizer:
    """Text to ids and back, for one vocabulary. Several threads may use it at once.

    In pieces and in text U+2581 stands for a space, so U+2581 itself is decoded as a space. A
    token of a control type (see `Vocabulary.types`) never comes out of a text unless asked for.
    """

    def __init__(self, vocabulary: Vocabulary, encode_text: Callable[[str], list[int]]) -> None:
        """`encode_text` splits text in which no special token is, and adds no space to it."""
        self.vocab_size = len(vocabulary.texts)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.unk_id = vocabulary.unk_id
        self.eog_ids = vocabulary.eog_ids  # tokens that end a generation
        self.add_bos = vocabulary.add_bos
        self.add_space_prefix = vocabulary.add_space_prefix
        self._vocabulary = vocabulary
        self._encode_text = encode_text
        self._bytes = [text.replace("\u2581", " ").encode() for text in vocabulary.texts]
        for token, value in vocabulary.byte_values.items():
            self._bytes[token] = bytes((value,))
        for token in self._of_type(TokenType.CONTROL, TokenType.UNKNOWN):
            self._bytes[token] = b""

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`. `add_bos` puts BOS in front if the file asks for it (add_bos_token).

        `parse_special` recognises the texts of control tokens (and of the unknown token). Without
        it they are plain text. User-defined tokens are recognised in either case, as sentencepiece
        and llama.cpp do; of those that match at one place, the longest is taken.

        If the file says so (add_space_prefix), a space goes in front of the text, as in
        sentencepiece and llama.cpp, and, with `parse_special`, in front of what follows a control
        token, unless a space is there. That last rule gives mistral-common's ids for rendered
        templates ("[INST] Hello" is [INST], _Hello), where llama.cpp adds a second space. What
        follows a user-defined token gets none, as in sentencepiece: so decoding is exact.

        ValueError for a lone surrogate, which is no text.
        """
        text.encode()  # raises the ValueError; the library would raise a RuntimeError
        if self._vocabulary.remove_extra_whitespaces:
            text = re.sub(" +", " ", text).strip(" ")
        pattern = self._special if parse_special else self._user_defined
        # Text at even places, tokens at odd ones.
        parts = pattern.split(text) if pattern else [text]
        ids = [self.bos_id] if add_bos and self.add_bos and self.bos_id is not None else []
        pending, after_control = self.add_space_prefix, False
        for place, part in enumerate(parts):
            if not part:
                continue
            token = self._token_of[part] if place % 2 else None
            if token is not None and not self._bytes[token]:
                ids.append(token)
                pending, after_control = self.add_space_prefix, True
                continue
            space = " " if pending and not (after_control and part.startswith(" ")) else ""
            pending = False
            if token is None:
                ids += self._encode_text(space + part)
            else:
                ids += [*self._encode_text(space), token]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence from its start: control tokens give nothing, bytes that are not
        UTF-8 give U+FFFD, and the one space that `encode` puts in front is taken off."""
        data = b"".join([self.token_bytes(token) for token in ids])
        if self.add_space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to the text, a leading space included; none for control tokens
        and the unknown token. ValueError if there is no such token."""
        self._check(token)
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """The token as the file writes it ("<s>", "▁the", "<0x0A>"), for display only."""
        self._check(token)
        return self._vocabulary.texts[token]

    def is_control(self, token: int) -> bool:
        """Whether a token marks structure and has no text."""
        self._check(token)
        return bool(self._vocabulary.types[token] == TokenType.CONTROL)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token {token} does not exist, there are {self.vocab_size}")

    def _of_type(self, *types: TokenType) -> list[int]:
        found: list[int] = np.flatnonzero(np.isin(self._vocabulary.types, types)).tolist()
        return found

    @cached_property
    def _token_of(self) -> dict[str, int]:
        """The tokens that `encode` looks for, by the text it looks for."""
        texts = self._vocabulary.texts
        found = {texts[t]: t for t in self._of_type(TokenType.CONTROL, TokenType.UNKNOWN)}
        for token in self._of_type(TokenType.USER_DEFINED):
            found[texts[token].replace("\u2581", " ")] = token
        found.pop("", None)
        return found

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        return _any_of(self._token_of)

    @cached_property
    def _user_defined(self) -> re.Pattern[str] | None:
        return _any_of(text for text, token in self._token_of.items() if self._bytes[token])


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """What `split` needs to find these texts, the longest first; None if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
