"""What is special in verifying: the verify service's role in the serving loop.

A batch checks, of the proposals that have arrived, those that are worth their rows: its row budget
is divided between its sequences. The others wait for the next batch.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace

from amusd.engine.interface import NO_TOKEN, Engine
from amusd.engine.not_finite import not_finite
from amusd.fleet.model_description import ServiceLimits
from amusd.observe.pass_listener import OnPass, ignore_pass
from amusd.policy.calibration import Calibration
from amusd.policy.proposal_chances import SHARED_RATE, ProposalChances
from amusd.policy.row_budget import RowBudget
from amusd.protocol.errors import InvalidInputError
from amusd.protocol.events import Forward, Verdict
from amusd.protocol.verify_session import VerifySession
from amusd.sampling.parameters import GREEDY, SequenceSampling, TokenLogprobs
from amusd.serving.engine_health import EngineHealth
from amusd.serving.engine_worker import EngineWorker
from amusd.serving.scheduler import Scheduled
from amusd.serving.sequence import BatchClock, BatchTimes, Send, Sequence
from verify_service.pass_profile import profile_passes


@dataclass(frozen=True, slots=True)
class VerifyOpening:
    """What a session is opened with."""

    session_id: str
    tokens: list[int]
    max_position: int
    epoch: int = 0
    vocabulary_fingerprint: str = ""
    records_times: bool = False
    sampling: SequenceSampling = GREEDY


@dataclass(slots=True, eq=False, kw_only=True)
class VerifySequence(Sequence):
    """A sequence that is verified. A batch checks at most ``max_checked`` of its proposals.

    The row budget of the next batch allows ``num_allotted`` of them; None: it does not limit them.
    Without ``has_budget`` it never does, because the client has chosen the number itself.
    ``prompt_logprobs`` are those of the prompt's tokens from the second one on, until the first
    verdict sends them; ``num_prompt_outputs`` of them are to come.
    """

    session: VerifySession
    outlook: ProposalChances
    max_checked: int
    has_budget: bool = False
    num_allotted: int | None = None
    num_prompt_outputs: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The final tokens."""
        return self.session.tokens

    @property
    def is_due(self) -> bool:
        """Whether there is something to check, or a pass without proposals was asked for."""
        return self.session.is_due

    def begin_batch(self) -> tuple[int, ...]:
        """Return the proposals that the batch checks."""
        allotted, self.num_allotted = self.num_allotted, None
        most = self.max_checked if allotted is None else min(self.max_checked, allotted)
        return self.session.begin_pass(most)

    @property
    def num_ready(self) -> int:
        """Number of proposals that a batch may check."""
        return min(self.session.num_pending, self.max_checked)

    @property
    def chances(self) -> list[float]:
        """The probability of each proposal under the row budget to be accepted, in order."""
        num_ready = self.num_ready if self.has_budget else 0
        if not num_ready:
            return []
        return self.outlook.chances(self.session.pending_probabilities[:num_ready])


