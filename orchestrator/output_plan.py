"""What a request asks of its outputs, beside their tokens: how many, and where their texts end."""

from dataclasses import dataclass

from amusd.protocol.errors import InvalidInputError, NotServedError
from amusd.v1 import orchestrator_pb2
from orchestrator.completion_output import CompletionOutput
from orchestrator.stop_text import StopMatcher, StopTexts
from orchestrator.text import TextCodec

MAX_COMPLETIONS = 16


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """The outputs of a request.

    ``continues_prompt`` says whether their text continues the text of the prompt, rather than being
    a text of its own.
    """

    num_completions: int
    stops: StopTexts
    includes_stop: bool
    min_tokens: int
    continues_prompt: bool

    def outputs(self, text: TextCodec, prompt: tuple[int, ...]) -> list[CompletionOutput]:
        """Return new outputs, one a completion."""
        before = prompt if self.continues_prompt else ()
        return [
            CompletionOutput(
                index,
                text.decoder(before),
                StopMatcher(self.stops, self.includes_stop) if self.stops else None,
                self.min_tokens,
                begins_text=not self.continues_prompt,
            )
            for index in range(self.num_completions)
        ]


def output_plan(request: orchestrator_pb2.GenerateRequest, text: TextCodec) -> OutputPlan:
    """Return the outputs that a request asks for.

    Raises:
        InvalidInputError: there are too many of them, or stop texts are out of range.
        NotServedError: there are stop texts, but ``text`` has no tokenizer.
    """
    if request.num_completions > MAX_COMPLETIONS:
        raise InvalidInputError(
            f"num_completions is {request.num_completions}: ask for 1 to {MAX_COMPLETIONS}"
        )
    if request.stream_timeline and request.num_completions > 1:
        raise InvalidInputError(
            f"num_completions is {request.num_completions}: with stream_timeline there can be one"
        )
    stops = StopTexts(request.stop)
    if stops and not text.has_text:
        raise NotServedError("this server has no tokenizer: use stop_token_ids instead of stop")
    return OutputPlan(
        num_completions=request.num_completions or 1,
        stops=stops,
        includes_stop=request.include_stop,
        min_tokens=request.min_tokens,
        continues_prompt=_continues_prompt(request),
    )


def _continues_prompt(request: orchestrator_pb2.GenerateRequest) -> bool:
    if request.WhichOneof("prompt") != "chat":
        return True
    messages = request.chat.messages
    return bool(messages) and messages[-1].role == "assistant"
