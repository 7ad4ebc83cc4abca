"""Text to tokens with the verify model's own tokenizer; needs no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import huggingface_hub
import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from amusd.fleet.model_description import BYTES_TOKENIZER
from amusd.library_output import cause_of
from amusd.pair import PairError, resolve_model
from amusd.protocol.errors import InvalidInputError, NotServedError
from orchestrator.detokenizer import ByteDecoder, Detokenizer, NoDecoder, TextDecoder

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


class TextCodec(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a plain text, with the model's special tokens at its start."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to the assistant's next turn."""

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output; its text continues the text of ``prompt``."""


def load_text_codec(name: str) -> TextCodec:
    """Load a tokenizer by the name of a built-in model, a folder, or a hub id.

    Raises:
        InvalidInputError: the tokenizer is missing or broken, or has no ``tokenizer.json``.
    """
    if not name:
        return NoText()
    if name == BYTES_TOKENIZER:
        return ByteText()
    try:
        location = resolve_model(name, "verify")
        tokenizer = _parse(_read(location, "tokenizer.json"))
        config = json.loads(_read(location, "tokenizer_config.json"))
        template = config.get("chat_template") or _read_optional(location, "chat_template.jinja")
        if isinstance(template, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        return ModelText(tokenizer, template, _special_tokens(config))
    except jinja2.TemplateError as error:
        raise InvalidInputError(
            f"the chat template of {name!r} is broken: {_in_one_line(error)}; name another "
            "tokenizer with --tokenizer"
        ) from error
    except (OSError, ValueError, PairError, ImportError) as error:
        reason = cause_of(error)
        raise InvalidInputError(
            f"cannot load the tokenizer of {name!r}: {reason}; name a folder or a hub id with "
            "tokenizer.json with --tokenizer"
        ) from error


class ModelText:
    """The tokenizer of a model, with its chat template."""

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, special_tokens: dict[str, str]
    ) -> None:
        """Use ``tokenizer``; ``template`` is the Jinja source of the chat template."""
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._special_tokens = special_tokens
        self._template = _compile(template) if template else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a plain text."""
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to the assistant's next turn."""
        if self._template is None:
            raise NotServedError("the model has no chat template: send the prompt as text")
        try:
            text = self._template.render(
                messages=[{"role": one.role, "content": one.content} for one in messages],
                # Templates may test these for none, and Jinja treats undefined differently.
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            reason = _in_one_line(error)
            raise InvalidInputError(f"the chat template refuses the messages: {reason}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output; its text continues the text of ``prompt``."""
        return self._detokenizer.decoder(prompt)


class ByteText:
    """Tokenizer of synthetic models: tokens 0 to 255 are UTF-8 bytes, others have no text."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Raise NotServedError: a synthetic model has no chat template."""
        raise NotServedError("the model has no chat template: send the prompt as text")

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output."""
        return ByteDecoder()


class NoText:
    """Replaces the tokenizer of a model without one: prompts are token ids, output has no text."""

    def encode(self, text: str) -> list[int]:
        """Raise NotServedError."""
        raise NotServedError("this server has no tokenizer: send the prompt as token ids")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Raise NotServedError."""
        return self.encode("")

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder whose text is always empty."""
        return NoDecoder()


def _parse(text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"tokenizer.json: {error}") from error


class _GenerationTag(jinja2.ext.Extension):
    """Renders the content of ``generation`` tags, which mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  # as the library declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _compile(template: str) -> jinja2.Template:
    """Compile a chat template, with the functions and filters that chat templates expect."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    return environment.from_string(template)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens that chat templates use, by name."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _read(location: str, file_name: str) -> str:
    """Read a file of a model folder or of a model on the hub."""
    folder = Path(location)
    if folder.is_dir():
        return (folder / file_name).read_text(encoding="utf-8")
    if folder.is_absolute():
        raise FileNotFoundError(f"no such folder: {location}")
    return Path(huggingface_hub.hf_hub_download(location, file_name)).read_text(encoding="utf-8")


def _read_optional(location: str, file_name: str) -> str | None:
    try:
        return _read(location, file_name)
    except (OSError, ValueError):
        return None
