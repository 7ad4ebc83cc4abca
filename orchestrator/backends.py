"""The draft and verify services that an orchestrator uses: one pool of each role.

The first verify replica that answers decides which model this orchestrator serves, because
prompts are tokenized for that model. From then on, replicas that may give other tokens are refused.
"""

import asyncio
import logging
from typing import TypeAlias

from amusd.fleet.load_balancing import ReplicaState, explain_mismatch
from amusd.fleet.model_description import ModelDescription, ServiceLimits, check_pair
from amusd.policy.speculation_length import StepTimes
from amusd.policy.speculation_switch import SpeculationSwitch
from amusd.protocol.errors import InvalidInputError, UnavailableError
from amusd.v1 import verify_pb2_grpc
from orchestrator.addresses import Resolver, SystemResolver, parse_entries
from orchestrator.orchestrator_settings import OrchestratorSettings
from orchestrator.replica import DRAFT, VERIFY
from orchestrator.replica_pool import Pool
from orchestrator.rollback_stream import DraftStub

log = logging.getLogger(__name__)

_WHAT_TO_DO = (
    "serve the pool's model there, or change all replicas and then restart the orchestrators"
)

_MAX_SWITCHES = 64  # of replicas without sessions

VerifyPool: TypeAlias = "Pool[verify_pb2_grpc.VerifyServiceAsyncStub]"
DraftPool: TypeAlias = Pool[DraftStub]


class Backends:
    """The pool of verify replicas and, if there is one, the pool of draft replicas."""

    def __init__(self, settings: OrchestratorSettings, resolver: Resolver | None = None) -> None:
        """Prepare the pools; ``resolver`` finds the addresses of host names."""
        resolver = resolver or SystemResolver()
        verify, draft = parse_entries(settings.verify), parse_entries(settings.draft)
        interval, timeout = settings.resolve_interval_seconds, settings.replica_timeout_seconds
        self.verify: VerifyPool = Pool(
            VERIFY, verify, self._validate_verify, resolver, interval, timeout, settings.use_proxy
        )
        self.draft: DraftPool = Pool(
            DRAFT, draft, self._validate_draft, resolver, interval, timeout, settings.use_proxy
        )
        self.step_times = StepTimes()
        self.adapts_speculation = settings.adaptive_speculation
        self._switches: dict[str, SpeculationSwitch] = {}
        self._verify_model: ModelDescription | None = None
        self._draft_model: ModelDescription | None = None
        self._limits: ServiceLimits | None = None

    def switch_of(self, verify_address: str) -> SpeculationSwitch:
        """Return the speculation switch of the sessions on a verify replica."""
        switch = self._switches.get(verify_address)
        if switch is None:
            if len(self._switches) >= _MAX_SWITCHES:  # addresses that are used no more
                self._switches = {
                    address: one for address, one in self._switches.items() if one.num_sessions
                }
            switch = self._switches[verify_address] = SpeculationSwitch(self.step_times)
        return switch

    @property
    def has_draft(self) -> bool:
        """Whether a draft pool is configured; it may have no usable replica."""
        return bool(self.draft.entries)

    @property
    def verify_model(self) -> ModelDescription:
        """The model that decides the output.

        Raises:
            UnavailableError: no verify replica has answered yet.
        """
        if self._verify_model is None:
            raise UnavailableError(self.verify.problem())
        return self._verify_model

    @property
    def draft_model(self) -> ModelDescription | None:
        """The model that drafts, or None until a draft replica was accepted."""
        return self._draft_model

    @property
    def vocabulary_fingerprint(self) -> str:
        """Fingerprint of the verify model's vocabulary; the draft model's has to be equal."""
        return self.verify_model.vocabulary.fingerprint

    @property
    def limits(self) -> ServiceLimits:
        """Limits that hold for any pair of usable replicas.

        Numbers of sessions are summed over the replicas. Without usable replicas these are the
        last known limits.

        Raises:
            UnavailableError: no verify replica has answered yet.
        """
        verify = [one.info.limits for one in self.verify.usable if one.info]
        draft = [one.info.limits for one in self.draft.usable if one.info]
        if verify:
            num_sessions = [sum(one.max_sessions for one in pool) for pool in (verify, draft)]
            self._limits = ServiceLimits(
                max_sessions=min(num for num in num_sessions if num),
                max_context=min(one.max_context for one in verify),
                max_lookahead=min(one.max_lookahead for one in (*verify, *draft)),
                max_waiting=sum(one.max_waiting for one in verify),
                max_branches=min(one.max_branches for one in (*verify, *draft)),
            )
        if self._limits is None:
            raise UnavailableError(self.verify.problem())
        return self._limits

    def num_replicas(self) -> dict[tuple[str, ReplicaState], int]:
        """Return the number of replicas by role and state, for metrics."""
        counts = {(role, state): 0 for role in ("verify", "draft") for state in ReplicaState}
        for verify in self.verify.replicas:
            counts["verify", verify.state] += 1
        for draft in self.draft.replicas:
            counts["draft", draft.state] += 1
        return counts

    async def run(self) -> None:
        """Keep both pools up to date until cancelled.

        The draft pool starts once the verify model is known, because draft models are validated
        against it.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self.verify.run())
            await self.verify.until(lambda: self._verify_model is not None)
            if self.has_draft:
                group.create_task(self.draft.run())

    async def connect(self, timeout_seconds: float) -> None:
        """Wait until each pool has a usable replica; ``run`` has to run meanwhile.

        If no draft replica comes in time, the orchestrator starts without: output is slower, but
        the same.

        Raises:
            UnavailableError: no verify replica can be used within the timeout.
            InvalidInputError: every draft replica has another vocabulary than the verify model.
        """
        end = asyncio.get_running_loop().time() + timeout_seconds
        try:
            async with asyncio.timeout_at(end):
                await self.verify.until(lambda: bool(self.verify.usable))
        except TimeoutError:
            raise UnavailableError(self.verify.problem()) from None
        _ = self.limits  # remembers them
        if not self.has_draft:
            return
        try:
            async with asyncio.timeout_at(end):
                await self.draft.until(lambda: bool(self.draft.usable) or self.draft.is_all_refused)
        except TimeoutError:
            log.warning("starting without a draft replica: %s", self.draft.problem())
        if self.draft.is_all_refused:
            raise InvalidInputError(self.draft.replicas[0].reason)

    async def until_outdated(self) -> None:
        """Wait until every verify replica serves another model than this orchestrator.

        The process then has to end. After its restart it serves the new model with its tokenizer.

        Raises:
            UnavailableError: always, when the wait is over.
        """
        await self.verify.until(lambda: self.verify.is_all_refused)
        raise UnavailableError(
            "all verify replicas serve another model than this orchestrator started with "
            f"({self.verify.replicas[0].reason})"
        )

    def _validate_verify(self, model: ModelDescription) -> str | None:
        pool = self._verify_model or model
        mismatch = explain_mismatch(model, pool)
        self._verify_model = pool
        return f"{mismatch}; {_WHAT_TO_DO}" if mismatch else None

    def _validate_draft(self, model: ModelDescription) -> str | None:
        """Refuse only another vocabulary: nothing else of a draft model can change the output."""
        try:
            check_pair(model, self.verify_model)
        except InvalidInputError as error:
            return f"its vocabulary differs: {error}"
        self._draft_model = self._draft_model or model
        return None
