"""A conversation in the terminal: the messages so far, and the commands that change them.

It neither reads nor prints; ``chat_command`` does.
"""

from dataclasses import dataclass, field
from typing import Any

from amusd.clients.chat_messages import user_message

HELP = """\
/reset          forget the conversation; the system message stays
/system TEXT    set the system message; without TEXT, remove it
/help           show this
Ctrl-C ends an answer, Ctrl-D the conversation.
A message that begins with a slash needs a space before it."""


@dataclass(slots=True)
class Dialogue:
    """The messages of a conversation, with a system message if there is one."""

    system: str = ""
    _turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages, as a client takes them."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self._turns]

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Add a message of the user and return the conversation to answer."""
        self._turns.append(user_message(text))
        return self.messages

    def answered(self, text: str) -> None:
        """Add the answer, or what has come of it; without any, the question is taken back."""
        if text:
            self._turns.append({"role": "assistant", "content": text})
        else:
            self._turns.pop()

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash, and return what to tell the user."""
        name, _, argument = line.partition(" ")
        match name:
            case "/reset":
                self._turns.clear()
                return "the conversation is empty"
            case "/system":
                self.system = argument.strip()
                return "the system message is set" if self.system else "no system message"
            case "/help":
                return HELP
        return f"there is no command {name}: use /reset, /system, /help"
