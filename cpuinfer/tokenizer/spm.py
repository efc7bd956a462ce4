"""SentencePiece vocabularies (tokenizer.ggml.model = "llama"): GGUF metadata -> a vocabulary whose
every entry was checked -> the sentencepiece library, fed with that vocabulary.

Does not encode or decode: that is the Tokenizer's, in the package itself.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain

import numpy as np
import numpy.typing as npt

from cpuinfer.gguf import GGUFFile

MAX_TOKEN_BYTES = 1 << 20
MAX_LIBRARY_BYTES = 7999  # sentencepiece 0.2.2 and later refuse longer pieces (kMaxPieceSize)

# Tokens with these texts end a generation whatever ids the file names (llama.cpp does the same).
EOG_TEXTS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")
)

#: Characters, more or less, that are encoded at once.
PART = 8192

_PREFIX = "tokenizer.ggml."
_SPACE_INSIDE = re.compile("[^\u2581]\u2581")
_NEXT_WORD = re.compile("(?<=[^ \u2581]) ")
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
# As llama.cpp's convert_hf_to_gguf.py (does_token_look_special): some files call them user-defined.
_LOOKS_CONTROL = re.compile("<[|｜].*[|｜]>", re.DOTALL)


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type, which are those of sentencepiece's pieces."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The V tokens of a file, and what the file says of them.

    `types` differs from the file's: the tokens it names as bos, eos, eot or eom, and user-defined
    ones with a text of `EOG_TEXTS` or of the form <|...|>, are CONTROL here, and the one it names
    as unknown is UNKNOWN, lest a user's text make them. llama.cpp overrides types to the same end.
    """

    texts: list[str]
    types: npt.NDArray[np.int32]  # (V,)
    scores: npt.NDArray[np.float32]  # (V,), a piece with a greater score is made first
    byte_values: dict[int, int]  # byte token -> byte: all 256 of them, or none
    bos_id: int | None
    eos_id: int | None
    unk_id: int
    eog_ids: frozenset[int]
    add_bos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "Vocabulary":
        """Reads tokenizer.ggml.*; ModelFormatError names the key that is missing or wrong.

        Without token types no text could be told from a control token: they must be there.
        """
        texts = _texts(file)
        types = _types(file, texts)
        byte_values = _byte_values(file, texts, types)
        named = _named_ids(file, types)
        add_bos = file.flag(_PREFIX + "add_bos_token", "bos" in named)
        if add_bos and "bos" not in named:
            raise file.error(_PREFIX + "add_bos_token", "true, but there is no bos_token_id")
        for name in named.keys() & {"bos", "eos", "eot", "eom"}:
            if types[named[name]] in (TokenType.NORMAL, TokenType.USER_DEFINED):
                types[named[name]] = TokenType.CONTROL
        if types[named["unknown"]] != TokenType.CONTROL:
            types[named["unknown"]] = TokenType.UNKNOWN
        ends = {named[name] for name in named.keys() & {"eos", "eot", "eom"}}
        control = np.flatnonzero(types == TokenType.CONTROL).tolist()
        return cls(
            texts=texts,
            types=types,
            scores=_scores(file, texts, types),
            byte_values=byte_values,
            bos_id=named.get("bos"),
            eos_id=named.get("eos"),
            unk_id=named["unknown"],
            eog_ids=frozenset(ends).union(t for t in control if texts[t] in EOG_TEXTS),
            add_bos=add_bos,
            add_space_prefix=file.flag(_PREFIX + "add_space_prefix", True),
            remove_extra_whitespaces=file.flag(_PREFIX + "remove_extra_whitespaces", False),
        )


def encoder(file: GGUFFile, vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The function that splits a text into pieces and bytes and returns their ids; "" gives none.

    It puts no space in front and never returns a token of type CONTROL, UNKNOWN (unless there are
    no byte tokens) or USER_DEFINED. ModelFormatError if sentencepiece refuses the vocabulary.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto(vocabulary))
    except RuntimeError as error:
        raise file.error(_PREFIX + "tokens", f"sentencepiece refuses them: {error}") from None
    encode: Callable[[str], list[int]] = processor.encode
    if any(_SPACE_INSIDE.search(text) for text in vocabulary.texts):
        return encode
    return lambda text: list(chain.from_iterable(map(encode, _parts(text))))


