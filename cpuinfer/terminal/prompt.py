"""Messages by prompt_toolkit: several lines, history, completion, an editor.

Enter sends; Alt-Enter, Ctrl-J and a backslash at the end begin a new line; a paste is text whatever
its lines.  Ctrl-C clears the message, or leaves where there is none.
"""

import os
import sys
import termios
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from cpuinfer.gguf_errors import escape
from cpuinfer.terminal.editor import edited
from cpuinfer.terminal.reader import MORE, PROMPT, Choices
from cpuinfer.terminal.text import explained

_MENU = 6  # lines of a menu of completions
_PASTE_IS_MARKED, _PASTE_IS_TYPED = "\x1b[?2004h", "\x1b[?2004l"


class PromptReader:
    """See `reader.Reader`."""

    def __init__(
        self, history: Path | None, choices: Choices, when_shown: Callable[[], object]
    ) -> None:
        output = Vt100_Output.from_pty(sys.stdout, os.environ.get("TERM"))
        output.enable_cpr = False  # an answer that comes late would be taken for a message
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=MORE,
            history=InMemoryHistory() if history is None else _History(history),
            completer=_Completer(choices),
            complete_while_typing=False,
            reserve_space_for_menu=_MENU,
            key_bindings=_bindings(),
            enable_suspend=True,
            output=output,
        )
        self._listening = False
        self._when_shown: Callable[[], object] | None = when_shown
        self._session.app.after_render += self._shown

    def read(self, draft: str = "") -> str:
        try:
            text = self._session.prompt(default=draft)
        finally:
            if self._listening:
                self._control(_PASTE_IS_MARKED)
        # Bytes that are no UTF-8.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keys are not echoed, and stay in the terminal's queue as they are, also when Ctrl-C is
        typed."""
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        quiet = list(before)
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        quiet[3] |= termios.NOFLSH
        self._listening = True
        self._control(_PASTE_IS_MARKED)
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            self._listening = False
            termios.tcsetattr(terminal, termios.TCSANOW, before)
            self._control(_PASTE_IS_TYPED)

    def _control(self, sequence: str) -> None:
        sys.stdout.write(sequence)
        sys.stdout.flush()

    def _shown(self, _: Application[str]) -> None:
        if self._when_shown is not None:
            threading.Thread(target=self._when_shown, daemon=True).start()
            self._when_shown = None


class _History(FileHistory):
    """Messages of all sessions in a file for the user alone; without it they are not kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

    def load_history_strings(self) -> Iterable[str]:
        try:
            return super().load_history_strings()
        except OSError:
            return ()

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class _Completer(Completer):
    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/file "):
            path = Document(text.removeprefix("/file "))
            yield from self._paths.get_completions(path, complete_event)
        elif text.startswith("/"):
            before, space, word = text.rpartition(" ")
            for name, meaning in self._choices(before + space).items():
                if name.startswith(word):
                    yield Completion(name, -len(word), display_meta=meaning)


def _bindings() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion:
            buffer.complete_state = None  # it is in the text already
        elif buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if not event.current_buffer.text:
            event.app.exit(exception=KeyboardInterrupt)
        event.current_buffer.reset()

    @keys.add("c-g", filter=typing)
    @keys.add("c-x", "c-e", filter=typing)
    async def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = await run_in_terminal(lambda: _edited(buffer.text), in_executor=True)
        buffer.document = Document(text, len(text))

    return keys


def _edited(text: str) -> str:
    try:
        return edited(text)
    except (OSError, ValueError) as error:
        print(f"cpuinfer: {escape(explained(error))}", file=sys.stderr)
        return text
