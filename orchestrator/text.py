"""Text to tokens with the verify model's own tokenizer; needs no torch."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jinja2
from tokenizers import Tokenizer

from amusd.fleet.model_description import BYTES_TOKENIZER
from amusd.library_output import cause_of, one_line
from amusd.pair import PairError, resolve_model
from amusd.protocol.errors import InvalidInputError, NotServedError
from amusd.tokenizer.model_tokenizer import make_tokenizer
from amusd.tokenizer.tokenizer_files import TokenizerFiles, read_tokenizer_files
from orchestrator.chat import Message
from orchestrator.chat_template import ChatTemplates
from orchestrator.chat_tokens import ChatEncoder, encode_text
from orchestrator.detokenizer import ByteDecoder, Detokenizer, NoDecoder, TextDecoder
from orchestrator.text_bound import TextBound
from orchestrator.token_bytes import TokenBytes

_NO_ARGUMENTS: Mapping[str, Any] = MappingProxyType({})


class TextCodec(Protocol):
    """A tokenizer."""

    has_text: bool
    """Whether there is one; without it, outputs have no text."""

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the tokens of a plain text, with the model's special tokens at its start.

        Raises:
            InvalidInputError: the text has more tokens than ``max_tokens`` in any case.
        """

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any] = _NO_ARGUMENTS,
        parse_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation up to where the assistant goes on.

        Args:
            messages: the conversation, 1 message or more.
            arguments: further variables of the chat template, such as ``tools``.
            parse_special_tokens: whether names of special tokens in the messages become tokens.
            max_tokens: a conversation that has more tokens in any case is refused untokenized.

        Raises:
            InvalidInputError: the template refuses the messages, or they are too long.
        """

    def encode_part(self, text: str) -> list[int]:
        """Return the tokens of a short text that stands somewhere in an output.

        Raises:
            NotServedError: the model has no tokenizer.
        """

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output; its text continues the text of ``prompt``."""

    def token_bytes(self, token: int, begins_text: bool = False) -> bytes:
        """Return the text of a token as bytes, which may be a part of a character.

        A token that ``begins_text`` may lack the space before its word.
        """


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
        return _model_text(read_tokenizer_files(resolve_model(name, "verify")))
    except jinja2.TemplateError as error:
        raise InvalidInputError(
            f"the chat template of {name!r} is broken: {one_line(error)}; name "
            "another tokenizer with --tokenizer"
        ) from error
    except (OSError, ValueError, PairError, ImportError) as error:
        reason = cause_of(error)
        raise InvalidInputError(
            f"cannot load the tokenizer of {name!r}: {reason}; name a folder or a hub id with "
            "tokenizer.json with --tokenizer"
        ) from error


def _model_text(files: TokenizerFiles) -> "ModelText":
    made = make_tokenizer(files)
    tokenizer = made.tokenizer
    tokenizer.encode_special_tokens = bool(files.config.get("split_special_tokens"))
    return ModelText(tokenizer, files.templates, made.special_tokens.texts())


class ModelText:
    """The tokenizer of a model, with its chat templates."""

    has_text = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        """Use ``tokenizer``; ``templates`` is one chat template in Jinja, or several by name.

        Raises:
            jinja2.TemplateError: a template is broken.
        """
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._token_bytes = TokenBytes(tokenizer, self._detokenizer)
        if isinstance(templates, str):
            templates = {"default": templates}
        self._bound = TextBound.of(tokenizer)
        self._chat = ChatEncoder(
            tokenizer, ChatTemplates(templates or {}, special_tokens), self._bound
        )

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the tokens of a plain text."""
        self._bound.check(text, max_tokens)
        return encode_text(self._tokenizer, text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any] = _NO_ARGUMENTS,
        parse_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation up to where the assistant goes on."""
        encode = self._chat.encode_parsed if parse_special_tokens else self._chat.encode
        return encode(messages, arguments, max_tokens)

    def encode_part(self, text: str) -> list[int]:
        """Return the tokens of a text that stands somewhere in an output."""
        return encode_text(self._tokenizer, text, add_special_tokens=False)

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output; its text continues the text of ``prompt``."""
        return self._detokenizer.decoder(prompt)

    def token_bytes(self, token: int, begins_text: bool = False) -> bytes:
        """Return the text of a token as bytes."""
        return self._token_bytes.of(token, begins_text)


class ByteText:
    """Tokenizer of synthetic models: tokens 0 to 255 are UTF-8 bytes, others have no text."""

    has_text = True

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the bytes of a text."""
        TextBound(1).check(text, max_tokens)
        return list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any] = _NO_ARGUMENTS,
        parse_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Raise NotServedError: a synthetic model has no chat template."""
        raise NotServedError("the model has no chat template: send the prompt as text")

    def encode_part(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one output."""
        return ByteDecoder()

    def token_bytes(self, token: int, begins_text: bool = False) -> bytes:
        """Return the byte of a token."""
        return bytes([token]) if token < 256 else b""


class NoText:
    """Replaces the tokenizer of a model without one: prompts are token ids, output has no text."""

    has_text = False

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Raise NotServedError."""
        raise NotServedError("this server has no tokenizer: send the prompt as token ids")

    def encode_chat(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any] = _NO_ARGUMENTS,
        parse_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Raise NotServedError."""
        return self.encode("")

    def encode_part(self, text: str) -> list[int]:
        """Raise NotServedError."""
        return self.encode("")

    def decoder(self, prompt: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder whose text is always empty."""
        return NoDecoder()

    def token_bytes(self, token: int, begins_text: bool = False) -> bytes:
        """Return no text."""
        return b""
