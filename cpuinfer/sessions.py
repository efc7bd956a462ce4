"""Conversations on disk, by name: what `cpuinfer chat --resume` goes on with.

A file holds the messages, the settings, and the tokens that the model had, so that a resumed
conversation goes on as if it had never been left.  Keys and values are in prefixes.py: without
them a resumed conversation is only slower.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cpuinfer.conversation import ON_FULL, Conversation, OnFull
from cpuinfer.gguf_errors import escape
from cpuinfer.sampling import SamplingParams
from quant.partial_file import write_private

_FORMAT = "cpuinfer session 1"
_NAME = re.compile(r"\w[\w.+-]{0,47}")  # with what is put around it, 255 bytes at most
_MOST_TOKENS = 1 << 31  # ids are less
_TITLE = 60  # characters


class SessionError(ValueError):
    """A file that is no session, or a name that none can have."""


@dataclass(frozen=True)
class Session:
    """A conversation as it was at a moment: `model` is the path of the file, `key` LLM.key."""

    format: str
    model: str
    key: str
    updated: str  # ISO 8601
    system: str | None
    params: dict[str, Any]
    on_full: OnFull
    messages: list[dict[str, Any]]
    unread: int
    summary: str | None
    ids: list[int]
    tries: int

    def __post_init__(self) -> None:
        """ValueError or TypeError for what no conversation can be."""
        texts = (self.model, self.key, self.system or "", self.summary or "")
        sound = (
            self.format == _FORMAT
            and _sound_messages(self.messages)
            and all(text.encode() is not None for text in texts)
            and self.on_full in ON_FULL
            and type(self.unread) is type(self.tries) is int
            and self.unread in range(0, len(self.messages) + 1, 2)
            and all(type(token) is int and 0 <= token < _MOST_TOKENS for token in self.ids)
            and datetime.fromisoformat(self.updated).tzinfo is not None
        )
        if not sound:
            raise ValueError
        SamplingParams(**self.params)

    def restore(self, conversation: Conversation) -> None:
        """Put everything but the model into a conversation."""
        conversation.clear()
        conversation.system = self.system
        conversation.params = dict(self.params)
        conversation.on_full = self.on_full
        conversation.messages = list(self.messages)
        conversation.unread = self.unread
        conversation.summary = self.summary
        conversation.tries = self.tries
        if self.key == conversation.llm.key:
            conversation.ids = list(self.ids)


@dataclass(frozen=True)
class Entry:
    """A line of a list of sessions."""

    name: str
    model: str  # the file's name
    updated: datetime
    messages: int
    title: str  # the first words


class Sessions:
    """The sessions in a directory.  `notice` is told of files there that are none."""

    def __init__(self, directory: Path, notice: Callable[[str], None] = lambda _: None) -> None:
        self.directory = directory
        self._notice = notice

    def save(self, name: str, conversation: Conversation) -> None:
        """Write a conversation, for the user alone; OSError, SessionError for the name."""
        path = self._path(name)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        session = Session(
            format=_FORMAT,
            model=str(conversation.llm.path.resolve()),
            key=conversation.llm.key,
            updated=datetime.now().astimezone().isoformat(timespec="seconds"),
            system=conversation.system,
            params=conversation.params,
            on_full=conversation.on_full,
            messages=[dict(message) for message in conversation.messages],
            unread=conversation.unread,
            summary=conversation.summary,
            ids=conversation.ids,
            tries=conversation.tries,
        )
        write_private(path, json.dumps(vars(session)).encode())

    def read(self, name: str) -> Session:
        """A session; SessionError says in one line why there is none."""
        path = self._path(name)
        try:
            fields = json.loads(path.read_bytes())
            # JSON has no other keys than texts.
            bias = fields["params"].pop("logit_bias", None)
            if bias is not None:
                fields["params"]["logit_bias"] = {int(token): x for token, x in bias.items()}
            return Session(**fields)
        except FileNotFoundError:
            raise SessionError(f"there is no session {escape(name)}; {self._known()}") from None
        except OSError as error:
            raise SessionError(f"{escape(str(path))}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            reason = "it is damaged, or not a session of this version"
            raise SessionError(f"{escape(str(path))} is left out: {reason}") from None

    def load(self, name: str, conversation: Conversation) -> None:
        """Go on in `conversation` with what was saved; SessionError leaves it as it is."""
        self.read(name).restore(conversation)

    def entries(self) -> list[Entry]:
        """All sessions, the newest first."""
        found = []
        for name in self.names():
            try:
                session = self.read(name)
            except SessionError as error:
                self._notice(str(error))
                continue
            first = session.messages[0]["content"] if session.messages else ""
            found.append(
                Entry(
                    name=name,
                    model=Path(session.model).name,
                    updated=datetime.fromisoformat(session.updated),
                    messages=len(session.messages),
                    title=" ".join(first.split())[:_TITLE],
                )
            )
        return sorted(found, key=lambda entry: entry.updated, reverse=True)

    def names(self) -> list[str]:
        """Of all files that may be sessions."""
        return [path.stem for path in sorted(self.directory.glob("[!.]*.json"))]

    def new_name(self) -> str:
        """A name that no session has, from the time."""
        stem = name = datetime.now().strftime("%Y-%m-%d-%H%M")
        number = 2
        while self._path(name).exists():
            name, number = f"{stem}-{number}", number + 1
        return name

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise SessionError(
                f"{escape(name)} cannot name a session: letters, digits, _ . + - only, 48 at most"
            )
        return self.directory / f"{name}.json"

    def _known(self) -> str:
        names = [entry.name for entry in self.entries()[:5]]
        return f"there are {', '.join(names)}" if names else "none has been saved yet"


def _sound_messages(messages: list[dict[str, str]]) -> bool:
    """Whether these are turns of texts, each with something in it."""
    roles = [message["role"] for message in messages]
    return roles == ["user", "assistant"] * (len(roles) // 2) and all(
        message["content"].encode() and len(message) == 2 for message in messages
    )
