"""Draft and verify services without engines on loopback, under the control of a test.

They run on the test's event loop, and record the requests that they receive.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from amusd.engine.synthetic import SyntheticModel
from amusd.fleet.model_description import ModelDescription, ServiceLimits
from amusd.fleet.vocabulary import Vocabulary
from amusd.protocol.events import Verdict
from amusd.protocol.verify_session import VerifySession
from amusd.rpc import codec, model_codec
from amusd.rpc.channel import SERVER_OPTIONS
from amusd.rpc.faults import Context
from amusd.sampling.parameters import TokenLogprobs
from amusd.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc

WRITER = SyntheticModel(vocabulary=50)
MODEL = ModelDescription(
    name="fake",
    device="cpu",
    dtype="none",
    num_parameters=0,
    context_length=100,
    output_size=50,
    vocabulary=Vocabulary.of([str(token) for token in range(50)]),
)
LIMITS = ServiceLimits(max_sessions=8, max_context=100, max_lookahead=16, max_waiting=2)


def written(prompt: list[int], num_tokens: int) -> list[int]:
    """Return what the model writes after a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(WRITER.next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class FakeVerify(verify_pb2_grpc.VerifyServiceServicer):
    """Verifies with a synthetic model; with ``refusal`` set it ends its sessions with that.

    ``num_computed`` requests of a stream are read before it is refused. The status of the first
    ``num_lost`` refusals is lost on the way. After ``num_free_passes`` passes of a session, the
    next one waits for ``may_go_on``; with ``failure`` set it ends the session with that instead.
    While ``hangs`` is set, calls for its information are not answered. The log-probability that it
    gives a token, if they are asked for, is minus its position.
    """

    model: ModelDescription = MODEL
    num_sessions: int = 0
    refusal: grpc.StatusCode | None = None
    num_computed: int = 1
    num_lost: int = 0
    num_free_passes: int = 1 << 30
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    failure: grpc.StatusCode | None = None
    hangs: bool = False
    opened: list[verify_pb2.VerifyOpen] = field(default_factory=list)
    proposals: list[verify_pb2.VerifyProposals] = field(default_factory=list)

    async def Verify(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> None:
        session: VerifySession | None = None
        num_computed = num_passes = 0
        async for request in request_iterator:
            num_computed += 1
            if request.HasField("open"):
                self.opened.append(request.open)
                session = VerifySession(
                    list(request.open.token_ids),
                    request.open.max_position,
                    16,
                    request.open.epoch,
                )
            else:
                self.proposals.append(request.proposals)
            assert session is not None
            if self.refusal is not None:
                if len(self.opened) <= self.num_lost:
                    await context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core")
                if num_computed == self.num_computed:
                    await context.abort(self.refusal, "the service is shutting down")
                continue
            if request.HasField("proposals"):
                step = request.proposals
                session.offer(step.epoch, step.position, tuple(step.token_ids))
            while session.is_due:
                if num_passes >= self.num_free_passes:
                    if self.failure is not None:
                        await context.abort(self.failure, "the pass failed: out of memory")
                    await self.may_go_on.wait()
                num_passes += 1
                verdict = one_pass(session)
                if self.opened[-1].HasField("logprobs"):
                    verdict = with_logprobs(verdict, session.tokens, self.opened[-1])
                await context.write(codec.verdict_to_proto(verdict))

    async def GetVerifyInfo(  # noqa: N802
        self, request: verify_pb2.GetVerifyInfoRequest, context: Context
    ) -> verify_pb2.GetVerifyInfoResponse:
        while self.hangs:  # noqa: ASYNC110  # the test sets it
            await asyncio.sleep(0.01)
        return verify_pb2.GetVerifyInfoResponse(
            model=model_codec.model_to_proto(self.model),
            limits=model_codec.limits_to_proto(LIMITS),
            num_sessions=self.num_sessions,
        )


def one_pass(session: VerifySession) -> Verdict:
    """Run a pass of the synthetic model."""
    checked = session.begin_pass(16)
    tokens = list(session.tokens)
    predictions = [WRITER.next_token([*tokens, *checked[:n]]) for n in range(len(checked) + 1)]
    return session.end_pass(predictions, 0.001)


def logprobs_of(tokens: list[int], start: int) -> tuple[TokenLogprobs, ...]:
    """Return what the verify service says of ``tokens[start:]``."""
    return tuple(
        TokenLogprobs(token, -float(position))
        for position, token in enumerate(tokens[start:], start)
    )


def with_logprobs(verdict: Verdict, final: list[int], opening: verify_pb2.VerifyOpen) -> Verdict:
    """Return a verdict with the log-probabilities that its session was opened for."""
    is_first = verdict.position == len(opening.token_ids)
    has_prompt = is_first and opening.logprobs.has_prompt
    return replace(
        verdict,
        logprobs=logprobs_of(final, verdict.position),
        prompt_logprobs=logprobs_of(list(opening.token_ids), 1) if has_prompt else (),
    )


class FakeDraftSession:
    """The stream of one drafting session, and where it is."""

    def __init__(self, opening: draft_pb2.ProposeOpen, context: Context) -> None:
        self.head, self.epoch = len(opening.token_ids), opening.epoch
        self._context = context
        self._writing = asyncio.Lock()  # advances and rollbacks come in different calls

    async def propose(self, tokens: list[int]) -> None:
        """Send a proposal; no tokens: there is nothing to propose."""
        async with self._writing:
            proposal = draft_pb2.Proposal(epoch=self.epoch, position=self.head, token_ids=tokens)
            self.head += len(tokens)
            await self._context.write(draft_pb2.ProposeResponse(proposal=proposal))


@dataclass
class FakeDraft(draft_pb2_grpc.DraftServiceServicer):
    """Proposes the next ``num_proposed`` tokens once, then says that it has nothing.

    The tokens are right, unless ``is_wrong``. Rollbacks are answered at once, refused ones with
    ``rollback_refusal``; without ``answers``, only the test answers them. With ``breaks`` set, a
    rollback ends its stream with that status instead. ``events`` has the advances, rollbacks and
    answers by their epoch, in order. ``ended`` is set when a Propose stream has ended. With
    ``num_answered`` set, it proposes nothing after so many opens and advances. While ``hangs`` is
    set, calls for its information are not answered. With ``fails`` there, an advance waits until it
    is set, and then ends its stream with INTERNAL.
    """

    model: ModelDescription = MODEL
    num_sessions: int = 0
    refusal: grpc.StatusCode | None = None
    num_proposed: int = 0
    is_wrong: bool = False
    answers: bool = True
    rollback_refusal: grpc.StatusCode | None = None
    breaks: grpc.StatusCode | None = None
    num_answered: int = 1 << 30
    hangs: bool = False
    fails: asyncio.Event | None = None
    opened: list[draft_pb2.ProposeOpen] = field(default_factory=list)
    rollbacks: list[draft_pb2.RollbackRequest] = field(default_factory=list)
    rollback_streams: list[Context] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    sessions: dict[str, FakeDraftSession] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def Propose(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[draft_pb2.ProposeRequest], context: Context
    ) -> None:
        session: FakeDraftSession | None = None
        num_requests = 0
        try:
            async for request in request_iterator:
                num_requests += 1
                if num_requests > self.num_answered:
                    self.opened += [request.open] if request.HasField("open") else []
                elif request.HasField("open"):
                    session = await self._open(request.open, context)
                else:
                    assert session is not None
                    await self._advance(session, request.advance)
                    if self.fails is not None:
                        await self.fails.wait()
                        await context.abort(grpc.StatusCode.INTERNAL, "the engine failed")
        finally:
            self.ended.set()

    async def Rollback(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[draft_pb2.RollbackRequest], context: Context
    ) -> None:
        self.rollback_streams.append(context)
        async for request in request_iterator:
            self.rollbacks.append(request)
            self.events.append(f"rollback {request.epoch}")
            if self.breaks is grpc.StatusCode.OK:
                return
            if self.breaks is not None:
                await context.abort(self.breaks, "the stream is broken")
            if self.answers:
                await self.answer(request)

    async def answer(self, request: draft_pb2.RollbackRequest) -> None:
        """Answer a rollback on the last Rollback stream."""
        response = draft_pb2.RollbackResponse(session_id=request.session_id, epoch=request.epoch)
        refusal = self.rollback_refusal
        if refusal is not None:
            code: int = refusal.value[0]
            response.error.code, response.error.message = code, "the rollback is refused"
        self.events.append(f"answer {request.epoch}")
        await self.rollback_streams[-1].write(response)
        session = self.sessions.get(request.session_id)
        if refusal is None and session is not None:
            session.epoch, session.head = request.epoch, request.verified_position
            await session.propose([])

    async def _open(self, opening: draft_pb2.ProposeOpen, context: Context) -> FakeDraftSession:
        self.opened.append(opening)
        if self.refusal is not None:
            await context.abort(self.refusal, "the service is shutting down")
        session = self.sessions[opening.session_id] = FakeDraftSession(opening, context)
        tokens = written(list(opening.token_ids), self.num_proposed)
        if self.is_wrong:
            tokens = [(token + 1) % MODEL.output_size for token in tokens]
        await session.propose(tokens)
        return session

    async def _advance(self, session: FakeDraftSession, advance: draft_pb2.ProposeAdvance) -> None:
        self.events.append(f"advance {advance.epoch}")
        if advance.epoch == session.epoch:
            session.head = max(session.head, advance.position + len(advance.token_ids))
            await session.propose([])

    async def GetDraftInfo(  # noqa: N802
        self, request: draft_pb2.GetDraftInfoRequest, context: Context
    ) -> draft_pb2.GetDraftInfoResponse:
        while self.hangs:  # noqa: ASYNC110  # the test sets it
            await asyncio.sleep(0.01)
        return draft_pb2.GetDraftInfoResponse(
            model=model_codec.model_to_proto(self.model),
            limits=model_codec.limits_to_proto(LIMITS),
            num_sessions=self.num_sessions,
        )


class Host:
    """A server with one of these services on it."""

    def __init__(self, service: FakeVerify | FakeDraft) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        if isinstance(service, FakeVerify):
            verify_pb2_grpc.add_VerifyServiceServicer_to_server(service, self.server)
            self._name = "amusd.v1.VerifyService"
        else:
            draft_pb2_grpc.add_DraftServiceServicer_to_server(service, self.server)
            self._name = "amusd.v1.DraftService"
        self.port = 0

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serve, and return the address."""
        self.port = self.server.add_insecure_port(f"{host}:{port}")
        await self.server.start()
        await self.set_serving(True)
        return f"{host}:{self.port}"

    async def set_serving(self, serving: bool) -> None:
        """Set the health of the service."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        await self._health.set(self._name, status)


async def becomes_true(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that other tasks bring about."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nothing signals it
            await asyncio.sleep(0.01)
