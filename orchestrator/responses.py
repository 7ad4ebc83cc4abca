"""The messages of a response stream: chunks and completions."""

from collections.abc import Iterator

from amusd.analysis.timeline import TimelineEvent
from amusd.protocol.finish import FinishReason
from amusd.rpc import codec, statistics_codec, timeline_codec
from amusd.sampling.parameters import TokenLogprobs
from amusd.v1 import orchestrator_pb2, sampling_pb2
from orchestrator.completion_output import CompletionOutput, OutputChunk
from orchestrator.session_plan import Outcome, SessionPlan
from orchestrator.text import TextCodec


def chunk_response(chunk: OutputChunk, text: TextCodec) -> orchestrator_pb2.GenerateResponse:
    """Return the message of a chunk; ``text`` knows the texts of single tokens."""
    message = orchestrator_pb2.Chunk(
        token_ids=chunk.tokens,
        text=chunk.text,
        index=chunk.index,
        logprobs=_positions(chunk.logprobs, text, chunk.begins_text),
        prompt_logprobs=_positions(chunk.prompt_logprobs, text),
    )
    return orchestrator_pb2.GenerateResponse(chunk=message)


def completion_response(
    plan: SessionPlan, output: CompletionOutput, outcome: Outcome
) -> orchestrator_pb2.GenerateResponse:
    """Return the message that ends an output, all of whose chunks were taken."""
    rest, stop_text = output.finish(), output.stop_text
    reason = outcome.reason if stop_text is None else FinishReason.STOP
    parameters = plan.sampling.parameters
    completion = orchestrator_pb2.Completion(
        finish_reason=codec.finish_reason_to_proto(reason),
        text=rest,
        session_id=plan.session_id,
        statistics=statistics_codec.statistics_to_proto(outcome.statistics, plan.strategy),
        timeline=timeline_codec.timeline_to_proto(outcome.timeline),
        index=output.index,
        seed=0 if parameters.is_greedy else parameters.seed,
        stop_text=stop_text or "",
        stop_token_id=_stop_token(plan, output, reason),
    )
    return orchestrator_pb2.GenerateResponse(completion=completion)


def event_response(
    event: TimelineEvent, text: TextCodec, named: set[int]
) -> orchestrator_pb2.GenerateResponse:
    """Return the message of an event, with the texts of tokens that are not in ``named`` yet."""
    fresh = sorted(event.token_ids - named)
    named.update(fresh)
    live = orchestrator_pb2.LiveEvent(
        event=timeline_codec.event_to_proto(event),
        texts=[
            orchestrator_pb2.TokenText(token_id=token, text=text.token_bytes(token))
            for token in fresh
        ],
    )
    return orchestrator_pb2.GenerateResponse(event=live)


def _stop_token(plan: SessionPlan, output: CompletionOutput, reason: FinishReason) -> int | None:
    """Return the token that ended an output; None: something else did."""
    token = output.last_token
    is_stop = reason is FinishReason.STOP and output.stop_text is None
    return token if is_stop and token in plan.finish.stop_token_ids else None


def _positions(
    logprobs: tuple[TokenLogprobs, ...], text: TextCodec, begins_text: bool = False
) -> Iterator[sampling_pb2.PositionLogprobs]:
    for number, position in enumerate(logprobs):
        is_first = begins_text and number == 0
        yield sampling_pb2.PositionLogprobs(
            token=_token(position.token, position.logprob, text, is_first),
            top=[_token(token, logprob, text, is_first) for token, logprob in position.top],
        )


def _token(
    token: int, logprob: float, text: TextCodec, begins_text: bool
) -> sampling_pb2.TokenLogprob:
    return sampling_pb2.TokenLogprob(
        token_id=token, logprob=logprob, text=text.token_bytes(token, begins_text)
    )
