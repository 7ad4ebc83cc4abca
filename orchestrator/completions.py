"""The completions of one request: a session each, all written to one client.

The first session computes the prompt. The others open with its first tokens, on the same verify
replica while that has room, so they find the prompt in the prefix cache. If one fails, all end.
"""

import asyncio
import functools
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from amusd.analysis.timeline import TimelineEvent
from amusd.observe.observer import RequestWatch
from amusd.v1 import orchestrator_pb2
from orchestrator.admission import Seats
from orchestrator.backends import Backends
from orchestrator.client_outbox import ClientOutbox
from orchestrator.completion_output import CompletionOutput, OutputChunk
from orchestrator.emission import Emission
from orchestrator.output_plan import OutputPlan
from orchestrator.responses import chunk_response, completion_response, event_response
from orchestrator.session import Session
from orchestrator.session_plan import SessionPlan
from orchestrator.text import TextCodec

_NUM_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class ClientCall:
    """The call of a client: where messages go, who watches it, and how many sessions it may have.

    The client has to read each message within ``timeout_seconds``.
    """

    write: Callable[[orchestrator_pb2.GenerateResponse], Awaitable[None]]
    watch: RequestWatch
    seats: Seats
    timeout_seconds: float


class Completions:
    """Generates the outputs of one request; ``run`` is called once."""

    def __init__(
        self,
        backends: Backends,
        plan: SessionPlan,
        output_plan: OutputPlan,
        text: TextCodec,
        call: ClientCall,
    ) -> None:
        """Decode ``plan`` on ``backends``, as often as ``output_plan`` says.

        The texts of tokens come from ``text``.
        """
        self._backends = backends
        self._plan = plan
        self._has_stops = bool(output_plan.stops)
        self._text = text
        self._call = call
        self._outputs = output_plan.outputs(text, plan.tokens)
        self._watches = {0: call.watch}
        self._outbox = ClientOutbox(
            self._outputs, self._write_chunk, call.timeout_seconds, self._write_event
        )
        self._named: set[int] = set()  # tokens whose text the client has
        self._has_tokens = asyncio.Event()
        self._sessions: dict[int, Session] = {}

    async def run(self) -> None:
        """Write chunks, and the completion of each output.

        Raises:
            AmusdError: a session failed, after all tokens were written; or the client did not read,
                and the sessions were ended at once.
        """
        generation = asyncio.create_task(self._run_all())
        writer = asyncio.create_task(self._outbox.drain())
        try:
            await asyncio.wait((generation, writer), return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                self._outbox.close()
            await writer
            await generation
        finally:
            for task in (generation, writer):
                task.cancel()
            await asyncio.gather(generation, writer, return_exceptions=True)

    async def _run_all(self) -> None:
        first, *others = self._outputs
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._run_one(self._plan, first))
                if others:
                    await self._has_tokens.wait()
                for output in others:
                    group.create_task(self._run_another(output))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _run_another(self, output: CompletionOutput) -> None:
        """Run the session of a further completion."""
        plan = plan_of_completion(self._plan, output.index, self._sessions[0].verify_address)
        with self._call.watch.another_session() as watch:
            self._watches[output.index] = watch
            watch.opened(plan.session_id, len(plan.tokens), plan.strategy.value)
            await self._run_one(plan, output)

    async def _run_one(self, plan: SessionPlan, output: CompletionOutput) -> None:
        session = Session(
            self._backends,
            plan,
            functools.partial(self._emit, output),
            self._watches[output.index],
            output if self._has_stops else None,
            self._outbox.put_event if plan.streams_timeline else None,
        )
        self._sessions[output.index] = session
        outcome = await session.run()
        self._watches[output.index].finished(outcome.reason.value)
        self._call.seats.give_back()
        await self._outbox.end(
            output, lambda: self._call.write(completion_response(plan, output, outcome))
        )

    def _emit(self, output: CompletionOutput, emission: Emission) -> None:
        self._outbox.put(output, emission)
        self._has_tokens.set()

    async def _write_event(self, event: TimelineEvent) -> None:
        await self._call.write(event_response(event, self._text, self._named))

    async def _write_chunk(self, chunk: OutputChunk) -> None:
        await self._call.write(chunk_response(chunk, self._text))
        if chunk.tokens:
            self._watches[chunk.index].wrote(len(chunk.tokens))


def plan_of_completion(plan: SessionPlan, index: int, verify_address: str) -> SessionPlan:
    """Return the plan of a further completion, with a seed of its own.

    The first one alone has the log-probabilities of the prompt.
    """
    sampling = plan.sampling
    seed = (sampling.parameters.seed + index) % _NUM_SEEDS
    logprobs = sampling.logprobs and replace(sampling.logprobs, has_prompt=False)
    return replace(
        plan,
        session_id=uuid.uuid4().hex,
        sampling=replace(
            sampling, parameters=replace(sampling.parameters, seed=seed), logprobs=logprobs
        ),
        preferred_verify=verify_address,
    )
