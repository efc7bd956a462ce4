"""The command `chat`: a conversation in a terminal, or one message and its reply.

What belongs to the model or to prompt_toolkit is imported where it is needed: it takes long.
"""

import errno
import io
import sys
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from cpuinfer import options
from cpuinfer.console import BadInput, load, note, prefix_store, read_prompt, utf8
from cpuinfer.progress import Progress
from cpuinfer.terminal.reader import can_prompt, reader
from cpuinfer.terminal.screen import MarkdownScreen, RawScreen
from cpuinfer.terminal.talk import Talk

if TYPE_CHECKING:
    from cpuinfer.llm import LLM
    from cpuinfer.sessions import Sessions
    from cpuinfer.terminal.loop import Chat


def chat(arguments: Namespace) -> None:
    """Talk with a model: in a terminal, or with one message from a pipe."""
    arguments.for_chat = True
    options.sampling(arguments)  # what is out of range is refused before anything is loaded
    typed = sys.stdin is not None and sys.stdin.isatty()
    message = None if typed else read_prompt(None)
    if message is not None and not message.strip():
        raise ValueError("there is no message on standard input")
    if arguments.system is not None:
        arguments.system = utf8(arguments.system, "--system")
    if arguments.once or message is not None:
        _answer(arguments, message)
    else:
        _talk(arguments)


def _answer(arguments: Namespace, message: str | None) -> None:
    """One message, from the terminal where there is none yet, and its reply alone."""
    progress = Progress(io.StringIO() if arguments.once else sys.stderr)
    data = _data_directory() if hasattr(arguments, "resume") else None
    told = _opened(arguments, Talk(partial(RawScreen, sys.stdout), progress), progress, data)
    if message is None:
        try:
            message = reader(None, lambda _: {}, lambda: None).read()
        except EOFError:
            return
    if not told.talk.show(told.conversation.say(message)):
        raise KeyboardInterrupt
    if told.name is not None:
        told.keep()


def _talk(arguments: Namespace) -> None:
    """Messages typed in a terminal, also while the model is loaded, until there are no more."""
    raw = arguments.plain or not can_prompt()
    progress = Progress(sys.stderr)
    talk = Talk(partial(RawScreen if raw else MarkdownScreen, sys.stdout), progress)
    data = _data_directory()
    lines = reader(
        None if arguments.no_save or data is None else data / "history",
        lambda before: told.choices(before),
        partial(_import_markdown, raw),
    )
    with lines.listening():
        told = _opened(arguments, talk, progress, data)

        from cpuinfer.terminal import report, slash

        llm = told.conversation.llm
        llm.prepare(told.conversation.ids)
        talk.tell(f"{report.setup(llm)}, template: {report.template(llm)}")
        if told.name is not None:
            slash.resumed(told)
        talk.tell("/help for commands")
        told.run(lines)


def _opened(arguments: Namespace, talk: Talk, progress: Progress, data: Path | None) -> "Chat":
    """The model loaded, and the conversation to go on with if there is one."""
    with progress:
        sessions = _sessions(data, talk)
        name = _resumed(arguments, sessions)
    llm = load(arguments, progress, None if arguments.no_save else prefix_store(talk.tell))
    return _chat(arguments, llm, talk, sessions, name)


def _chat(
    arguments: Namespace, llm: "LLM", talk: Talk, sessions: "Sessions | None", name: str | None
) -> "Chat":
    """A conversation as it was saved, if it was, with the settings that were given now."""
    from cpuinfer.conversation import Conversation
    from cpuinfer.terminal.loop import Chat

    conversation = Conversation(llm, notice=talk.tell)
    if sessions is not None and name is not None:
        sessions.load(name, conversation)
    conversation.params |= options.sampling(arguments)
    if arguments.system is not None:
        conversation.system = arguments.system
    if hasattr(arguments, "on_full"):
        conversation.on_full = arguments.on_full
    return Chat(conversation, talk, sessions, name, autosave=not arguments.no_save)


def _data_directory() -> Path | None:
    """Where sessions and the messages typed are kept; without it they are not."""
    from cpuinfer import directories

    try:
        return directories.data_directory()
    except OSError as error:
        note(f"conversations cannot be saved: {error.filename}: {error.strerror}")
        return None


def _sessions(data: Path | None, talk: Talk) -> "Sessions | None":
    from cpuinfer.sessions import Sessions

    return None if data is None else Sessions(data / "sessions", talk.tell)


def _resumed(arguments: Namespace, sessions: "Sessions | None") -> str | None:
    """The name of the session to go on with, None for a new one.  Its model is taken if none was
    named; FileNotFoundError and BadInput where there is no such session."""
    from cpuinfer.sessions import SessionError

    if not hasattr(arguments, "resume"):
        return None
    if sessions is None:
        raise ValueError("there is no session to go on with")
    name: str | None = arguments.resume
    if name is None:
        names = [entry.name for entry in sessions.entries() if entry.messages]
        if not names:
            raise ValueError("no session has been saved yet")
        name = names[0]
    elif arguments.model is None and Path(name).is_file():
        raise ValueError(f"--resume {name}: name the model before --resume")
    elif name not in sessions.names():
        known = ", ".join(sessions.names()[-5:]) or "none"
        raise FileNotFoundError(errno.ENOENT, f"no such session; there are: {known}", name)
    try:
        session = sessions.read(name)
    except SessionError as error:
        raise BadInput(str(error)) from None
    if arguments.model is None:
        arguments.model = session.model
    return name


def _import_markdown(raw: bool) -> None:
    """Import what replies are drawn with, while a person types the first message."""
    if not raw:
        import_module("cpuinfer.terminal.markdown")
