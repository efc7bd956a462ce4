"""What the bundled model is trained on: stories, simple pages of old novels, and a vocabulary."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece as spm

BOS, EOS = 1, 2
NOVEL_SHARE = 0.2  # of all pages of the novels, the simplest ones are kept
PAGE_CHARS = 1500
PLAIN = str.maketrans(
    dict(zip("\u2018\u2019\u201c\u201d\u2013\u00a0", "''\"\"- ", strict=True))
    | {"\u2014": "--", "\u2026": "...", "_": "", "\ufeff": ""}
)


def plain(text: str) -> str:
    """Return `text` with ASCII quotes and dashes, no emphasis marks and single spaces."""
    text = text.translate(PLAIN).replace("\r\n", "\n")
    return re.sub(r"[ \t]+", " ", text)


def read_stories(folder: Path) -> list[str]:
    """Return the distinct stories of the excerpts in `folder`.

    One file is a JSON list; in the others a single newline parts two stories, a double one two
    paragraphs, except where both are double: there every block is taken for a story of its own
    and nearly all of them drop out as parts of a story known already.
    """
    documents: list[str] = []
    for path in sorted(folder.iterdir(), key=lambda p: (p.suffix != ".json", p.name)):
        text = plain(path.read_text("utf-8", errors="replace"))
        if path.suffix == ".json":
            documents += [plain(story) for story in json.loads(text)]
        else:
            for part in re.split(r"(?<!\n)\n(?!\n)", text):
                documents += [part] if len(part) < 6000 else part.split("\n\n")
    found: dict[str, str] = {}
    known = ""
    for story in sorted((d.strip() for d in documents), key=lambda d: -len(d.split())):
        key = re.sub(r"\W+", "", story).lower()
        if len(key) > 200 and key not in known and story.isascii() and story[-1] in '.!?"':
            found[key] = re.sub(r"\n{2,}", "\n\n", story[0].upper() + story[1:])
            known += "|" + key
    return list(found.values())


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a novel with its hard line wraps undone.

    A paragraph ends at a blank line, after a short line that closes a sentence, and after a
    line too long to have been wrapped. Headings (no closing mark) are left out.
    """
    lines: list[str] = []
    for line in [*plain(text).split("\n"), ""]:
        line = line.strip()
        lines.append(line)
        closes = line.endswith((".", "!", "?", '"')) and len(line) < 55
        if not line or closes or len(line) > 90:
            paragraph = " ".join(lines).strip()
            lines = []
            if len(paragraph) > 20 and paragraph[-1] in '.!?"' and paragraph.isascii():
                yield paragraph


def read_novels(folder: Path, stories: Sequence[str]) -> list[str]:
    """Return the simplest pages of the novels: those whose words the stories use most."""
    counts = Counter(w for story in stories for w in re.findall(r"[a-z]+", story.lower()))
    simple = {word for word, _ in counts.most_common(1500)}
    scored: list[tuple[float, str]] = []
    for path in sorted(folder.iterdir()):
        page: list[str] = []
        for paragraph in paragraphs(path.read_text("utf-8", errors="replace")):
            page.append(paragraph)
            if sum(map(len, page)) >= PAGE_CHARS:
                text = "\n\n".join(page)
                words = re.findall(r"[a-z]+", text.lower())
                scored.append((sum(w in simple for w in words) / max(len(words), 1), text))
                page = []
    scored.sort(reverse=True)
    return [text for _, text in scored[: int(NOVEL_SHARE * len(scored))]]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """Return a SentencePiece BPE model (serialized) that gives every text back unchanged."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe",
        vocab_size=vocab_size, byte_fallback=True, split_digits=True,
        character_coverage=0.99999, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, unk_id=0, bos_id=BOS, eos_id=EOS,
        pad_id=-1, num_threads=1, max_sentence_length=1 << 20, minloglevel=1,
    )  # fmt: skip
    return model.getvalue()