def _parts(text: str) -> Iterator[str]:
    """A text cut before spaces, which no piece crosses: the library takes a hundred times the
    memory of what it encodes at once."""
    start = 0
    while cut := _NEXT_WORD.search(text, start + PART):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def model_proto(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as a serialized sentencepiece ModelProto (sentencepiece_model.proto).

    Protocol buffers: a field is (number << 3 | wire type), then a varint (wire type 0), a float32
    (5), or a length and that many bytes (2).
    """
    texts, types = _library_tokens(vocabulary)
    # A SentencePiece: piece = 1 (string), score = 2 (float), type = 3 (varint).
    tail = np.dtype([("score_tag", "u1"), ("score", "<f4"), ("type_tag", "u1"), ("type", "u1")])
    tails = np.empty(len(texts), tail)
    tails["score_tag"], tails["score"] = 2 << 3 | 5, vocabulary.scores
    tails["type_tag"], tails["type"] = 3 << 3, types
    heads = {}  # all before the text, by its length: tags and lengths of message and string
    for size in set(map(len, texts)):
        string = _varint(1 << 3 | 2) + _varint(size)
        heads[size] = _varint(1 << 3 | 2) + _varint(len(string) + size + tail.itemsize) + string
    ends = tails.view(f"V{tail.itemsize}").tolist()
    pieces = [b"".join((heads[len(t)], t, end)) for t, end in zip(texts, ends, strict=True)]
    byte_fallback = int(bool(vocabulary.byte_values))
    trainer = _number(3, 2) + _number(35, byte_fallback)  # model_type BPE
    # add_dummy_prefix and remove_extra_whitespaces off, escape_whitespaces (space: U+2581) on
    normalizer = _text(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return b"".join((*pieces, _text(2, trainer), _text(3, normalizer)))


def _library_tokens(vocabulary: Vocabulary) -> tuple[list[bytes], npt.NDArray[np.int32]]:
    """The tokens as the library gets them: texts, and types (V,).

    Those that may not come out of a text are control tokens, and not by their texts, since the
    library looks single characters up among control tokens too. So are those the library would
    refuse (with a zero byte, or too long): their characters come out one by one.
    """
    texts = [text.encode() for text in vocabulary.texts]
    types = vocabulary.types.copy()
    types[(types == TokenType.USER_DEFINED) | (types == TokenType.UNKNOWN)] = TokenType.CONTROL
    for token, text in enumerate(texts):
        if not text or len(text) > MAX_LIBRARY_BYTES or b"\0" in text:
            types[token] = TokenType.CONTROL
    for token in np.flatnonzero(types == TokenType.CONTROL).tolist():
        texts[token] = b"token %d" % token
    for token, value in vocabulary.byte_values.items():
        texts[token] = b"<0x%02X>" % value  # in capitals
    types[vocabulary.unk_id] = TokenType.UNKNOWN  # exactly one
    return texts, types


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _texts(file: GGUFFile) -> list[str]:
    """The text of every token: UTF-8, at most 1 MiB, no two the same unless empty."""
    tokens = file.array(_PREFIX + "tokens", str)
    if not tokens:
        raise file.error(_PREFIX + "tokens", "there are none")
    texts = []
    for token, raw in enumerate(tokens):
        if len(raw) > MAX_TOKEN_BYTES:
            reason = f"token {token} has {len(raw)} bytes, at most {MAX_TOKEN_BYTES} are allowed"
            raise file.error(_PREFIX + "tokens", reason)
        try:
            texts.append(raw.decode())
        except UnicodeDecodeError:
            raise file.error(
                _PREFIX + "tokens", f"token {token} is not UTF-8: {raw[:40]!r}"
            ) from None
    if len(set(texts)) < len(texts):
        first: dict[str, int] = {}
        for token, text in enumerate(texts):
            if first.setdefault(text, token) != token and text:
                reason = f"tokens {first[text]} and {token} are both {text[:40]!r}"
                raise file.error(_PREFIX + "tokens", reason)
    return texts


def _types(file: GGUFFile, texts: list[str]) -> npt.NDArray[np.int32]:
    """The type of every token, (V,), a copy; user-defined tokens that look like control are so."""
    types: npt.NDArray[np.int32] = file.array(_PREFIX + "token_type", np.int32).copy()
    if len(types) != len(texts):
        raise file.error(_PREFIX + "token_type", f"{len(types)} types for {len(texts)} tokens")
    wrong = np.flatnonzero((types < TokenType.NORMAL) | (types > TokenType.BYTE))
    if wrong.size:
        reason = f"token {wrong[0]} has type {types[wrong[0]]}, expected 1 to 6"
        raise file.error(_PREFIX + "token_type", reason)
    for token in np.flatnonzero(types == TokenType.USER_DEFINED).tolist():
        if texts[token] in EOG_TEXTS or _LOOKS_CONTROL.fullmatch(texts[token]):
            types[token] = TokenType.CONTROL
    for token in [token for token, text in enumerate(texts) if not text]:
        if types[token] not in (TokenType.UNUSED, TokenType.CONTROL):
            raise file.error(
                _PREFIX + "tokens", f"token {token} is empty, but neither unused nor control"
            )
    return types


def _byte_values(file: GGUFFile, texts: list[str], types: npt.NDArray[np.int32]) -> dict[int, int]:
    """The byte of each token of type BYTE. Strictly <0xNN>: `int(text, 16)` would take -1 too."""
    values: dict[int, int] = {}
    tokens: dict[int, int] = {}
    for token in np.flatnonzero(types == TokenType.BYTE).tolist():
        match = _BYTE.fullmatch(texts[token])
        if not match:
            reason = f"token {token} has type byte and text {texts[token][:40]!r}, expected <0xNN>"
            raise file.error(_PREFIX + "tokens", reason)
        value = int(match[1], 16)
        if tokens.setdefault(value, token) != token:
            reason = f"tokens {tokens[value]} and {token} are both byte 0x{value:02X}"
            raise file.error(_PREFIX + "tokens", reason)
        values[token] = value
    if values and len(values) < 256:
        missing = min(set(range(256)) - tokens.keys())
        raise file.error(
            _PREFIX + "tokens", f"{len(values)} of 256 byte tokens, 0x{missing:02X} is missing"
        )
    return values


def _named_ids(file: GGUFFile, types: npt.NDArray[np.int32]) -> dict[str, int]:
    """The token of every key tokenizer.ggml.NAME_token_id by its NAME; "unknown" is always there.

    llama.cpp's defaults stand in for bos (1), eos (2) and unknown (0) if those tokens are fit.
    """
    named = {}
    for key in file.metadata:
        if key.startswith(_PREFIX) and key.endswith("_token_id"):
            token = file.uint(key)
            if token >= len(types):
                reason = f"token {token} does not exist, there are {len(types)}"
                raise file.error(key, reason)
            named[key.removeprefix(_PREFIX).removesuffix("_token_id")] = token
    for token, name in enumerate(("unknown", "bos", "eos")):
        fit = (TokenType.CONTROL, TokenType.CONTROL if token else TokenType.UNKNOWN)
        if token < len(types) and types[token] in fit:
            named.setdefault(name, token)
    if "unknown" not in named:
        raise file.error(_PREFIX + "unknown_token_id", "missing, and token 0 is no unknown token")
    if types[named["unknown"]] == TokenType.BYTE:
        raise file.error(_PREFIX + "unknown_token_id", f"token {named['unknown']} is a byte token")
    return named


def _scores(
    file: GGUFFile, texts: list[str], types: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """The score of every token, (V,).

    Some conversions lose the scores (none, or one value for all pieces) and leave a list of merges.
    Merging by such scores goes from left to right and gives wrong ids, as in llama.cpp; here the
    order of the merges replaces them, and a file without merges is refused.
    """
    scores: npt.NDArray[np.float32] = np.zeros(len(texts), np.float32)
    if _PREFIX + "scores" in file.metadata:
        scores = file.array(_PREFIX + "scores", np.float32)
    if len(scores) != len(texts):
        raise file.error(_PREFIX + "scores", f"{len(scores)} scores for {len(texts)} tokens")
    if np.isnan(scores).any():
        token = int(np.argmax(np.isnan(scores)))
        raise file.error(_PREFIX + "scores", f"the score of token {token} is not a number")
    matched = np.flatnonzero((types == TokenType.NORMAL) | (types == TokenType.UNUSED)).tolist()
    merged = [token for token in matched if len(texts[token]) > 1]
    if len(merged) < 2 or (scores[merged] != scores[merged[0]]).any():
        return scores
    if _PREFIX + "merges" not in file.metadata:
        reason = "missing or the same for all pieces, and there are no merges to tell their order"
        raise file.error(_PREFIX + "scores", reason)
    return _scores_of_merges(file, texts)


def _scores_of_merges(file: GGUFFile, texts: list[str]) -> npt.NDArray[np.float32]:
    """(V,): minus a piece's place in the order in which the merges first make the pieces."""
    token_of = {text: token for token, text in enumerate(texts)}
    made = []
    for index, merge in enumerate(file.array(_PREFIX + "merges", str)):
        left, _, right = merge.decode("utf-8", "replace").partition(" ")
        token = token_of.get(left + right)
        if token is None or left not in token_of or right not in token_of:
            reason = f"merge {index}, {merge[:40]!r}, does not make a token out of two others"
            raise file.error(_PREFIX + "merges", reason)
        made.append(token)
    order = list(dict.fromkeys(made))
    scores = np.full(len(texts), -len(texts), np.float32)
    scores[order] = -np.arange(len(order), dtype=np.float32)
    return scores
