"""The /commands of a chat.

A message that begins with "/" and a word of letters is one: "//help" sends "/help", and a path such
as /etc/hosts is no command.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpuinfer.conversation import ON_FULL
from cpuinfer.sessions import Sessions
from cpuinfer.terminal import report, settings

if TYPE_CHECKING:
    from cpuinfer.terminal.loop import Chat

_COMMAND = re.compile(r"/(?:([a-zA-Z]+)(?:\s+(.*))?)?", re.DOTALL)
_LARGEST_FILE = 16 << 20  # bytes; no context holds so much


@dataclass(frozen=True)
class Command:
    """What a command does with the text after it."""

    run: Callable[["Chat", str], None]
    takes: str
    does: str


def parse(text: str) -> tuple[str, str] | None:
    """The name of a command and what follows it; None for a message."""
    found = _COMMAND.fullmatch(text.strip())
    return None if found is None else ((found[1] or "").lower(), (found[2] or "").strip())


def message(text: str) -> str:
    """What is sent of a message: "//help" is how to send "/help"."""
    return text[1:] if text.startswith("//") and parse(text[1:]) else text


def run(chat: "Chat", name: str, argument: str) -> None:
    """EOFError ends the chat; ValueError and OSError say what is wrong."""
    if name not in COMMANDS:
        names = [f"/{known}" for known in COMMANDS]
        problem = settings.unknown("command", f"/{name}", names)
        raise ValueError(f"{problem} (//{name} sends /{name})")
    if argument and not COMMANDS[name].takes:
        raise ValueError(f"/{name} takes nothing behind it; //{name} sends it as a message")
    COMMANDS[name].run(chat, argument)


def choices(chat: "Chat", before: str) -> Mapping[str, str]:
    """What may come next in a command that begins with `before`, each with what it means."""
    match before.split():
        case []:
            return {f"/{name}": command.does for name, command in COMMANDS.items()}
        case ["/set"]:
            return settings.SETTINGS
        case ["/set", "on_full"]:
            return dict.fromkeys(ON_FULL, "")
        case ["/load"] if chat.sessions is not None:
            return dict.fromkeys(chat.sessions.names(), "")
    return {}


# --- what they do ---


def _help(chat: "Chat", _: str) -> None:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        chat.talk.tell(f"/{f'{name} {command.takes}':<{width}}  {command.does}")
    chat.talk.tell("Alt-Enter, Ctrl-J or a backslash at the end begin a new line; Ctrl-G edits")
    chat.talk.tell("Ctrl-C stops a reply; Ctrl-D leaves; //help sends /help")


def _system(chat: "Chat", text: str) -> None:
    if text:
        chat.conversation.system = None if text == "none" else text
    chat.talk.tell(f"system prompt: {chat.conversation.system or 'none'}")


def _set(chat: "Chat", argument: str) -> None:
    name, _, value = argument.partition(" ")
    if value:
        settings.change(chat.conversation, name, value.strip())
    now = settings.shown(chat.conversation.params) | {"on_full": chat.conversation.on_full}
    name = name.replace("-", "_")
    if name in now:
        chat.talk.tell(f"{name} {now[name]}" + ("" if value else f"  ({settings.SETTINGS[name]})"))
    elif name:
        raise ValueError(settings.unknown("setting", name, list(now)))
    else:
        for name, value in now.items():
            chat.talk.tell(f"{name} {value}  ({settings.SETTINGS[name]})")


def _show(chat: "Chat", _: str) -> None:
    for line in report.settings(chat.conversation, chat.name):
        chat.talk.tell(line)


def _clear(chat: "Chat", _: str) -> None:
    chat.conversation.clear()
    chat.waiting.clear()
    chat.name = None  # what was saved stays
    chat.talk.tell("a new conversation")


def _undo(chat: "Chat", _: str) -> None:
    chat.draft = chat.conversation.undo()
    chat.talk.tell(f"taken back: {report.short(chat.draft)}")
    chat.keep()


def _retry(chat: "Chat", _: str) -> None:
    chat.show(chat.conversation.retry())


def _save(chat: "Chat", name: str) -> None:
    if not chat.conversation.messages:
        raise ValueError("there is nothing to save yet")
    if name != chat.name and name in _sessions(chat).names():
        raise ValueError(f"there is a session {name} already: choose another name")
    chat.save(name or None)
    chat.talk.tell(f"saved as {chat.name}")


def _load(chat: "Chat", name: str) -> None:
    if not name:
        raise ValueError("/load NAME; /list shows the names")
    session = _sessions(chat).read(name)
    session.restore(chat.conversation)
    chat.waiting.clear()
    chat.name = name
    if Path(session.model) != chat.conversation.llm.path.resolve():
        chat.talk.tell(f"it was held with {session.model}")
    resumed(chat)


def resumed(chat: "Chat") -> None:
    """Say where the conversation is."""
    messages = len(chat.conversation.messages)
    chat.talk.tell(f"{chat.name}: {messages} messages" + (", the last ones" if messages else ""))
    for line in report.recap(chat.conversation):
        chat.talk.tell(line)


def _list(chat: "Chat", _: str) -> None:
    entries = _sessions(chat).entries()
    if not entries:
        chat.talk.tell("no session has been saved yet")
    for entry in entries:
        mark = "*" if entry.name == chat.name else " "
        when = entry.updated.astimezone().strftime("%Y-%m-%d %H:%M")
        chat.talk.tell(
            f"{mark} {entry.name}  {when}  {entry.messages} messages  {entry.model}  {entry.title}"
        )


def _file(chat: "Chat", name: str) -> None:
    if not name:
        chat.waiting.clear()
        chat.talk.tell("no file is put before your next message")
        return
    text = _text(Path(name).expanduser())
    tokens = report.count(chat.conversation.llm, text)
    limit = chat.conversation.context_length
    if limit is not None and tokens >= limit:
        raise ValueError(f"{name}: {tokens:,} tokens are more than the context of {limit:,}")
    chat.waiting.append(text)
    chat.talk.tell(f"{name}: {tokens:,} tokens, put before your next message")
    window = chat.conversation.llm.config.sliding_window
    if window is not None and tokens > window:
        chat.talk.tell(f"the model sees {window:,} tokens at once, those before only through them")


def _text(path: Path) -> str:
    """The text of a file; OSError, ValueError where there is none."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: it is no file")
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path}: it has more than {_LARGEST_FILE >> 20} MiB")
    try:
        text = path.read_bytes().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise ValueError(f"{path}: it is not text (byte {text.index(chr(0))})")
    return text


