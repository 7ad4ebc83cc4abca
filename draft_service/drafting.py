"""What is special in drafting: the draft service's role in the serving loop.

A session drafts without being asked, up to its look-ahead. Its proposals come from the proposers
first, which need no batch; what they cannot continue takes part in the next batch of the model.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from amusd.engine.interface import NO_TOKEN
from amusd.engine.not_finite import not_finite
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, PassReport, ignore_pass
from amusd.policy.branch_budget import BranchBudget
from amusd.policy.branch_plan import BranchCounts
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_session import DraftSession
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import AmusdError, InvalidInputError
from amusd.protocol.events import Advance, Proposal, Rollback
from amusd.sampling.parameters import GREEDY, SequenceSampling
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_worker import EngineWorker
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import BatchClock, Send, Sequence
from amusd.serving.session_fault import end_session
from draft_service.branching import Brancher, BranchSequence
from draft_service.drafters import MAX_UNREAD, Drafter, Proposer

_READ_BUDGET = 512
"""Tokens that the proposers read before a batch, over all sessions: a few milliseconds."""
_MAX_BRANCH_SEQUENCES = 32
"""Branches of a session that are drafted at the same time."""


@dataclass(frozen=True, slots=True)
class DraftOpening:
    """What a session is opened with."""

    session_id: str
    tokens: list[int]
    limits: DraftLimits
    epoch: int = 0
    vocabulary_fingerprint: str = ""
    records_times: bool = False
    sampling: SequenceSampling = GREEDY


@dataclass(slots=True, eq=False, kw_only=True)
class DraftSequence(Sequence):
    """A sequence that is drafted. Without a model it waits until its text is read."""

    session: DraftSession
    brancher: Brancher | None = None
    waits_for_reading: bool = False

    @property
    def tokens(self) -> list[int]:
        """Final and drafted tokens."""
        return self.session.tokens

    @property
    def is_due(self) -> bool:
        """Whether there is room for another drafted token."""
        return self.session.room > 0 and not self.waits_for_reading


class Drafting:
    """Opens, drafts and rolls back the sequences of a draft service."""

    def __init__(self, drafter: Drafter, limits: ServiceLimits, prefill_budget: int) -> None:
        """Draft with ``drafter`` within ``limits``."""
        self.drafter = drafter
        self._engine = drafter.engine
        self._all_sources = drafter.sources
        self._limits = limits
        self._prefill_budget = prefill_budget
        self._branching: deque[DraftSequence] = deque()  # the next in turn first
        self.branch_counts = BranchCounts()
        self._branch_budget = BranchBudget(_MAX_BRANCH_SEQUENCES)
        self._last_batch: PassReport | None = None
        self.has_unread = False
        """Whether the proposers have more to read, without a message arriving."""

    def open(self, opening: DraftOpening, send: Send) -> DraftSequence:
        """Return the sequence of a new session."""
        self._check(opening)
        limits = opening.limits
        capacity = min(limits.max_position, self._limits.max_context)
        session = DraftSession(
            opening.tokens,
            DraftLimits(
                limits.lookahead,
                capacity,
                limits.tokens_per_proposal,
                min(limits.max_branches, self._limits.max_branches),
                limits.min_use_probability,
            ),
            opening.epoch,
        )
        return DraftSequence(
            session_id=opening.session_id,
            num_prompt_tokens=len(opening.tokens),
            capacity=capacity,
            send=send,
            clock=BatchClock(opening.records_times),
            sampling=opening.sampling,
            session=session,
        )

    def admitted(self, sequence: DraftSequence) -> None:
        """Draft, or while the sequence waits for memory say that there is nothing to propose."""
        if sequence.slot is not None:
            sequence.session.resume()
            self._start_branching(sequence)
        self._send(sequence)

    def receive(self, sequence: DraftSequence, event: Advance) -> None:
        """Take final tokens."""
        self._engine.description.check_tokens(event.tokens)
        sequence.session.advance(
            event.epoch, event.position, event.tokens, event.lookahead, event.tokens_per_proposal
        )
        self._send(sequence)

    def rollback(self, sequence: DraftSequence, rollback: Rollback) -> int:
        """Roll a sequence back; return how many drafted tokens were dropped.

        Raises:
            AmusdError: the rollback is refused, and has changed nothing.
        """
        self._engine.description.check_tokens((rollback.corrected_token, *rollback.branch_tokens))
        brancher = sequence.brancher
        if brancher is not None:
            brancher.before_rollback(rollback.verified_position - 1, rollback.corrected_token)
        num_dropped = sequence.session.rollback(
            rollback.epoch,
            rollback.verified_position,
            rollback.corrected_token,
            rollback.lookahead,
            rollback.tokens_per_proposal,
            rollback.first_proposal,
            rollback.branch_tokens,
        )
        if brancher is not None:
            brancher.plan.after_rollback()
            self._branch_budget.rolled_back(sequence.session.length > rollback.verified_position)
        length = rollback.verified_position - 1
        if sequence.slot is not None and self._engine.length(sequence.slot) > length:
            self._engine.truncate(sequence.slot, length)
        for proposer in self.drafter.proposers:
            proposer.truncate(sequence.session_id, length)
        self._send(sequence)
        return num_dropped

    def prepare(self, sequences: list[DraftSequence]) -> bool:
        """Send branches, and let the proposers write what they can; return whether any was sent."""
        has_sent = False
        self._read(sequences)
        for sequence in sequences:
            if sequence.brancher is not None and sequence.brancher.plan.is_overdue:
                has_sent = self._send(sequence) or has_sent
            while sequence.is_due and (proposed := self._propose(sequence)) is not None:
                tokens, source = proposed
                sequence.session.extend(tuple(tokens), source)
                has_sent = self._send(sequence) or has_sent
        return has_sent

    def fill(self, num_places: int) -> Iterator[Scheduled[BranchSequence]]:
        """Draft branches in the free places of a batch, one session after the other.

        They take no more places than what they save is worth.
        """
        if not self._branching:
            return
        num_runs, num_taken = self._engine.max_batch - num_places, 0
        num_places = min(num_places, self._branch_budget.places(num_runs))
        steps_between = self._branch_budget.steps_between
        for _ in range(len(self._branching)):
            sequence = self._branching[0]
            self._branching.rotate(-1)
            if not sequence.is_runnable:
                continue
            assert sequence.brancher is not None
            sequence.brancher.plan.steps_between = steps_between
            try:
                found = list(sequence.brancher.schedule(num_places - num_taken))
            except Exception as error:
                end_session(sequence, error, "branching")
                continue
            num_taken += len(found)
            yield from found
        if not num_runs and not num_taken:
            self._send_branches()

    def _send_branches(self) -> None:
        """Send what is drafted of branches, because the device rests."""
        for sequence in self._branching:
            if not sequence.is_runnable:
                continue
            assert sequence.brancher is not None
            try:
                sequence.brancher.plan.hand_over()
                self._send(sequence)
            except Exception as error:
                end_session(sequence, error, "branching")

    def passed(self, report: PassReport) -> None:
        """Take what was in a batch."""
        self._last_batch = report

    def stepped(self, seconds: float) -> None:
        """Take the time since the last step began: it decides how many branches are drafted."""
        report, self._last_batch = self._last_batch, None
        if report is not None:
            has_run = report.num_tokens > report.num_branch_tokens
            num_runs = report.num_sessions if has_run else 0
            self._branch_budget.ran(report.num_tokens, num_runs, seconds)

    def settle(self, sequence: "DraftSequence | BranchSequence", predictions: list[int]) -> None:
        """Propose what the model wrote."""
        if isinstance(sequence, BranchSequence):
            sequence.brancher.settle(sequence, predictions[-1])
            return
        if NO_TOKEN in predictions:
            raise not_finite(self._engine.description)
        session, position = sequence.session, sequence.session.length
        session.extend(tuple(predictions), DraftSource.MODEL, self._probabilities(sequence))
        if sequence.brancher is not None and session.length > position:
            assert sequence.slot is not None  # it took part in a batch
            proposers = self._proposers(session.tracker.paying)
            sequence.brancher.wrote(position, sequence.slot, proposers)
        self._send(sequence)

    def _probabilities(self, sequence: DraftSequence) -> tuple[float, ...]:
        """Return the model's probability of the token of a sequence's last batch; none: unknown."""
        assert sequence.slot is not None  # it took part in a batch
        found = self._engine.probabilities(sequence.slot)
        return (min(1.0, found[0]),) if found else ()

    def _start_branching(self, sequence: DraftSequence) -> None:
        """Draft branches beside a session that may have them, if the engine gives any."""
        if not sequence.session.max_branches or not self._engine.num_alternatives:
            return
        num_sequences = min(_MAX_BRANCH_SEQUENCES, self._engine.max_batch - 1)
        sequence.brancher = Brancher(
            self._engine, sequence, sequence.session, num_sequences, self.branch_counts
        )
        self._branching.append(sequence)

    def close(self, sequence: DraftSequence) -> None:
        """Forget what the proposers have seen of a session, and its branches."""
        if sequence.brancher is not None:
            self._branching.remove(sequence)
            sequence.brancher.close()
        for proposer in self.drafter.proposers:
            proposer.close(sequence.session_id)

    def _read(self, sequences: list[DraftSequence]) -> None:
        """Let the proposers read long texts, all together within the budget."""
        budget, self.has_unread = _READ_BUDGET, False
        if not self.drafter.proposers:
            return
        for sequence in sequences:
            tokens, name, most_left = sequence.tokens, sequence.session_id, 0
            sources = self._sources(sequence)
            for proposer in self.drafter.proposers:
                if proposer.source not in sources:
                    continue
                left = before = proposer.read(name, tokens, 0)
                if before > MAX_UNREAD:
                    left = proposer.read(name, tokens, budget)
                    budget -= before - left
                most_left = max(most_left, left)
            is_unread = most_left > MAX_UNREAD
            sequence.waits_for_reading = is_unread and not self.drafter.has_model
            self.has_unread = self.has_unread or is_unread

    def _sources(self, sequence: DraftSequence) -> frozenset[DraftSource]:
        """Return the sources that may draft now."""
        sources = self._all_sources
        # A drafter with a single source has no choice, whatever pays.
        return sources & sequence.session.sources if len(sources) > 1 else sources

    def _proposers(self, sources: frozenset[DraftSource]) -> list[Proposer]:
        return [one for one in self.drafter.proposers if one.source in sources]

    def _propose(self, sequence: DraftSequence) -> tuple[list[int], DraftSource] | None:
        """Return tokens of a proposer and their source; None: the model has to write them."""
        sources = self._sources(sequence)
        asks_model = DraftSource.MODEL in sources
        # The prompt is computed while the verify model computes it; later it would cost time.
        if asks_model and self._is_behind(sequence):
            return None
        proposers, session = self._proposers(sources), sequence.session
        for proposer in proposers:
            tokens = proposer.propose(sequence.session_id, session.tokens, session.room)
            if tokens:
                return tokens, proposer.source
        if asks_model:
            return None
        return [], proposers[-1].source if proposers else DraftSource.LOOKUP

    def _is_behind(self, sequence: DraftSequence) -> bool:
        """Whether the model has more to compute than one batch does."""
        assert sequence.slot is not None  # only runnable sequences propose
        num_left = len(sequence.tokens) - self._engine.length(sequence.slot)
        return num_left > self._prefill_budget

    def _send(self, sequence: DraftSequence) -> bool:
        """Send the proposals that are ready; return whether there were any."""
        session = sequence.session
        if sequence.slot is None:
            session.extend(())  # nobody waits for a session that itself waits for memory
        has_sent = False
        if sequence.brancher is not None:
            sequence.brancher.plan.hand_over_due()
        while (run := session.take_run()) is not None:
            times = sequence.clock.take()
            sequence.send(
                Proposal(
                    run.epoch,
                    run.position,
                    run.tokens,
                    times.seconds,
                    times.num_batches,
                    run.source,
                    times.share_seconds,
                    times.times,
                    run.branches,
                    run.probabilities,
                )
            )
            has_sent = True
        return has_sent

    def _check(self, opening: DraftOpening) -> None:
        model = self._engine.description
        ours, theirs = model.vocabulary.fingerprint, opening.vocabulary_fingerprint
        if ours and theirs and ours != theirs:
            raise InvalidInputError(
                f"the vocabulary of {model.name} is not the verify model's: pair models that "
                "share their tokenizer"
            )
        model.check_tokens(opening.tokens)
        opening.sampling.check_vocabulary(model.output_size)
        if opening.limits.max_position <= len(opening.tokens):
            raise InvalidInputError(
                f"max_position {opening.limits.max_position} leaves no room after "
                f"{len(opening.tokens)} tokens"
            )
        if len(opening.tokens) >= self._limits.max_context:
            raise InvalidInputError(
                f"the prompt has {len(opening.tokens)} tokens, the draft service takes fewer "
                f"than {self._limits.max_context}"
            )
        if opening.limits.lookahead > self._limits.max_lookahead:
            raise InvalidInputError(
                f"lookahead is {opening.limits.lookahead}: ask for "
                f"{self._limits.max_lookahead} or less"
            )


class DraftWorker(EngineWorker[DraftSequence, DraftOpening, Advance]):
    """The serving loop of a draft service, with rollbacks."""

    def __init__(
        self,
        drafter: Drafter,
        limits: ServiceLimits,
        prefill_budget: int,
        reuses_prefixes: bool = True,
        on_pass: OnPass = ignore_pass,
        health: EngineHealth | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Draft with ``drafter`` within ``limits``; ``clock`` times the steps, in seconds."""
        self.drafter = drafter
        self._clock = clock
        self._stepped_seconds = clock()  # when the last step began
        self._drafting = Drafting(drafter, limits, prefill_budget)

        def passed(report: PassReport) -> None:
            self._drafting.passed(report)
            on_pass(report)

        super().__init__(
            drafter.engine, self._drafting, limits, prefill_budget, reuses_prefixes, passed, health
        )

    @property
    def branch_counts(self) -> BranchCounts:
        """What became of branches so far."""
        return self._drafting.branch_counts

    def step(self) -> bool:
        """Run the next batch, or let the proposers read on; return whether there was either."""
        now_seconds = self._clock()
        self._drafting.stepped(now_seconds - self._stepped_seconds)
        self._stepped_seconds = now_seconds
        has_run = super().step()
        return has_run or self._drafting.has_unread

    def rollback(self, session_id: str, rollback: Rollback) -> int:
        """Roll a session back; return how many drafted tokens were dropped.

        Raises:
            UnknownSessionError: no session of this id is open.
            AmusdError: the rollback is refused, and has changed nothing; or it failed, and the
                session has ended.
        """
        sequence = self.sequence(session_id)
        try:
            return self._drafting.rollback(sequence, rollback)
        except AmusdError:
            raise
        except Exception as error:
            raise end_session(sequence, error, "rolling back") from None
