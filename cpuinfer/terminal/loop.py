"""The chat: a message is read, the reply is shown, and both are saved."""

from collections.abc import Generator, Mapping

from cpuinfer.conversation import Conversation
from cpuinfer.sessions import Sessions
from cpuinfer.terminal import report, slash
from cpuinfer.terminal.reader import Reader
from cpuinfer.terminal.talk import Talk
from cpuinfer.terminal.text import explained


class Chat:
    """A conversation, and what a person does with it.

    `sessions` is None where there is no place for them; `name` is the session's, None before it is
    saved for the first time; with `autosave` that happens after each reply.
    """

    def __init__(
        self,
        conversation: Conversation,
        talk: Talk,
        sessions: Sessions | None,
        name: str | None = None,
        *,
        autosave: bool = True,
    ) -> None:
        self.conversation = conversation
        self.talk = talk
        self.sessions = sessions
        self.name = name
        self.autosave = autosave and sessions is not None
        self.waiting: list[str] = []  # texts of files, which go before the next message
        self.draft = ""  # what the next message begins with
        self.totals = report.Totals()
        self._save_failed = False
        self._slow_said = False
        self._unsaved = False  # Ctrl-C came before or while a reply was saved

    def run(self, reader: Reader) -> None:
        """Messages until there are no more; KeyboardInterrupt for Ctrl-C instead of one."""
        try:
            while True:
                draft, self.draft = self.draft, ""
                text = reader.read(draft)
                if text.strip():
                    self._turn(text)
        except EOFError:
            pass
        finally:
            if self._unsaved:
                self.keep()
            kept = self.autosave and self.name is not None and not self._save_failed
            if kept and self.conversation.messages:
                self.talk.tell(f"to go on with this: cpuinfer chat --resume {self.name}")

    def choices(self, before: str) -> Mapping[str, str]:
        """What may come next in a command that begins with `before`."""
        return slash.choices(self, before)

    def say(self, text: str) -> None:
        """Send a message.  One that could not be answered is there to be edited."""
        said = len(self.conversation.messages)
        try:
            self.show(self.conversation.say("\n\n".join([*self.waiting, text])))
        finally:
            if len(self.conversation.messages) == said:
                self.draft = text
            else:
                self.waiting.clear()

    def show(self, reply: Generator[str, None, None]) -> None:
        """A reply, what it took, and the session saved."""
        self._unsaved = True
        ended = self.talk.show(reply)
        done = self.conversation.completion
        if ended and done is not None:
            self.totals.add(done)
            self.talk.tell(report.reply(self.conversation))
        else:
            self.talk.tell(f"stopped, {report.context(self.conversation)}")
        self.keep()

    def keep(self) -> None:
        """Save the session, if that happens by itself; what goes wrong is said once."""
        if not self.autosave or (self.name is None and not self.conversation.messages):
            return
        try:
            self.save()
            self._save_failed = self._unsaved = False
        except (OSError, ValueError) as error:
            if not self._save_failed:
                self.talk.tell(f"the conversation is not saved: {explained(error)}")
            self._save_failed = True

    def save(self, name: str | None = None) -> None:
        """Save the session, under another name from now on if there is one, and what the model has
        computed for it; OSError, SessionError."""
        if self.sessions is None:
            raise ValueError("there is no place to save sessions")
        name = name or self.name or self.sessions.new_name()
        self.sessions.save(name, self.conversation)
        self.name = name
        try:
            self.conversation.llm.remember()
        except OSError as error:
            if not self._slow_said:
                reason = "it is saved without keys and values, and will be read again"
                self.talk.tell(f"{reason}: {explained(error)}")
            self._slow_said = True

    def _turn(self, text: str) -> None:
        """A message or a command; what is wrong with it is said, and the chat goes on."""
        try:
            command = slash.parse(text)
            if command is None:
                self.say(slash.message(text))
            else:
                slash.run(self, *command)
        except KeyboardInterrupt:
            self.talk.tell("stopped")
        except (OSError, ValueError) as error:
            self.talk.tell(f"cpuinfer: {explained(error)}")
