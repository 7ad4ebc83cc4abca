"""Reads and writes one HTTP exchange over ASGI, with bounds on size and time."""

import asyncio
from collections.abc import Iterable
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from gateway.api_errors import ApiError

_BODY_SECONDS = 30.0
_JSON = (b"content-type", b"application/json")
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
# Proxies such as nginx would hold events back otherwise.
_UNBUFFERED = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
DONE = b"data: [DONE]\n\n"

Header = tuple[bytes, bytes]


class ClientLeftError(Exception):
    """The client has closed its connection, or does not read."""


async def read_json(scope: Scope, receive: Receive, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object of a request.

    Raises:
        ApiError: it is none, has another content type, is too long, or comes too slowly.
        ClientLeftError: the client left before it had sent it.
    """
    _check_type(scope)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            body = await _read_body(receive, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {_BODY_SECONDS:g} s") from None
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is no valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object: send fields in braces")
    return values


def header(scope: Scope, name: bytes) -> str:
    """Return the first value of a header, by its name in small letters; empty if there is none."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


def _check_type(scope: Scope) -> None:
    """Refuse other content types: a page of another site may send those without being asked."""
    kind = header(scope, b"content-type").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the content type is not JSON: send Content-Type: application/json")


async def _read_body(receive: Receive, max_bytes: int) -> bytes:
    parts, num_bytes, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        part = message.get("body", b"")
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise ApiError(413, f"the body has more than {max_bytes} bytes: send a shorter request")
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


class Exchange:
    """The answer to one request: a JSON object, or a stream of events."""

    def __init__(self, scope: Scope, send: Send, write_seconds: float, request_id: str) -> None:
        """Answer over ``send``; a client that does not read for ``write_seconds`` is given up."""
        self._scope = scope
        self._raw_send = send
        self._write_seconds = write_seconds
        self._headers: list[Header] = [(b"x-request-id", request_id.encode("latin-1"))]
        self.status = 0

    @property
    def has_begun(self) -> bool:
        """Whether the status was sent."""
        return bool(self.status)

    async def send_json(self, status: int, value: Any, more: Iterable[Header] = ()) -> None:
        """Send the whole answer."""
        body = orjson.dumps(value)
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [_JSON, length, *more])
        await self._send({"type": "http.response.body", "body": body})

    async def begin_events(self) -> None:
        """Send the status of a stream of events, with the first ones."""
        self._scope["state"]["transport"].hold_next()
        await self._start(200, [_EVENTS, *_UNBUFFERED])

    async def send_events(self, events: Iterable[Any]) -> None:
        """Send events in one piece."""
        await self.send_bytes(b"".join(b"data: " + orjson.dumps(one) + b"\n\n" for one in events))

    async def send_bytes(self, data: bytes, more: bool = True) -> None:
        """Send a piece of the stream; ``more`` is false for the last one."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, *self._headers],
            }
        )

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                await self._raw_send(message)
        except TimeoutError:
            # Closing would wait for the client to read what was written before.
            self._scope["state"]["transport"].abort()
            raise ClientLeftError from None
        except OSError:
            raise ClientLeftError from None
