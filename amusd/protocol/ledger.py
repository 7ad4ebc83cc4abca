"""The ledger: which tokens of one session are final, and what follows from each message.

Rules of this file
- State changes only in ``Ledger.proposal`` and ``Ledger.verdict``, and only after every check
  has passed: an illegal event raises and changes nothing.
- Safety rests on ``(epoch, position)``. Stale and duplicate messages are no-ops.
- Final tokens come from verdicts alone. A verdict gives the number of accepted tokens, not their
  ids, so it applies only to a tail of its own epoch. A verdict that accepts nothing refers to no
  proposal: its token follows the final tokens, and is valid in every epoch.
- A rejection may begin the next epoch with a branch, by the rule in ``branches``. The ledger takes
  the branch that the verify service takes, because it has forwarded the same ones.
- It knows nothing of time, transport, end of text, or the inner working of the services.

Intervals, for V final tokens and n speculated ones:

    [0 ........... V)[V ........... V + n)
     final            tail: proposed and forwarded, not yet verified
                      draft_head = V + n; below V while the draft lags behind
"""

from dataclasses import dataclass, replace

from amusd.protocol.branches import Branches
from amusd.protocol.draft_probabilities import fit, padded, trimmed
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import PreconditionError
from amusd.protocol.events import (
    NOTHING,
    Advance,
    Branch,
    Decision,
    Forward,
    Proposal,
    Rollback,
    Verdict,
)
from amusd.protocol.ledger_counts import LedgerCounts


@dataclass(frozen=True, slots=True)
class _Guess:
    """A token of the tail; ``probability`` is the draft's own, 0 if it is not known."""

    token: int
    source: DraftSource
    probability: float


def _guesses(
    tokens: tuple[int, ...], source: DraftSource, probabilities: tuple[float, ...]
) -> list[_Guess]:
    known = padded(tokens, probabilities)
    return [_Guess(token, source, one) for token, one in zip(tokens, known, strict=True)]


def _usable(branch: Branch) -> Branch:
    """Return a branch without probabilities that do not fit its tokens."""
    if fit(branch.tokens, branch.probabilities):
        return branch
    return replace(branch, probabilities=())


