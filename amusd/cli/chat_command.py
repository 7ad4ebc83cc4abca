"""``amusd chat``: a conversation in the terminal."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from amusd.cli.declared_options import settings_command
from amusd.cli.dialogue import Dialogue
from amusd.cli.generate_command import is_terminal, statistics_line
from amusd.cli.request_settings import RequestSettings
from amusd.cli.server_choice import ServerChoice, errors
from amusd.client import Client, Generation
from amusd.clients.request_options import Options
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.settings import part, setting

_PROMPT = "> "


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What ``amusd chat`` asks for."""

    system: str = setting("", "System message of the conversation.", variable="", unit="text")
    request: RequestSettings = part(RequestSettings())
    server: ServerChoice = part(ServerChoice())


def _chat(settings: ChatSettings) -> None:
    options = settings.request.options()
    with settings.server.client(reuses_prefixes=True) as client:
        client.server_info()  # fails here if nothing answers, not at the first question
        if is_terminal():
            hint = "Ctrl-D ends the conversation, /help shows the commands"
            errors.print(hint, style="dim", highlight=False)
        converse(client, Dialogue(settings.system), options)


def converse(client: Client, dialogue: Dialogue, options: Options) -> None:
    """Answer the lines of standard input until it ends."""
    for line in _lines():
        if line.startswith("/"):
            errors.print(dialogue.command(line), style="dim", highlight=False)
        elif line.strip():
            _answer(client, dialogue, line.strip(), options)


def _answer(client: Client, dialogue: Dialogue, question: str, options: Options) -> None:
    """Stream an answer; Ctrl-C ends it, and what has come of it stays in the conversation."""
    text = ""
    try:
        generation = client.chat(dialogue.ask(question), options)
        try:
            text = _stream(generation)
        finally:
            text = text or generation.text
            generation.close()
    except AmusdError as error:
        print(flush=True)
        errors.print(f"error: {error}", highlight=False)
    except KeyboardInterrupt:
        print(flush=True)
        errors.print("the answer was ended", style="dim")
    finally:
        dialogue.answered(text)


def _stream(generation: Generation) -> str:
    """Print an answer as it comes, then its statistics; return its text."""
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    line = statistics_line(generation.summary(), generation.seed)
    errors.print(line, style="dim", highlight=False)
    return generation.text


def _lines() -> Iterator[str]:
    """Yield the lines that the user writes, until Ctrl-D or the end of standard input.

    Ctrl-C drops the line that is being written.
    """
    has_terminal = is_terminal()
    if has_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415  # input() then edits lines and has a history
    while True:
        try:
            yield input(_PROMPT if has_terminal else "")
        except (EOFError, RuntimeError):  # the latter if there is no standard input at all
            if has_terminal:
                print()
            return
        except UnicodeDecodeError:
            raise InvalidInputError("standard input is not UTF-8: convert it") from None
        except KeyboardInterrupt:
            print()


chat = settings_command(
    "chat",
    "Hold a conversation with the model. Ctrl-C ends an answer, Ctrl-D the conversation.",
    ChatSettings(),
    _chat,
)
