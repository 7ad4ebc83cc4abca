"""Errors of the HTTP API in OpenAI's format, and the only mapping of gRPC statuses to HTTP."""

import re
from typing import Any

import grpc

from amusd.protocol.errors import AmusdError
from amusd.rpc import faults

_INVALID = "invalid_request_error"
_SERVER = "server_error"
_LIMIT = "rate_limit_error"

_HTTP_OF = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, _INVALID, None),
    grpc.StatusCode.FAILED_PRECONDITION: (400, _INVALID, None),
    grpc.StatusCode.NOT_FOUND: (404, _INVALID, None),
    grpc.StatusCode.ALREADY_EXISTS: (409, _INVALID, None),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, _LIMIT, "rate_limit_exceeded"),
    grpc.StatusCode.INTERNAL: (500, _SERVER, "internal_error"),
    grpc.StatusCode.UNIMPLEMENTED: (501, _INVALID, "unsupported"),
    grpc.StatusCode.UNAVAILABLE: (503, _SERVER, "unavailable"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, _SERVER, "timeout"),
}
_CONTRACT_NAMES = {
    "num_top": "top_logprobs",
    "num_completions": "n",
    "include_stop": "stop",
    "bad_texts": "bad_words",
    "logprobs.has_prompt": "logprobs",
    "logprobs.num_top": "logprobs",
}
_SUBJECT = re.compile(r"(?:an? \w+ of )?([\w.]+)")
_FIELDS = (
    "model", "messages", "prompt", "max_tokens", "min_tokens", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size",
    "logit_bias", "allowed_token_ids", "bad_words", "seed", "stop", "stop_token_ids", "n",
    "logprobs", "top_logprobs", "response_format", "tools", "strategy", "lookahead",
)  # fmt: skip


class ApiError(Exception):
    """An answer with an HTTP status of 400 or more; the message is one line."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Answer with ``status``; ``param`` names the field of the request that is wrong."""
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that tell a client whether the same request may succeed later."""
        if self.status in (429, 503):
            return [(b"retry-after", b"1")]
        return [(b"x-should-retry", b"false")] if self.status == 501 else []


def bad_field(param: str, message: str) -> ApiError:
    """Return the error for a wrong value of the field ``param``."""
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    """Return the error of a gateway that cannot serve at present."""
    return ApiError(503, message, _SERVER, code="unavailable")


def too_many(message: str) -> ApiError:
    """Return the error for more requests than a limit allows."""
    return ApiError(429, message, _LIMIT, code="rate_limit_exceeded")


def internal() -> ApiError:
    """Return the error for a fault of the gateway itself."""
    return ApiError(500, "unexpected error: see the gateway's log", _SERVER, code="internal_error")


def of_error(error: AmusdError) -> ApiError:
    """Return the answer for an error of this project."""
    return _of_status(faults.status_of(error), str(error))


def of_call(error: grpc.RpcError) -> ApiError:
    """Return the answer for a call that failed."""
    code, details = error.code(), error.details() or error.code().name
    if code is not grpc.StatusCode.DEADLINE_EXCEEDED:
        code = faults.status_of(faults.error_of(error, "orchestrator"))
    return _of_status(code, faults.status_details(details))


def _of_status(code: grpc.StatusCode, message: str) -> ApiError:
    status, kind, name = _HTTP_OF.get(code, _HTTP_OF[grpc.StatusCode.INTERNAL])
    param = _field_in(message) if status == 400 else None
    return ApiError(status, message, kind, param, name)


def _field_in(message: str) -> str | None:
    """Return the field that a message begins with; such a message says what is wrong with it."""
    subject = _SUBJECT.match(message)
    word = subject[1] if subject else ""
    word = _CONTRACT_NAMES.get(word, word)
    return word if word in _FIELDS else None
