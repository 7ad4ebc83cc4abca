"""The services an orchestrator drives: a pool of each role, and what their models have in common.

The first verify replica that is met settles which model this orchestrator serves, for its prompts
are tokenized for that one; whatever may write other tokens is refused from then on.
"""

import asyncio
import logging
from typing import TypeAlias

from amusd.fleet.load_balancing import ReplicaState, explain_mismatch
from amusd.fleet.model_description import ModelDescription, ServiceLimits, check_pair
from amusd.policy.speculation_length import StepTimes
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.v1 import verify_pb2_grpc
from orchestrator.addresses import Lookup, SystemLookup, parse_entries
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.replica import DRAFT, VERIFY
from orchestrator.replica_pool import Pool
from orchestrator.rollback_stream import DraftStub

log = logging.getLogger(__name__)

_SERVE_THE_SAME = (
    "serve the pool's model there, or restart the orchestrators after all replicas have changed"
)

VerifyPool: TypeAlias = "Pool[verify_pb2_grpc.VerifyServiceAsyncStub]"
DraftPool: TypeAlias = Pool[DraftStub]


class Backends:
    """The pool of verify replicas and, if there is one, the pool of draft replicas."""

    def __init__(self, settings: OrchestratorSettings, lookup: Lookup | None = None) -> None:
        """Prepare the pools; ``lookup`` finds the addresses of host names."""
        lookup = lookup or SystemLookup()
        interval = settings.resolve_interval_seconds
        verify, draft = parse_entries(settings.verify), parse_entries(settings.draft)
        self.verify: VerifyPool = Pool(VERIFY, verify, self._validate_verify, lookup, interval)
        self.draft: DraftPool = Pool(DRAFT, draft, self._validate_draft, lookup, interval)
        self.step_times = StepTimes()
        self._verify_model: ModelDescription | None = None
        self._draft_model: ModelDescription | None = None
        self._limits: ServiceLimits | None = None

    @property
    def has_draft(self) -> bool:
        """Whether sessions are drafted for, as far as there is a draft replica."""
        return bool(self.draft.entries)

    @property
    def verify_model(self) -> ModelDescription:
        """The model that decides the output; known once ``connect`` has returned."""
        if self._verify_model is None:
            raise UnavailableError(self.verify.problem())
        return self._verify_model

    @property
    def draft_model(self) -> ModelDescription | None:
        """The model that drafts, or None as long as no draft replica was met."""
        return self._draft_model

    @property
    def vocabulary_fingerprint(self) -> str:
        """Fingerprint that a draft model's vocabulary has to have."""
        return self.verify_model.vocabulary.fingerprint

    @property
    def limits(self) -> ServiceLimits:
        """What any pair of replicas takes on; sessions add up. Without replicas the last known."""
        verify = [one.answer.limits for one in self.verify.usable if one.answer]
        draft = [one.answer.limits for one in self.draft.usable if one.answer]
        if verify:
            num_sessions = [sum(one.max_sessions for one in pool) for pool in (verify, draft)]
            self._limits = ServiceLimits(
                max_sessions=min(num for num in num_sessions if num),
                max_context=min(one.max_context for one in verify),
                max_lookahead=min(one.max_lookahead for one in (*verify, *draft)),
                max_waiting=sum(one.max_waiting for one in verify),
            )
        if self._limits is None:
            raise UnavailableError(self.verify.problem())
        return self._limits

    def num_replicas(self) -> dict[tuple[str, ReplicaState], int]:
        """Return how many replicas there are by role and state; for measurements."""
        counts = {(role, state): 0 for role in ("verify", "draft") for state in ReplicaState}
        for verify in self.verify.replicas:
            counts["verify", verify.state] += 1
        for draft in self.draft.replicas:
            counts["draft", draft.state] += 1
        return counts

    async def run(self) -> None:
        """Keep the pools up to date until cancelled; drafts are compared with the verify model."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.verify.run())
            await self.verify.until(lambda: self._verify_model is not None)
            if self.has_draft:
                group.create_task(self.draft.run())

    async def connect(self, timeout_seconds: float) -> None:
        """Wait, while ``run`` runs, until there is a replica of each role.

        Without a draft replica it goes on: that costs speed, not tokens.

        Raises:
            UnavailableError: no verify replica can be used within the timeout.
            InvalidInputError: the drafts that are there have another vocabulary.
        """
        end = asyncio.get_running_loop().time() + timeout_seconds
        try:
            async with asyncio.timeout_at(end):
                await self.verify.until(lambda: bool(self.verify.usable))
        except TimeoutError:
            raise UnavailableError(self.verify.problem()) from None
        _ = self.limits  # known from now on
        if not self.has_draft:
            return
        try:
            async with asyncio.timeout_at(end):
                await self.draft.until(
                    lambda: bool(self.draft.usable) or self.draft.is_refused_as_a_whole
                )
        except TimeoutError:
            log.warning("going on without a draft for now: %s", self.draft.problem())
        if self.draft.is_refused_as_a_whole:
            raise InvalidInputError(self.draft.replicas[0].reason)

    async def until_outdated(self) -> None:
        """Raise UnavailableError once all verify replicas serve another model than we do.

        Whoever restarts this orchestrator then brings it to their model, tokenizer and all.
        """
        await self.verify.until(lambda: self.verify.is_refused_as_a_whole)
        raise UnavailableError(
            "all verify replicas serve another model than this orchestrator began with "
            f"({self.verify.replicas[0].reason})"
        )

    def _validate_verify(self, model: ModelDescription) -> str | None:
        if self._verify_model is None:
            self._verify_model = model
        mismatch = explain_mismatch(model, self._verify_model)
        return f"{mismatch}; {_SERVE_THE_SAME}" if mismatch else None

    def _validate_draft(self, model: ModelDescription) -> str | None:
        """Refuse another vocabulary only: whatever else a draft is, the output stays the same."""
        try:
            check_pair(model, self.verify_model)
        except InvalidInputError as error:
            return f"its vocabulary is another: {error}"
        self._draft_model = self._draft_model or model
        return None
