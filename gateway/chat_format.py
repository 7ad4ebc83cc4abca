"""Answers of /v1/chat/completions."""

import uuid
from typing import Any

from amusd.v1 import orchestrator_pb2
from gateway.answer_format import KeptOutput, end_fields, finish_reason
from gateway.job import Job
from gateway.logprob_format import chat_logprobs
from gateway.tool_calls import (
    ArgumentsPiece,
    CallListParser,
    CallStart,
    Event,
    FreeCallParser,
    NamedCallParser,
    ToolCall,
    ToolParser,
)
from gateway.tool_choice import ToolChoice, ToolMode


class ChatFormat:
    """Writes the choices of a chat."""

    id_prefix = "chatcmpl-"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, job: Job) -> None:
        """Write the answer of ``job``."""
        self._job = job
        self._choices = [_Choice(job) for _ in range(job.num_choices)]

    def piece(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> list[dict[str, Any]]:
        """Return the choices of a chunk."""
        choice = self._choices[chunk.index]
        deltas = [choice.begin(), *choice.deltas(chunk.text)]
        extra: dict[str, Any] = {}
        if self._job.token_ids:
            extra["token_ids"] = list(chunk.token_ids)
        logprobs = chat_logprobs(chunk.logprobs) if self._job.logprobs else None
        if (extra or logprobs) and not deltas[1:]:
            deltas.append({})
        found = [_streamed(chunk.index, delta) for delta in deltas if delta is not None]
        if deltas[1:]:
            found[-1] |= {"logprobs": logprobs, **extra}
        return found

    def end(self, prompt: int, completion: orchestrator_pb2.Completion) -> list[dict[str, Any]]:
        """Return the last choices of an output."""
        choice = self._choices[completion.index]
        deltas = [choice.begin(), *choice.deltas(completion.text), *choice.rest()]
        found = [_streamed(completion.index, delta) for delta in deltas if delta is not None]
        last = _streamed(completion.index, {})
        last |= {"finish_reason": choice.reason(completion), **end_fields(self._job, completion)}
        return [*found, last]

    def keep(self, prompt: int, chunk: orchestrator_pb2.Chunk) -> None:
        """Keep a chunk."""
        self._choices[chunk.index].kept.add(chunk)

    def whole(self, prompt: int, completion: orchestrator_pb2.Completion) -> dict[str, Any]:
        """Return the whole choice of an output."""
        choice = self._choices[completion.index]
        kept = choice.kept
        found = {
            "index": completion.index,
            "message": choice.message("".join((*kept.texts, completion.text))),
            "logprobs": chat_logprobs(kept.logprobs) if self._job.logprobs else None,
            "finish_reason": choice.reason(completion),
            **end_fields(self._job, completion),
        }
        if self._job.token_ids:
            found["token_ids"] = kept.token_ids
        return found


class _Choice:
    """The state of one choice."""

    def __init__(self, job: Job) -> None:
        self.kept = KeptOutput()
        self._parser = _parser_of(job.tools)
        self._is_named = job.tools is not None and job.tools.mode is ToolMode.NAMED
        self._max_calls = None if job.tools is None or job.tools.parallel else 1
        self._has_begun = False
        self._num_calls = 0

    def begin(self) -> dict[str, Any] | None:
        """Return the first delta, which names the role; None if it was returned before."""
        if self._has_begun:
            return None
        self._has_begun = True
        return {"role": "assistant", "content": ""}

    def deltas(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas of further text, 0 or more."""
        if self._parser is None:
            return [{"content": text}] if text else []
        return self._deltas_of(self._parser.feed(text))

    def rest(self) -> list[dict[str, Any]]:
        """Return the deltas that the end of the output brings."""
        return self._deltas_of(self._parser.finish()) if self._parser is not None else []

    def message(self, text: str) -> dict[str, Any]:
        """Return the whole message of an output."""
        content: list[str] = []
        calls: list[dict[str, Any]] = []
        for delta in (*self.deltas(text), *self.rest()):
            content.append(delta.get("content", ""))
            for call in delta.get("tool_calls", ()):
                if call["index"] < len(calls):
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
                else:
                    calls.append({name: call[name] for name in ("id", "type", "function")})
        said = "".join(content)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if calls:
            message |= {"content": said or None, "tool_calls": calls}
        return message

    def reason(self, completion: orchestrator_pb2.Completion) -> str:
        """Return why the output ended. As for OpenAI, a named function ends with stop."""
        reason = finish_reason(completion)
        return (
            "tool_calls" if reason == "stop" and self._num_calls and not self._is_named else reason
        )

    def _deltas_of(self, events: list[Event]) -> list[dict[str, Any]]:
        found = (self._delta(event) for event in events)
        return [delta for delta in found if delta is not None]

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case str():
                return {"content": event}
            case ArgumentsPiece(text):
                call: dict[str, Any] = {"function": {"arguments": text}}
                return {"tool_calls": [{"index": self._num_calls - 1, **call}]}
            case CallStart(name):
                return self._started(name, "")
            case ToolCall(name, arguments):
                return self._started(name, arguments)

    def _started(self, name: str, arguments: str) -> dict[str, Any] | None:
        if self._max_calls is not None and self._num_calls >= self._max_calls:
            return None
        call = {
            "index": self._num_calls,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self._num_calls += 1
        return {"tool_calls": [call]}


def _parser_of(tools: ToolChoice | None) -> ToolParser | None:
    match tools.mode if tools is not None else ToolMode.NONE, tools:
        case ToolMode.NAMED, ToolChoice(parameters=parameters):
            (name,) = parameters
            return NamedCallParser(name)
        case ToolMode.REQUIRED, _:
            return CallListParser()
        case ToolMode.AUTO, ToolChoice(parameters=parameters):
            return FreeCallParser(parameters)
    return None


def _streamed(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