class Ledger:
    """Single source of truth of one session; enough to rebuild it on any replica."""

    __slots__ = ("_branches", "_draft_head", "_epoch", "_final", "_num_prompt", "_tail", "counts")

    def __init__(self, prompt: list[int], epoch: int = 0, max_branches: int = 0) -> None:
        """Start after ``prompt``, at least one token; all of them are final.

        It forwards at most ``max_branches`` branches at a time, and drops further ones.
        """
        if not prompt:
            raise PreconditionError("a session needs a prompt of at least one token")
        self._final = list(prompt)
        self._num_prompt = len(prompt)
        self._tail: list[_Guess] = []
        self._epoch = epoch
        self._draft_head = len(prompt)
        self._branches = Branches(max_branches)
        self.counts = LedgerCounts()

    def __repr__(self) -> str:
        return (
            f"Ledger(epoch={self._epoch}, verified={self.verified_position}, "
            f"tail={len(self._tail)}, draft_head={self._draft_head})"
        )

    @property
    def epoch(self) -> int:
        """Number of rollbacks so far."""
        return self._epoch

    @property
    def verified_position(self) -> int:
        """Number of final tokens, prompt included. It never decreases."""
        return len(self._final)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens the session started with."""
        return self._num_prompt

    @property
    def num_speculated(self) -> int:
        """Number of tokens beyond the verified position that the verify service may check."""
        return len(self._tail)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The final tokens, prompt included."""
        return tuple(self._final)

    @property
    def output(self) -> tuple[int, ...]:
        """The final tokens after the prompt."""
        return tuple(self._final[self._num_prompt :])

    @property
    def tail(self) -> Forward | None:
        """The tokens that were forwarded and are not verified; None if there are none.

        Another verify service that is opened with the final tokens and the epoch continues with it.
        """
        if not self._tail:
            return None
        return self._forward(self.verified_position, self._tail, self._branches.held)

    def committed_by(self, verdict: Verdict) -> tuple[int, ...]:
        """Return the tokens that a verdict makes final; none if it is stale or illegal."""
        if verdict.position != self.verified_position or verdict.epoch > self._epoch:
            return ()
        num_known = len(self._tail) if verdict.epoch == self._epoch else 0
        if verdict.num_accepted > num_known:
            return ()
        accepted = self._tail[: verdict.num_accepted]
        return (*(guess.token for guess in accepted), verdict.next_token)

    def unspeculated_pass(self, num_ahead: int = 0) -> Forward:
        """Return the request for a pass without proposals, and for ``num_ahead`` after it."""
        return Forward(self._epoch, self.verified_position + num_ahead, ())

    def proposal(self, proposal: Proposal) -> Decision:
        """Take drafted tokens; return what to forward, or the rollback they call for.

        Raises:
            PreconditionError: the proposal comes from a later epoch, leaves a gap, or
                contradicts an earlier one of its epoch. Nothing has changed then.
        """
        self._check_proposal(proposal)
        decision = self._take_run(proposal)
        if not proposal.branches:
            return decision
        if proposal.epoch == self._epoch:
            return self._hold(proposal.branches, decision)
        if proposal.epoch == self._epoch - 1:
            return self._begin_late(proposal.branches, decision)
        return decision

    def _take_run(self, proposal: Proposal) -> Decision:
        """Take the tokens of a proposal."""
        if proposal.epoch < self._epoch:
            self.counts.by_source[proposal.source].drafted += len(proposal.tokens)
            self.counts.wasted += len(proposal.tokens)
            return NOTHING
        if proposal.position + len(proposal.tokens) > self._draft_head:
            self._branches.begun()
        guesses = _guesses(proposal.tokens, proposal.source, proposal.probabilities)
        return self._take_tokens(proposal.position, guesses)

    def _take_tokens(self, position: int, guesses: list[_Guess]) -> Decision:
        """Take tokens of this epoch and one source; known ones change nothing."""
        num_known = max(0, self._draft_head - position)
        fresh = guesses[num_known:]
        if not fresh:
            return NOTHING
        outcome = self.counts.by_source[fresh[0].source]
        position += num_known
        outcome.drafted += len(fresh)
        # Tokens below the verified position are late: the verify model went on without them.
        num_late = min(len(fresh), max(0, self.verified_position - position))
        for index in range(num_late):
            if fresh[index].token != self._final[position + index]:
                outcome.accepted += index
                outcome.rejected += 1
                self.counts.wasted += len(fresh) - index - 1
                return self._roll_back_to(position + index)
        outcome.accepted += num_late
        self._draft_head = position + len(fresh)
        forwarded = fresh[num_late:]
        if not forwarded:
            return NOTHING
        self._tail.extend(forwarded)
        return Decision(forward=self._forward(position + num_late, forwarded))

    def _forward(
        self, position: int, guesses: list[_Guess], branches: tuple[Branch, ...] = ()
    ) -> Forward:
        tokens = tuple(guess.token for guess in guesses)
        probabilities = trimmed(guess.probability for guess in guesses)
        return Forward(
            self._epoch, position, tokens, branches=branches, probabilities=probabilities
        )

    def _hold(self, branches: tuple[Branch, ...], decision: Decision) -> Decision:
        """Forward the branches that can still be taken, behind the tokens of ``decision``."""
        held = []
        for branch in branches:
            if branch.position >= self.verified_position and self._branches.takes(branch):
                self.counts.branches += not self._branches.holds(branch)
                held.append(_usable(branch))
                self._branches.hold(held[-1])
        if not held:
            return decision
        forward = decision.forward or Forward(self._epoch, self.verified_position, ())
        return replace(decision, forward=replace(forward, branches=tuple(held)))

    def _begin_late(self, branches: tuple[Branch, ...], decision: Decision) -> Decision:
        """Begin the epoch with a branch that comes after the rejection it is for.

        If a part of it has begun the epoch, the other tokens count as proposed in this epoch.
        """
        is_begun = self._branches.has_begun
        branch = self._branches.late(branches)
        if branch is None:
            return decision
        if is_begun:
            if decision is not NOTHING:
                return decision  # the draft proposes them after the rollback
            guesses = _guesses(branch.tokens, branch.source, branch.probabilities)
            return self._take_tokens(branch.position + 1, guesses)
        self.counts.branches += 1
        rest = tuple(self._final[self._draft_head :])
        num_late = min(len(rest), len(branch.tokens))
        if branch.tokens[:num_late] != rest[:num_late]:
            self._branches.begun()  # the verify model went on without it, to other tokens
            return decision
        self._begin_with(branch)
        outcome = self.counts.by_source[branch.source]
        outcome.accepted += num_late
        del self._tail[:num_late]
        rollback = decision.rollback
        return replace(
            decision,
            rollback=rollback and replace(rollback, branch_tokens=branch.tokens),
            forward=self.tail,
        )

    def _begin_with(self, branch: Branch) -> None:
        """Take a branch as the tail of the epoch that has just begun."""
        self.counts.by_source[branch.source].drafted += len(branch.tokens)
        self.counts.branch_hits += 1
        self._tail.extend(_guesses(branch.tokens, branch.source, branch.probabilities))
        self._draft_head += len(branch.tokens)

    def verdict(self, verdict: Verdict) -> Decision:
        """Take the outcome of a pass; return the tokens that became final and what follows.

        Raises:
            PreconditionError: the verdict comes from a later epoch or position, or accepts
                more than was proposed. Nothing has changed then.
        """
        self._check_verdict(verdict)
        if verdict.position < self.verified_position:
            return NOTHING
        if verdict.num_accepted and verdict.epoch != self._epoch:
            return NOTHING
        position = self.verified_position
        accepted = self._tail[: verdict.num_accepted]
        committed = (*(guess.token for guess in accepted), verdict.next_token)
        del self._tail[: verdict.num_accepted]
        self._final.extend(committed)
        self.counts.passes += 1
        for guess in accepted:
            self.counts.by_source[guess.source].accepted += 1
        if self._tail:
            guess = self._tail.pop(0)
            outcome = self.counts.by_source[guess.source]
            if guess.token != verdict.next_token:
                outcome.rejected += 1
                rolled_back = self._roll_back_to(self.verified_position - 1)
                return Decision(rollback=rolled_back.rollback, committed=committed)
            outcome.accepted += 1
        self._branches.drop_until(self.verified_position)
        advance = Advance(self._epoch, position, committed)
        return Decision(advance=advance, committed=committed)

    def draft_begins_at(self, position: int) -> None:
        """Expect the draft's tokens of this epoch from ``position`` on; the tail is empty.

        A draft that has missed the beginning of the epoch is rolled back to an earlier position.
        """
        self._draft_head = position
        self._branches.begun()

    def close(self) -> None:
        """Count the rest of the tail as wasted; the session is over."""
        self.counts.wasted += len(self._tail)
        self._tail.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        counts = self.counts
        settled = counts.accepted + counts.rejected + counts.wasted
        if counts.drafted != settled + len(self._tail):
            raise AssertionError(
                f"token counts do not add up: {counts} with a tail of {len(self._tail)}"
            )
        if self._tail and self._draft_head != self.verified_position + len(self._tail):
            raise AssertionError(f"the tail does not end at the draft's head: {self!r}")
        self._branches.check_integrity(self.verified_position)
        if self._draft_head < self._num_prompt or self.verified_position < self._num_prompt:
            raise AssertionError(f"a position lies within the prompt: {self!r}")

    def _check_proposal(self, proposal: Proposal) -> None:
        if proposal.epoch > self._epoch:
            raise PreconditionError(
                f"a proposal of epoch {proposal.epoch} is ahead of epoch {self._epoch}"
            )
        if proposal.epoch < self._epoch:
            return
        # A draft that received final tokens drafts behind them, hence the maximum.
        head = max(self._draft_head, self.verified_position)
        if proposal.position > head:
            raise PreconditionError(
                f"a proposal at position {proposal.position} leaves a gap after {head}"
            )
        if proposal.position < self._num_prompt:
            raise PreconditionError(
                f"a proposal at position {proposal.position} lies within the prompt"
            )
        for index, token in enumerate(proposal.tokens):
            offset = proposal.position + index - self.verified_position
            if 0 <= offset < len(self._tail) and self._tail[offset].token != token:
                raise PreconditionError(
                    f"two proposals of epoch {self._epoch} contradict each other at "
                    f"position {proposal.position + index}"
                )

        for branch in proposal.branches:
            self._check_branch(branch, proposal)

    def _check_branch(self, branch: Branch, proposal: Proposal) -> None:
        """Raise if a branch does not hang on the run, or repeats a token of it."""
        head = max(self._draft_head, proposal.position + len(proposal.tokens))
        if not branch.tokens or not self._num_prompt <= branch.position < head:
            raise PreconditionError(
                f"a branch of {len(branch.tokens)} tokens at position {branch.position} does not "
                f"hang on the proposals up to {head}"
            )
        offset = branch.position - self.verified_position
        if 0 <= offset < len(self._tail):
            token = self._tail[offset].token
        elif 0 <= branch.position - proposal.position < len(proposal.tokens):
            token = proposal.tokens[branch.position - proposal.position]
        else:
            return
        if token == branch.token:
            raise PreconditionError(
                f"a branch repeats the proposed token at position {branch.position}"
            )

    def _check_verdict(self, verdict: Verdict) -> None:
        if verdict.epoch > self._epoch:
            raise PreconditionError(
                f"a verdict of epoch {verdict.epoch} is ahead of epoch {self._epoch}"
            )
        if verdict.position > self.verified_position:
            raise PreconditionError(
                f"a verdict at position {verdict.position} is ahead of {self.verified_position}"
            )
        current = verdict.position == self.verified_position and verdict.epoch == self._epoch
        if current and verdict.num_accepted > len(self._tail):
            raise PreconditionError(
                f"a verdict accepts {verdict.num_accepted} of {len(self._tail)} proposed tokens"
            )

    def _roll_back_to(self, position: int) -> Decision:
        """Start a new epoch in which the draft goes on after the final token at ``position``."""
        token = self._final[position]
        self.counts.wasted += len(self._tail)
        self.counts.rollbacks += 1
        self._tail.clear()
        self._epoch += 1
        self._draft_head = position + 1
        branch = self._branches.rejected(position, token)
        if branch is not None:
            self._begin_with(branch)
        rest = tuple(self._final[position + 1 :])
        branch_tokens = branch.tokens if branch is not None else ()
        return Decision(
            rollback=Rollback(self._epoch, position + 1, token, branch_tokens=branch_tokens),
            advance=Advance(self._epoch, position + 1, rest) if rest else None,
        )
