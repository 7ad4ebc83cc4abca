"""One session on the draft service: what it may draft, and what it has to send.

Rules of this file
- ``rollback`` alone begins a new epoch; stale advances are ignored.
- An illegal event raises and changes nothing.
- Where the verify model disagrees, drafting stops at once and waits for the rollback.
- A drafted token counts for or against its source once, when its position becomes final. Tokens
  behind a wrong one are not compared, and do not count.
- All tokens of a proposal come from one source.
- A branch is held until a final token stands at its position. A rollback to its outcome goes on
  behind its tokens.

Intervals, for V verified tokens and n drafted beyond them:

    [0 ........... V)[V ......... sent)[sent ........ V + n)
     final            proposed          drafted, collected for the next proposal
"""

from amusd.policy.source_selection import SourceTracker
from amusd.protocol.branches import Branches
from amusd.protocol.draft_limits import DraftLimits
from amusd.protocol.draft_probabilities import UNKNOWN, padded, trimmed, use_probability
from amusd.protocol.draft_source import DraftSource
from amusd.protocol.errors import InvalidInputError, PreconditionError
from amusd.protocol.events import Branch, DraftedRun


class DraftSession:
    """Final and drafted tokens of a session, and how many of them were sent."""

    __slots__ = (
        "_announced",
        "_branches",
        "_collect",
        "_collect_first",
        "_epoch",
        "_exhausted",
        "_has_proposed",
        "_limits",
        "_lookahead",
        "_probabilities",
        "_sent",
        "_source",
        "_sources",
        "_stalled",
        "_tokens",
        "_unsent_branches",
        "_verified",
        "tracker",
    )

    def __init__(self, tokens: list[int], limits: DraftLimits, epoch: int = 0) -> None:
        """Start after ``tokens``, all final.

        Raises:
            InvalidInputError: no token.
        """
        if not tokens:
            raise InvalidInputError("a session needs at least one token: send a prompt")
        self._tokens = list(tokens)
        self._limits = limits
        self._lookahead = limits.lookahead
        self._collect = self._collect_first = limits.tokens_per_proposal
        self._has_proposed = False  # in this epoch
        self._epoch = epoch
        self._verified = len(tokens)
        self._sent = len(tokens)
        self._sources: list[DraftSource] = []  # of [V, V + n)
        self._probabilities: list[float] = []  # of [V, V + n)
        self._source = DraftSource.MODEL  # of what was drafted last
        self.tracker = SourceTracker()
        self._branches = Branches(limits.max_branches)
        self._unsent_branches: dict[tuple[int, int], Branch] = {}
        self._stalled = self._exhausted = self._announced = False

    def __repr__(self) -> str:
        return (
            f"DraftSession(epoch={self._epoch}, verified={self._verified}, sent={self._sent}, "
            f"length={self.length}, stalled={self._stalled})"
        )

    @property
    def epoch(self) -> int:
        """Number of rollbacks so far."""
        return self._epoch

    @property
    def verified_position(self) -> int:
        """Number of final tokens, as far as the session knows."""
        return self._verified

    @property
    def is_stalled(self) -> bool:
        """Whether a drafted token was wrong, and the rollback has yet to come."""
        return self._stalled

    @property
    def length(self) -> int:
        """Number of tokens, final and drafted."""
        return len(self._tokens)

    @property
    def room(self) -> int:
        """Number of tokens that may be drafted now."""
        if self._stalled or self._exhausted:
            return 0
        least = self._limits.min_use_probability
        if least and use_probability(self._probabilities) < least:
            return 0
        end = min(self._verified + self._lookahead, self._limits.max_position)
        return max(0, end - self.length)

    @property
    def tokens(self) -> list[int]:
        """Final and drafted tokens; not to be changed by the caller."""
        return self._tokens

    @property
    def sources(self) -> frozenset[DraftSource]:
        """Sources that may draft now: those that pay, or that of tokens that wait to be sent."""
        if self._sent < self.length:
            return frozenset((self._source,))
        return self.tracker.paying

    def extend(
        self,
        drafted: tuple[int, ...],
        source: DraftSource = DraftSource.MODEL,
        probabilities: tuple[float, ...] = (),
    ) -> None:
        """Append tokens that the drafter wrote, and the model's probability of each if known.

        No tokens: it has nothing to propose here.

        Raises:
            PreconditionError: tokens of another source wait to be sent.
        """
        if self._sent < self.length and source is not self._source:
            raise PreconditionError(
                f"tokens of the {source.value} cannot follow tokens of the {self._source.value} "
                "in one proposal"
            )
        fitting = drafted[: self.room]
        self._tokens.extend(fitting)
        self._sources.extend([source] * len(fitting))
        self._probabilities.extend(padded(drafted, probabilities)[: len(fitting)])
        self._source = source
        self._exhausted = not drafted

    def branch(self, branch: Branch) -> None:
        """Hold a branch, and send it behind the run up to its position.

        It replaces a shorter one for the same outcome. It is ignored if it is one too many, if it
        does not go on behind the one that is held, or if the token at its position is final.

        Raises:
            PreconditionError: it has no tokens, does not hang on the run, repeats a token of it, or
                ends beyond the look-ahead or the last position.
        """
        position, num_tokens = branch.position, len(branch.tokens)
        if position < self._verified:
            return
        if not self._branches.takes(branch):
            return
        most = self.branch_room(position)
        if not num_tokens or position >= self.length or num_tokens > most:
            raise PreconditionError(
                f"a branch of {num_tokens} tokens at position {position} does not fit the run of "
                f"{self.length} tokens, or is longer than {most}"
            )
        if self._tokens[position] == branch.token:
            raise PreconditionError(f"a branch repeats the drafted token at position {position}")
        self._branches.hold(branch)
        self._unsent_branches[branch.root] = branch

    def branch_room(self, position: int) -> int:
        """Return how many tokens a branch at ``position`` may have."""
        return max(0, min(self._limits.lookahead, self._limits.max_position - position - 1))

    @property
    def max_branches(self) -> int:
        """Most branches that may be held at a time."""
        return self._limits.max_branches

    @property
    def tokens_per_proposal(self) -> int:
        """Number of tokens that are collected into one proposal."""
        return self._collect

    def resume(self) -> None:
        """Draft again after a proposal without tokens."""
        self._exhausted = False

    def take_run(self) -> DraftedRun | None:
        """Return what has to be proposed now, and count it as sent; None: nothing.

        A run without tokens says once that there will be none until the next advance.
        """
        if self.length > self._sent:
            if not self.is_run_due:
                return None
            self._has_proposed = True
        elif not self._unsent_branches:
            is_at_end = self._exhausted or self.length >= self._limits.max_position
            if self.room or self._stalled or self._announced or not is_at_end:
                return None
            self._announced = True
        tokens = tuple(self._tokens[self._sent :])
        known = self._take_probabilities()
        position, self._sent = self._sent, self.length
        return DraftedRun(self._epoch, position, tokens, self._source, self._take_branches(), known)

    @property
    def is_run_due(self) -> bool:
        """Whether enough drafted tokens are collected for a proposal."""
        num_ready = self.length - self._sent
        least = self._collect if self._has_proposed else self._collect_first
        return num_ready > 0 and (num_ready >= least or not self.room)

    def _take_probabilities(self) -> tuple[float, ...]:
        """Return the probabilities of the tokens to send; those of final tokens are forgotten."""
        num_sent = self._sent - self._verified  # below 0: the number of final tokens
        return trimmed([UNKNOWN] * -num_sent + self._probabilities[max(0, num_sent) :])

    def _take_branches(self) -> tuple[Branch, ...]:
        """Return the branches that hang on tokens that are sent, and count them as sent."""
        branches = tuple(self._unsent_branches.values())
        self._unsent_branches.clear()
        return branches

    def advance(
        self,
        epoch: int,
        position: int,
        tokens: tuple[int, ...],
        lookahead: int = 0,
        tokens_per_proposal: int = 0,
    ) -> None:
        """Take final ``tokens`` from ``position`` on.

        ``lookahead`` is the look-ahead from now on, within the session's limit, and
        ``tokens_per_proposal`` the tokens that are collected into one proposal; 0 leaves either.

        Raises:
            PreconditionError: it comes from a later epoch, or leaves a gap.
        """
        if epoch < self._epoch or (epoch == self._epoch and self._stalled):
            return
        if epoch > self._epoch:
            raise PreconditionError(
                f"an advance of epoch {epoch} is ahead of epoch {self._epoch}: roll back first"
            )
        if position > self._verified:
            raise PreconditionError(
                f"an advance at position {position} leaves a gap after {self._verified}"
            )
        self._set_lookahead(lookahead)
        self._collect = tokens_per_proposal or self._collect
        self._exhausted = False
        self._announced = False
        for token in tokens[self._verified - position :]:
            if self._verified == self.length:
                self._tokens.append(token)
                self._sent = self.length
            else:
                is_right = self._tokens[self._verified] == token
                self.tracker.compared(self._sources[0], is_right)
                if not is_right:
                    self._stalled = True
                    return
                del self._sources[0], self._probabilities[0]
            self._verified += 1
        self._drop_decided()

    def _drop_decided(self) -> None:
        """Drop branches below the verified position."""
        self._branches.drop_until(self._verified)
        if self._unsent_branches:
            self._unsent_branches = {
                root: branch
                for root, branch in self._unsent_branches.items()
                if branch.position >= self._verified
            }

    def rollback(
        self,
        epoch: int,
        verified_position: int,
        corrected_token: int,
        lookahead: int = 0,
        tokens_per_proposal: int = 0,
        first_proposal: int = 0,
        branch_tokens: tuple[int, ...] = (),
    ) -> int:
        """Drop the draft from the corrected token on; return how many tokens were dropped.

        ``branch_tokens`` follow the corrected token, and count as sent. What else a held branch for
        this outcome has is drafted, but not sent.

        ``lookahead`` and ``tokens_per_proposal`` as in ``advance``. The first proposal of the new
        epoch holds ``first_proposal`` tokens; 0: as many as any other.

        Raises:
            PreconditionError: the epoch is not a later one, or the position is ahead of what
                was drafted or behind what is verified.
        """
        if epoch <= self._epoch:
            raise PreconditionError(
                f"a rollback to epoch {epoch} is too old: the session is in epoch {self._epoch}"
            )
        if verified_position - 1 > self.length:
            raise PreconditionError(
                f"a rollback to position {verified_position} is ahead of the "
                f"{self.length} tokens there are"
            )
        if verified_position - 1 < self._verified:
            raise PreconditionError(
                f"a rollback to position {verified_position} is behind the "
                f"{self._verified} tokens verified already"
            )
        if len(branch_tokens) > self._limits.lookahead:
            raise PreconditionError(
                f"a rollback with {len(branch_tokens)} branch tokens is beyond the look-ahead of "
                f"{self._limits.lookahead}"
            )
        self._set_lookahead(lookahead)
        self._count_rolled_back(verified_position - 1, corrected_token)
        num_dropped = max(0, self.length - (verified_position - 1))
        self._sources.clear()
        self._probabilities.clear()
        del self._tokens[verified_position - 1 :]
        self._tokens.append(corrected_token)
        self._collect = tokens_per_proposal or self._collect
        self._collect_first = first_proposal or self._collect
        self._has_proposed = bool(branch_tokens)
        self._epoch = epoch
        self._verified = verified_position
        self._sent = verified_position + len(branch_tokens)
        self._begin_with(branch_tokens)
        self._stalled = self._exhausted = self._announced = False
        return num_dropped

    def _begin_with(self, branch_tokens: tuple[int, ...]) -> None:
        """Go on behind the branch for the outcome, or behind the tokens that were taken of it."""
        held = self._branches.rejected(self._verified - 1, self._tokens[-1])
        self._unsent_branches.clear()
        known: tuple[float, ...] = ()
        if held is not None and held.tokens[: len(branch_tokens)] == branch_tokens:
            branch_tokens, self._source, known = held.tokens, held.source, held.probabilities
        self._tokens.extend(branch_tokens)
        self._sources.extend([self._source] * len(branch_tokens))
        self._probabilities.extend(padded(branch_tokens, known))

    def _count_rolled_back(self, position: int, token: int) -> None:
        """Count what a rollback says: right before ``position``, and ``token`` stands there."""
        if self._stalled:
            return  # the wrong token was counted when the advance came
        for source in self._sources[: position - self._verified]:
            self.tracker.compared(source, is_right=True)
        if position < self.length:
            source = self._sources[position - self._verified]
            self.tracker.compared(source, self._tokens[position] == token)

    def _set_lookahead(self, lookahead: int) -> None:
        if lookahead:
            self._lookahead = min(lookahead, self._limits.lookahead)

    def check_integrity(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        if self._verified > self.length:
            raise AssertionError(f"verified more than there is: {self!r}")
        if not len(self._sources) == len(self._probabilities) == self.length - self._verified:
            raise AssertionError(f"tokens of {len(self._sources)} known sources: {self!r}")
        if self._sent > self.length:
            raise AssertionError(f"sent more than there is: {self!r}")
        if not self._stalled:  # else the branch of the outcome is kept for the rollback
            self._branches.check_integrity(self._verified)
        if self.length > self._verified + self._limits.lookahead:
            raise AssertionError(f"drafted beyond the look-ahead: {self!r}")
