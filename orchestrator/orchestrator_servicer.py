"""The gRPC face of the orchestrator: checks requests, runs sessions, writes chunks."""

import dataclasses
import uuid
from collections.abc import Sequence

import amusd
from amusd.fleet.model_description import ModelDescription
from amusd.observe.observer import Observer
from amusd.policy.speculation_policy import AsynchronousPolicy
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.protocol.finish import FinishRule
from amusd.protocol.strategy import Strategy
from amusd.rpc import codec, faults, model_codec
from amusd.v1 import orchestrator_pb2, orchestrator_pb2_grpc, sampling_pb2
from orchestrator.admission import Admission
from orchestrator.backends import Backends
from orchestrator.banned_texts import banned_sequences
from orchestrator.chat import chat_from_proto
from orchestrator.completions import ClientCall, Completions
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.output_plan import output_plan
from orchestrator.request_sampling import sampling_of
from orchestrator.session_plan import SessionPlan
from orchestrator.text import NoText, TextCodec
from orchestrator.text_threads import TextThreads


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Serves clients, once the backends are there."""

    def __init__(self, settings: OrchestratorSettings, observer: Observer) -> None:
        """Serve by ``settings``; ``open`` lets requests in."""
        self._observer = observer
        self._settings = settings
        self._backends: Backends | None = None
        self._text: TextCodec = NoText()
        self._text_threads = TextThreads()
        self._admission = Admission(settings.max_sessions)

    def open(self, backends: Backends, text: TextCodec) -> None:
        """Let requests in."""
        self._backends, self._text = backends, text
        self._observer.model_name = backends.verify_model.name

    def close(self) -> None:
        """End the threads of the tokenizer."""
        self._text_threads.close()

    @faults.reported
    async def Generate(  # type: ignore[override]
        self, request: orchestrator_pb2.GenerateRequest, context: faults.Context
    ) -> None:
        """See the protocol."""
        with self._observer.request(context) as watch:
            backends = self._ready()
            outputs = output_plan(request, self._text)
            most = backends.limits.max_sessions
            with self._admission.admitted(outputs.num_completions, most) as seats:
                plan = await self._plan(request, backends)
                timeout = self._settings.client_write_timeout_seconds
                call = ClientCall(context.write, watch, seats, timeout)
                completions = Completions(backends, plan, outputs, self._text, call)
                watch.opened(plan.session_id, len(plan.tokens), plan.strategy.value)
                await faults.send_metadata(context)
                await completions.run()

    @faults.reported
    async def GetServerInfo(
        self, request: orchestrator_pb2.GetServerInfoRequest, context: faults.Context
    ) -> orchestrator_pb2.GetServerInfoResponse:
        """See the protocol."""
        backends, settings = self._ready(), self._settings
        draft_model, known = backends.draft_model, backends.limits
        strategies = list(Strategy) if backends.has_draft else [Strategy.AUTOREGRESSIVE]
        limits = dataclasses.replace(
            known, max_sessions=min(settings.max_sessions, known.max_sessions)
        )
        return orchestrator_pb2.GetServerInfoResponse(
            version=amusd.__version__,
            verify_model=model_codec.model_to_proto(backends.verify_model),
            draft_model=model_codec.model_to_proto(draft_model) if draft_model else None,
            limits=model_codec.limits_to_proto(limits),
            strategies=[codec.strategy_to_proto(strategy) for strategy in strategies],
            default_strategy=codec.strategy_to_proto(settings.default_strategy),
            default_max_tokens=settings.default_max_tokens,
            default_speculative_lookahead=settings.speculative_lookahead,
            default_amusd_lookahead=settings.amusd_lookahead,
            verify_replicas=[
                codec.replica_to_proto(one.status) for one in backends.verify.replicas
            ],
            draft_replicas=[codec.replica_to_proto(one.status) for one in backends.draft.replicas],
        )

    def _ready(self) -> Backends:
        if self._backends is None:
            raise UnavailableError(
                "the orchestrator waits for its draft and verify services: try again soon"
            )
        return self._backends

    async def _plan(
        self, request: orchestrator_pb2.GenerateRequest, backends: Backends
    ) -> SessionPlan:
        """Check a request and fill in the defaults."""
        strategy = codec.strategy_from_proto(request.strategy, self._settings.default_strategy)
        _check_stop_tokens(request.stop_token_ids, backends.verify_model)
        tokens = await self._prompt(request, backends.limits.max_context)
        backends.verify_model.check_tokens(tokens)
        stop_tokens = set(request.stop_token_ids)
        if not request.ignore_eos:
            stop_tokens.update(backends.verify_model.eos_token_ids)
        is_adaptive = self._settings.speculation_policy is AsynchronousPolicy.ADAPTIVE
        max_tokens = self._max_tokens(request, len(tokens), backends.limits.max_context)
        await self._ban_texts(request)
        uses_branches = strategy is Strategy.AMUSD and is_adaptive
        return SessionPlan(
            session_id=uuid.uuid4().hex,
            tokens=tokens,
            strategy=strategy,
            lookahead=self._lookahead(request, strategy, backends.limits.max_lookahead),
            finish=FinishRule(max_tokens, frozenset(stop_tokens)),
            verify_timeout_seconds=self._settings.verify_timeout_seconds,
            draft_timeout_seconds=self._settings.draft_timeout_seconds,
            replica_timeout_seconds=self._settings.replica_timeout_seconds,
            records_timeline=request.timeline,
            streams_timeline=request.stream_timeline,
            max_branches=backends.limits.max_branches if uses_branches else 0,
            policy=self._settings.speculation_policy,
            sampling=sampling_of(request, backends.verify_model, len(tokens), max_tokens),
        )

    async def _ban_texts(self, request: orchestrator_pb2.GenerateRequest) -> None:
        """Add the tokens of the request's bad_texts to those of its bad_words."""
        if request.bad_texts:
            texts = list(request.bad_texts)
            banned = await self._text_threads.run(
                sum(map(len, texts)), lambda: banned_sequences(texts, self._text.encode_part)
            )
            request.sampling.bad_words.extend(sampling_pb2.TokenSequence(ids=one) for one in banned)

    async def _prompt(
        self, request: orchestrator_pb2.GenerateRequest, max_context: int
    ) -> tuple[int, ...]:
        """Return the prompt in tokens. A text is tokenized beside the event loop."""
        match request.WhichOneof("prompt"):
            case "text":
                text = request.text
                tokens = await self._text_threads.run(
                    len(text), lambda: self._text.encode(text, max_context) if text else []
                )
            case "chat":
                _check_messages(len(request.chat.messages), max_context)
                tokens = await self._text_threads.run(
                    request.chat.ByteSize(), lambda: self._encode_chat(request.chat, max_context)
                )
            case "tokens":
                _check_room(len(request.tokens.ids), max_context)
                tokens = list(request.tokens.ids)
            case _:
                raise InvalidInputError("there is no prompt: set text, chat or tokens")
        if not tokens:
            raise InvalidInputError("the prompt is empty: send at least one token or character")
        return tuple(tokens)

    def _encode_chat(self, request: orchestrator_pb2.Chat, max_context: int) -> list[int]:
        chat = chat_from_proto(request)
        return self._text.encode_chat(
            chat.messages, chat.arguments, chat.parse_special_tokens, max_context
        )

    def _max_tokens(
        self, request: orchestrator_pb2.GenerateRequest, num_prompt: int, max_context: int
    ) -> int:
        room = _check_room(num_prompt, max_context)
        if not request.HasField("max_tokens"):
            return min(self._settings.default_max_tokens, room)
        if request.max_tokens < 1:
            raise InvalidInputError(f"max_tokens is {request.max_tokens}: ask for 1 or more")
        if request.max_tokens > room:
            raise InvalidInputError(
                f"the prompt has {num_prompt} tokens, the context {max_context}: "
                f"ask for max_tokens of {room} or less, not {request.max_tokens}"
            )
        return int(request.max_tokens)

    def _lookahead(
        self, request: orchestrator_pb2.GenerateRequest, strategy: Strategy, most: int
    ) -> int:
        if not request.HasField("lookahead"):
            return min(self._default_lookahead(strategy, most), most)
        if not 1 <= request.lookahead <= most:
            raise InvalidInputError(f"lookahead is {request.lookahead}: ask for 1 to {most}")
        return int(request.lookahead)

    def _default_lookahead(self, strategy: Strategy, most: int) -> int:
        if strategy is Strategy.SPECULATIVE:
            return self._settings.speculative_lookahead
        if self._settings.speculation_policy is AsynchronousPolicy.PUBLISHED:
            return most
        return self._settings.amusd_lookahead


def _check_room(num_prompt: int, max_context: int) -> int:
    """Return how many tokens of output have room after a prompt, 1 or more."""
    if num_prompt >= max_context:
        raise InvalidInputError(
            f"the prompt has {num_prompt} tokens, the context {max_context}: shorten the prompt"
        )
    return max_context - num_prompt


def _check_messages(num_messages: int, max_context: int) -> None:
    """Refuse a conversation in which each message has less than a token."""
    if num_messages > max_context:
        raise InvalidInputError(
            f"the chat has {num_messages} messages, the context {max_context} tokens: send fewer"
        )


def _check_stop_tokens(stop_tokens: Sequence[int], model: ModelDescription) -> None:
    """Refuse unknown stop tokens, and more of them than there are tokens."""
    if model.output_size and len(stop_tokens) > model.output_size:
        raise InvalidInputError(
            f"{len(stop_tokens)} stop_token_ids for a vocabulary of {model.output_size} tokens: "
            "send each one once"
        )
    model.check_tokens(stop_tokens)
