"""Log-probabilities in the two shapes of the API."""

from collections.abc import Iterable, Sequence
from typing import Any

from amusd.v1 import sampling_pb2

_LEAST = -9999.0  # JSON has no infinity


def chat_logprobs(positions: Iterable[sampling_pb2.PositionLogprobs]) -> dict[str, Any]:
    """Return the log-probabilities of a choice of a chat."""
    content = [
        {**_token(one.token), "top_logprobs": [_token(top) for top in one.top]} for one in positions
    ]
    return {"content": content, "refusal": None}


def _token(token: sampling_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text.decode(errors="replace"),
        "logprob": max(token.logprob, _LEAST),
        "bytes": list(token.text),
    }


class CompletionLogprobs:
    """The log-probabilities of one choice of a completion, piece by piece.

    A token that is not text alone, such as a part of a character, is written as
    ``bytes:\\xe2\\x82``.
    """

    def __init__(self) -> None:
        """Start at the beginning of the choice's text."""
        self._offset = 0

    def prompt(
        self, text: str, positions: Sequence[sampling_pb2.PositionLogprobs]
    ) -> dict[str, Any]:
        """Return those of a prompt: all its tokens but the first have log-probabilities.

        ``text`` is the whole prompt, so the first token has the text that is before the others;
        empty for a prompt of token ids.
        """
        known = sum(len(one.token.text) for one in positions)
        encoded = text.encode()
        first = encoded[: max(len(encoded) - known, 0)]
        found = _empty()
        self._add(found, sampling_pb2.TokenLogprob(text=first), None)
        self._add_all(found, positions)
        return found

    def tokens(self, positions: Iterable[sampling_pb2.PositionLogprobs]) -> dict[str, Any]:
        """Return those of further tokens of the output."""
        found = _empty()
        self._add_all(found, positions)
        return found

    def _add_all(
        self, found: dict[str, Any], positions: Iterable[sampling_pb2.PositionLogprobs]
    ) -> None:
        for one in positions:
            known = {_name(top.text): max(top.logprob, _LEAST) for top in one.top}
            known[_name(one.token.text)] = max(one.token.logprob, _LEAST)
            self._add(found, one.token, known)

    def _add(
        self,
        found: dict[str, Any],
        token: sampling_pb2.TokenLogprob,
        top: dict[str, float] | None,
    ) -> None:
        found["text_offset"].append(self._offset)
        found["tokens"].append(_name(token.text))
        found["token_logprobs"].append(None if top is None else max(token.logprob, _LEAST))
        found["top_logprobs"].append(top)
        # Bytes that continue a character add no character.
        self._offset += sum(byte & 0xC0 != 0x80 for byte in token.text)


def join_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the log-probabilities of consecutive pieces as one."""
    joined = _empty()
    for part in parts:
        for name, values in part.items():
            joined[name] += values
    return joined


def _empty() -> dict[str, Any]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _name(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
