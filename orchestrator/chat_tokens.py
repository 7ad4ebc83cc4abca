"""Turns conversations into tokens, and keeps control tokens out of a client's text.

Control tokens are the special tokens, and other added tokens that the chat template itself writes.
Their names in a client's text are enclosed in marks before the template is rendered. In the
rendered text the marks say which names become plain text. The result equals that of Transformers
with ``sanitize_control_tokens``.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer, models

from amusd.library_output import one_line
from amusd.protocol.errors import InvalidInputError
from orchestrator.chat import Message
from orchestrator.chat_template import ChatTemplates
from orchestrator.text_bound import TextBound

_FIRST_MARK = 0xF0000  # the first character of a plane for private use
# Encoded before a text that is not the first, so that no prefix space is added to the text.
_NEWLINE = "\n"


class ChatEncoder:
    """Renders conversations and encodes them. Several threads may use it at a time."""

    def __init__(self, tokenizer: Tokenizer, templates: ChatTemplates, bound: TextBound) -> None:
        """Use the tokenizer and the chat templates of one model."""
        self._tokenizer = tokenizer
        self._templates = templates
        self._bound = bound
        self._control: dict[str, ControlTokens] = {}  # at most one entry a template

    def encode(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; names of control tokens in it are plain text.

        Raises:
            NotServedError: the model has no chat template.
            InvalidInputError: the template or the tokenizer refuses the messages, or they have
                more tokens than ``max_tokens`` in any case.
        """
        control = self._control_tokens(self._templates.choose(arguments).literal_text)
        conversation = [message.as_dict() for message in messages]
        texts = list(_texts([conversation, arguments]))
        for text in texts:
            _check_unicode(text)
        rendered = self._rendered(conversation, arguments, max_tokens)  # before a long search
        if not any(control.spans(text) for text in texts):
            return encode_text(self._tokenizer, rendered, add_special_tokens=False)
        marks = Marks.unused_in(texts)

        def mark(text: str) -> str:
            return marks.enclose(text, control.spans(text))

        rendered = self._templates.render(
            _changed(conversation, mark), _changed(dict(arguments), mark)
        )
        return self._encode_marked(marks.split(rendered), control)

    def encode_parsed(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; names of control tokens in it become these tokens.

        Raises:
            NotServedError: the model has no chat template.
            InvalidInputError: the template or the tokenizer refuses the messages, or they have
                more tokens than ``max_tokens`` in any case.
        """
        conversation = [message.as_dict() for message in messages]
        rendered = self._rendered(conversation, arguments, max_tokens)
        return encode_text(self._tokenizer, rendered, add_special_tokens=False)

    def _rendered(
        self,
        conversation: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        max_tokens: int | None,
    ) -> str:
        """Render a conversation as it is, and refuse it if it cannot fit."""
        rendered = self._templates.render(conversation, arguments)
        self._bound.check(rendered, max_tokens)
        return rendered

    def _control_tokens(self, literal_text: str) -> "ControlTokens":
        """Return the control tokens of a template that holds the texts ``literal_text``."""
        if literal_text not in self._control:
            added = self._tokenizer.get_added_tokens_decoder().values()
            self._control[literal_text] = ControlTokens(
                token.content
                for token in added
                if token.special or (token.content in literal_text and token.content.strip())
            )
        return self._control[literal_text]

    def _encode_marked(self, parts: list[str], control: "ControlTokens") -> list[int]:
        """Return the tokens of a text in parts; names of control tokens are at odd places."""
        is_name = [index % 2 == 1 and part in control.names for index, part in enumerate(parts)]
        names = {part for part, named in zip(parts, is_name, strict=True) if named}
        ids_of_name = {name: self._ids_of_name(name) for name in names}
        ids = encode_text(self._tokenizer, parts[0], add_special_tokens=False)
        others = [
            part for part, named in zip(parts[1:], is_name[1:], strict=True) if part and not named
        ]
        ids_of_others = iter(self._encode_after_newline(others))
        for part, named in zip(parts[1:], is_name[1:], strict=True):
            if named:
                ids += ids_of_name[part]
            elif part:
                ids += next(ids_of_others)
        return ids

    def _encode_after_newline(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts that follow others."""
        newline = encode_text(self._tokenizer, _NEWLINE, add_special_tokens=False)
        encodings = self._tokenizer.encode_batch(
            [_NEWLINE + text for text in texts], add_special_tokens=False
        )
        return [
            encoding.ids[len(newline) :]
            if encoding.ids[: len(newline)] == newline
            else encode_text(self._tokenizer, text, add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _ids_of_name(self, name: str) -> list[int]:
        """Return the tokens of the name of a control token as plain text."""
        newline = encode_text(self._tokenizer, _NEWLINE, add_special_tokens=False)
        ids = self._encode_plain(_NEWLINE + name)
        ids = ids[len(newline) :] if ids[: len(newline)] == newline else self._encode_plain(name)
        if self._tokenizer.token_to_id(name) in ids:
            raise InvalidInputError(
                f"a message holds {name!r}, which this tokenizer cannot encode as plain text: "
                "leave it out, or set parse_special_tokens"
            )
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Return the tokens of ``text``, without a search for added tokens."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        splits = [text]
        if self._tokenizer.pre_tokenizer is not None:
            splits = [part for part, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        model = self._tokenizer.model
        return [token.id for part in splits for token in model.tokenize(part)]


class ControlTokens:
    """Finds the names of control tokens in texts."""

    def __init__(self, names: Iterable[str]) -> None:
        """Find ``names``; where one holds another, the longer one."""
        self.names = frozenset(names)
        # The library searches for all names at once, in linear time and without Python's lock.
        self._finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        self._finder.add_special_tokens(sorted(self.names))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the intervals ``[start, end)`` of the names in ``text``, in characters."""
        found = _encoded(self._finder.encode_batch, text, add_special_tokens=False)
        return [span for token, span in zip(found.ids, found.offsets, strict=True) if token > 0]


@dataclass(frozen=True, slots=True)
class Marks:
    """Two characters that enclose the names of control tokens in a client's text."""

    start: str
    end: str

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> "Marks":
        """Return two characters that no text has."""
        used = set().union(*texts)
        unused = (
            character
            for number in range(_FIRST_MARK, _FIRST_MARK + len(used) + 2)
            if (character := chr(number)) not in used
        )
        return cls(next(unused), next(unused))

    def enclose(self, text: str, spans: Iterable[tuple[int, int]]) -> str:
        """Return ``text`` with marks around the intervals ``spans``."""
        parts, done = [], 0
        for start, end in spans:
            parts += [text[done:start], self.start, text[start:end], self.end]
            done = end
        return "".join([*parts, text[done:]])

    def split(self, text: str) -> list[str]:
        """Return the parts of ``text`` between marks. What two marks enclose is at odd places.

        A template may cut a text between its marks. A mark without its other encloses nothing.
        """
        enclosed = f"{self.start}([^{self.start}{self.end}]*){self.end}"
        return [part or "" for part in re.split(f"{enclosed}|[{self.start}{self.end}]", text)]


def encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Return the tokens of ``text``, in which names of special tokens become these tokens.

    Raises:
        InvalidInputError: the tokenizer refuses the text.
    """
    # Other than ``encode``, the functions for batches release Python's lock: other threads go on.
    return _encoded(tokenizer.encode_batch_fast, text, add_special_tokens).ids


def _check_unicode(text: str) -> None:
    """Refuse a lone surrogate, which can come in JSON: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the tokenizer cannot encode the prompt: {error}") from error


def _encoded(
    encode_batch: Callable[..., list[Encoding]], text: str, add_special_tokens: bool
) -> Encoding:
    _check_unicode(text)
    try:
        [encoding] = encode_batch([text], add_special_tokens=add_special_tokens)
    except Exception as error:  # the library raises no narrower type
        raise InvalidInputError(
            f"the tokenizer cannot encode the prompt: {one_line(error)}"
        ) from error
    return encoding


def _texts(value: Any) -> Iterator[str]:
    """Yield each text in lists and objects, except the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of ``value`` with ``change`` applied to each of its ``_texts``."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _changed(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    return value