class Verifying:
    """Opens and verifies the sequences of a verify service."""

    def __init__(self, engine: Engine, limits: ServiceLimits) -> None:
        """Verify with ``engine`` within ``limits``."""
        self._engine = engine
        self._limits = limits
        self.budget = RowBudget()
        self._calibration = Calibration(SHARED_RATE)
        self.num_branch_starts = 0  # of sessions that have ended
        self._is_timed = True  # the pass times of the last batch

    def open(self, opening: VerifyOpening, send: Send) -> VerifySequence:
        """Return the sequence of a new session."""
        self._check(opening)
        most = self._limits.max_lookahead
        sequence = VerifySequence(
            session_id=opening.session_id,
            num_prompt_tokens=len(opening.tokens),
            capacity=opening.max_position,
            send=send,
            clock=BatchClock(opening.records_times),
            sampling=opening.sampling,
            session=VerifySession(
                opening.tokens,
                opening.max_position,
                most,
                opening.epoch,
                self._limits.max_branches,
            ),
            max_checked=most,
            outlook=ProposalChances(self._calibration),
        )
        if sequence.has_prompt_logprobs:
            sequence.num_prompt_outputs = len(opening.tokens) - 1
        return sequence

    def admitted(self, sequence: VerifySequence) -> None:
        """Nothing to do: the first pass is due as soon as there is memory."""

    def receive(self, sequence: VerifySequence, event: Forward) -> None:
        """Take tokens to check."""
        self._engine.description.check_tokens(event.all_tokens)
        sequence.session.offer(
            event.epoch, event.position, event.tokens, event.branches, event.probabilities
        )
        most = self._limits.max_lookahead
        sequence.max_checked = min(event.max_checked or most, most)
        sequence.has_budget = event.max_checked > 0

    def prepare(self, sequences: list[VerifySequence]) -> bool:
        """Divide the row budget of the next batch; nothing is sent without a batch."""
        self._is_timed = False
        due = [sequence for sequence in sequences if sequence.is_due][: self._engine.max_batch]
        chances = [sequence.chances for sequence in due]
        if any(chances):
            num_others = sum(one.num_ready for one in due if not one.has_budget)
            allotted = self.budget.allot(chances, num_others)
            for sequence, number in zip(due, allotted, strict=True):
                sequence.num_allotted = number if sequence.has_budget else None
        return False

    def fill(self, num_places: int) -> "Iterable[Scheduled[VerifySequence]]":
        """Return nothing: only sessions are verified."""
        return ()

    def settle(self, sequence: VerifySequence, predictions: list[int]) -> None:
        """Send the verdict on what the batch checked; keep log-probabilities of a prompt for it."""
        slot = sequence.slot
        assert slot is not None  # it took part in a batch
        logprobs = self._engine.logprobs(slot) if sequence.sampling.logprobs is not None else ()
        num_prompt = min(len(predictions), sequence.num_prompt_outputs)
        if num_prompt:
            sequence.num_prompt_outputs -= num_prompt
            sequence.prompt_logprobs.extend(logprobs[:num_prompt])
            if num_prompt == len(predictions):
                return  # the batch ends within the prompt
        times = sequence.clock.take()
        verdict = sequence.session.end_pass(
            predictions[num_prompt:],
            times.seconds,
            times.share_seconds,
            sequence.num_cached_tokens,
            times.times,
        )
        sequence.num_cached_tokens = 0
        self._learn(sequence, verdict, times)
        if verdict.next_token == NO_TOKEN:
            raise not_finite(self._engine.description)
        # The verify model's own next token has not been computed yet.
        self._engine.truncate(slot, sequence.session.verified_position - 1)
        if logprobs:
            verdict = _with_logprobs(sequence, verdict, logprobs[num_prompt:])
        sequence.send(verdict)

    def _learn(self, sequence: VerifySequence, verdict: Verdict, times: BatchTimes) -> None:
        """Learn acceptance and pass time; the first batches of a sequence include the prefill."""
        sequence.outlook.observe(verdict, sequence.session.compared)
        if sequence.session.epoch > verdict.epoch:
            sequence.outlook.rejected(sequence.session.epoch)
        is_decoding = verdict.position > sequence.num_prompt_tokens
        if self._is_timed or not is_decoding or not times.share_seconds:
            return
        self._is_timed = True  # the other sequences had the same pass
        num_rows = (verdict.num_checked + 1) * times.seconds / times.share_seconds
        self.budget.observe(round(num_rows), times.seconds)

    def close(self, sequence: VerifySequence) -> None:
        """Keep the counts of a session that ends."""
        self.num_branch_starts += sequence.session.num_branch_starts

    def _check(self, opening: VerifyOpening) -> None:
        model = self._engine.description
        theirs = opening.vocabulary_fingerprint
        if theirs and theirs != model.vocabulary.fingerprint:
            raise InvalidInputError(
                f"the session's vocabulary is not that of {model.name}: the verify model has "
                "changed, restart the orchestrator"
            )
        model.check_tokens(opening.tokens)
        opening.sampling.check_vocabulary(model.output_size)
        if opening.max_position > self._limits.max_context:
            raise InvalidInputError(
                f"max_position is {opening.max_position}: the verify service takes up to "
                f"{self._limits.max_context} tokens"
            )


def _with_logprobs(
    sequence: VerifySequence, verdict: Verdict, logprobs: Tokens[TokenLogprobs]
) -> Verdict:
    """Return a verdict with log-probabilities; ``logprobs`` are those of all its outputs.

    The outputs of accepted tokens are these tokens.
    """
    # A rebuilt session may ask for those of its prompt; its output is no part of that.
    num_prompt = max(0, sequence.sampling.num_prompt_tokens - 1)
    prompt, sequence.prompt_logprobs = sequence.prompt_logprobs[:num_prompt], []
    return replace(
        verdict,
        logprobs=tuple(logprobs[: verdict.num_accepted + 1]),
        prompt_logprobs=tuple(prompt),
    )


class VerifyWorker(EngineWorker[VerifySequence, VerifyOpening, Forward]):
    """The serving loop of a verify service."""

    def __init__(
        self,
        engine: Engine,
        limits: ServiceLimits,
        prefill_budget: int,
        reuses_prefixes: bool = True,
        on_pass: OnPass = ignore_pass,
        health: EngineHealth | None = None,
    ) -> None:
        """Verify with ``engine`` within ``limits``."""
        self._verifying = Verifying(engine, limits)
        super().__init__(
            engine, self._verifying, limits, prefill_budget, reuses_prefixes, on_pass, health
        )

    @property
    def num_branch_starts(self) -> int:
        """Number of rejections for which a branch was there."""
        open_sessions = (one.session.num_branch_starts for one in self.sequences)
        return self._verifying.num_branch_starts + sum(open_sessions)

    @property
    def num_branches_held(self) -> int:
        """Number of branches that all sessions hold now."""
        return sum(len(one.session.branches) for one in self.sequences)

    def warm_up(self) -> None:
        """Run a first pass, then learn how long passes take.

        Raises:
            AmusdError: a pass failed.
        """
        super().warm_up()
        profile_passes(self.engine, self._verifying.budget)
