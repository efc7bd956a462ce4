"""The texts of a converted file against those of its checkpoint: vocabulary and chat template."""

from collections.abc import Callable
from typing import Any

from cpuinfer.chat import ChatTemplateError
from cpuinfer.chat.jinja import JinjaTemplate
from cpuinfer.chat.worker import Worker
from cpuinfer.gguf import GGUFFile
from cpuinfer.gguf_errors import ModelFormatError
from cpuinfer.tokenizer import Tokenizer, load_tokenizer
from quant.source import Source
from quant.special_tokens import chat_templates, token_text
from quant.vocab import sentencepiece_file

Report = dict[str, Any]

PROSE = (
    "The old lighthouse keeper counted 47 ships that winter, wrote their names into a grey book, "
    "and never once asked where they went. Es war einmal ein Koenig, der hatte drei Toechter."
)
TEXTS = (
    "",
    " ",
    "a",
    " two  spaces,   three, and one at the end ",
    "\n\nline\r\nbreaks\tand\ttabs\n",
    PROSE,
    "It's 3.14159, isn't it? 1,000,000 = 10^6; 0x7FFF -- 100%!",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n",
    '{"key": [1, 2.5e-3, null], "path": "C:\\\\temp"}',
    "Привет, мир! Ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "汉字和标点。日本語のテキスト、한국어 문장입니다.",
    "naïve café, e\u0301 against é, ﬁ ligature, ½ ™ №",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 𝕏 \U0010fffd",
    "\u00a0\u2003\u200b\ufeff odd spaces",
    "zero\x00byte and \x1b[0m control",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "https://example.org/a?b=c&d=%20#e user@example.org",
)
_PIECES = 64  # of the vocabulary, joined to a text

CONVERSATIONS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "What is 2 + 2?\n"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is it so?"}],
)


def vocabulary(source: Source, file: GGUFFile) -> Report:
    """How many texts the two tokenizers split and join alike, and which they do not."""
    try:
        tokenizer = load_tokenizer(file)
        encode, decode = _own_tokenizer(source)
    except ModelFormatError as error:
        return {"skipped": error.reason}
    except ImportError as error:
        return {"skipped": str(error)}
    differ = []
    texts = [*TEXTS, *_texts_of_pieces(tokenizer)]
    for text in texts:
        want = encode(text)
        ids = tokenizer.encode(text, add_bos=False)
        if ids != want:
            differ.append(f"{text[:40]!r} becomes {_short(ids)}, in the checkpoint {_short(want)}")
        elif tokenizer.decode(ids) != decode(ids):
            differ.append(f"{text[:40]!r} becomes {tokenizer.decode(ids)[:40]!r} again")
    return {"compared": len(texts), "differ": differ}


def _own_tokenizer(
    source: Source,
) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """The checkpoint's own way from texts to ids, without BOS, and back; ImportError where the
    library for it is not there."""
    path = sentencepiece_file(source.checkpoint)
    if path is not None:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        return pieces.encode, pieces.decode
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(source.checkpoint.file("tokenizer.json")))

    def encode(text: str) -> list[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    return encode, library.decode


def _texts_of_pieces(tokenizer: Tokenizer) -> list[str]:
    """Every ordinary token of a vocabulary, some of them a text."""
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    texts = [piece.decode() for piece in pieces if _is_text(piece)]
    return ["".join(texts[i : i + _PIECES]) for i in range(0, len(texts), _PIECES)]


def _is_text(piece: bytes) -> bool:
    try:
        return piece.decode().isprintable()
    except UnicodeDecodeError:
        return False


def template(source: Source, file: GGUFFile) -> Report:
    """How many conversations the file's template renders as the checkpoint's does."""
    text = chat_templates(source.checkpoint).get("tokenizer.chat_template")
    if text is None:
        return {"skipped": "the checkpoint has none"}
    try:
        tokenizer = load_tokenizer(file)
        own = Worker(text, "the chat template")
        own.start()
        written = JinjaTemplate(
            file.text("tokenizer.chat_template"), "the chat template", tokenizer
        )
    except ModelFormatError as error:
        return {"skipped": error.reason}
    except ChatTemplateError as error:
        return {"skipped": str(error)}
    differ, refused = [], 0
    for conversation in CONVERSATIONS:
        variables = {
            "messages": conversation,
            "tools": None,
            "add_generation_prompt": True,
            **{f"{role}_token": _token(source, role, tokenizer) for role in ("bos", "eos")},
        }
        try:
            want = own.render(variables)
        except ChatTemplateError:
            want = ""
        if not all(message["content"].strip() in want for message in conversation):
            refused += 1  # or left out; the file's is tried in a plainer form then: nothing alike
            continue
        try:
            found = "".join(segment.text for segment in written.render(conversation))
        except ChatTemplateError as error:
            found = str(error)
        if found != want:
            differ.append(f"{found[:80]!r}, by the checkpoint {want[:80]!r}")
    return {"compared": len(CONVERSATIONS) - refused, "refused": refused, "differ": differ}


def _token(source: Source, role: str, tokenizer: Tokenizer) -> str:
    """The text of BOS or EOS in the checkpoint; where it does not say, the vocabulary's."""
    text = token_text(source.checkpoint, role)
    if text is not None:
        return text
    token = tokenizer.bos_id if role == "bos" else tokenizer.eos_id
    return "" if token is None else tokenizer.token_text(token)


def _short(ids: list[int]) -> str:
    return f"{ids[:12]}{'...' * (len(ids) > 12)}"