def _tokens(chat: "Chat", _: str) -> None:
    for line in report.tokens(chat.conversation, chat.waiting):
        chat.talk.tell(line)


def _stats(chat: "Chat", _: str) -> None:
    for line in chat.totals.lines():
        chat.talk.tell(line)


def _exit(chat: "Chat", _: str) -> None:
    raise EOFError


def _sessions(chat: "Chat") -> Sessions:
    if chat.sessions is None:
        raise ValueError("there is no place for sessions")
    return chat.sessions


COMMANDS = {
    "help": Command(_help, "", "this"),
    "system": Command(_system, "[TEXT]", "the system prompt, or another one (none: without)"),
    "set": Command(_set, "NAME VALUE", "a setting (default: as if it was never set)"),
    "show": Command(_show, "", "model, context, system prompt, settings"),
    "clear": Command(_clear, "", "begin a new conversation"),
    "undo": Command(_undo, "", "take back the last message and its reply"),
    "retry": Command(_retry, "", "another reply to the last message"),
    "save": Command(_save, "NAME", "save the conversation under this name from now on"),
    "load": Command(_load, "NAME", "go on with a saved conversation"),
    "list": Command(_list, "", "the saved conversations"),
    "file": Command(_file, "PATH", "put a text file before the next message (no PATH: none)"),
    "tokens": Command(_tokens, "", "what the conversation takes of the context"),
    "stats": Command(_stats, "", "speed and memory of this run"),
    "exit": Command(_exit, "", "leave"),
}
