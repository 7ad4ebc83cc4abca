"""One session on the verify service: what to check next, and what a pass settles.

Rules of this file
- A pass begins with ``begin_pass`` and ends with ``end_pass``; final tokens change only there.
- Stale proposals are ignored; an illegal one raises and changes nothing.
- It keeps its own copy of the final tokens, to compare late proposals with them.
- A rejection may begin the next epoch with a branch, by the rule in ``branches``. Then the next
  pass can start at once.

Intervals, for V final tokens, c in the running pass and n that wait:

    [0 ........... V)[V ........ V + c)[V + c ........ V + c + n)
     final            checking          pending
"""

from dataclasses import dataclass

from amusd.protocol.branches import Branches
from amusd.protocol.draft_probabilities import check_probabilities, padded
from amusd.protocol.errors import InvalidInputError, LimitExceededError, PreconditionError
from amusd.protocol.events import Branch, DeviceTime, Verdict


@dataclass(frozen=True, slots=True)
class Compared:
    """A proposal that was compared with the verify model's token.

    ``probability`` is the draft's own, 0 if it is not known.
    """

    probability: float
    is_right: bool


class VerifySession:
    """Final tokens of a session and the proposals that wait for the next pass."""

    __slots__ = (
        "_branches",
        "_checked_probabilities",
        "_checking",
        "_checking_epoch",
        "_epoch",
        "_final",
        "_in_pass",
        "_max_pending",
        "_max_position",
        "_pending",
        "_pending_probabilities",
        "_unspeculated_until",
        "compared",
    )

    def __init__(
        self,
        tokens: list[int],
        max_position: int,
        max_pending: int,
        epoch: int = 0,
        max_branches: int = 0,
    ) -> None:
        """Start after ``tokens``, all final, with a pass over them due.

        At most ``max_pending`` proposed tokens may wait, and ``max_branches`` branches.

        Raises:
            InvalidInputError: no token, or no room for one more below ``max_position``.
        """
        if not tokens:
            raise InvalidInputError("a session needs at least one token: send a prompt")
        if max_position <= len(tokens):
            raise InvalidInputError(
                f"max_position {max_position} leaves no room after {len(tokens)} tokens"
            )
        self._final = list(tokens)
        self._pending: list[int] = []
        self._pending_probabilities: list[float] = []
        self._checking: tuple[int, ...] = ()
        self._checked_probabilities: tuple[float, ...] = ()
        self.compared: tuple[Compared, ...] = ()
        """Proposals that the last pass compared, in order: also one that only waited."""
        self._checking_epoch = epoch
        self._epoch = epoch
        self._branches = Branches(max_branches)
        self._in_pass = False
        self._unspeculated_until = len(tokens)
        self._max_position = max_position
        self._max_pending = max_pending

    def __repr__(self) -> str:
        return (
            f"VerifySession(epoch={self._epoch}, verified={self.verified_position}, "
            f"checking={len(self._checking)}, pending={len(self._pending)})"
        )

    @property
    def verified_position(self) -> int:
        """Number of final tokens, prompt included."""
        return len(self._final)

    @property
    def is_due(self) -> bool:
        """Whether there is something to check, or a pass without proposals was requested."""
        if self._in_pass or self.verified_position >= self._max_position:
            return False
        return self.verified_position <= self._unspeculated_until or bool(self._pending)

    @property
    def epoch(self) -> int:
        """Number of rollbacks so far, as far as it knows of them."""
        return self._epoch

    @property
    def pending(self) -> tuple[int, ...]:
        """The proposals that wait for the next pass."""
        return tuple(self._pending)

    @property
    def num_pending(self) -> int:
        """Number of proposals that wait for the next pass."""
        return len(self._pending)

    @property
    def pending_probabilities(self) -> list[float]:
        """The draft's own probability of each, 0 if not known; not to be changed."""
        return self._pending_probabilities

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches that are held."""
        return self._branches.held

    @property
    def num_branch_starts(self) -> int:
        """Number of epochs that began with a branch."""
        return self._branches.num_taken

    def offer(
        self,
        epoch: int,
        position: int,
        tokens: tuple[int, ...],
        branches: tuple[Branch, ...] = (),
        probabilities: tuple[float, ...] = (),
    ) -> None:
        """Take proposals, and the branches that hang on them and on earlier ones.

        Neither tokens nor branches ask for passes without proposals up to ``position``.

        Raises:
            PreconditionError: a gap, a new epoch while tokens of the old one are checked, or a
                branch that hangs on no proposal.
            InvalidInputError: other tokens than an earlier proposal of the same epoch, or
                probabilities that do not fit the tokens.
            LimitExceededError: more tokens or branches than may wait.
        """
        check_probabilities(tokens, probabilities)
        for branch in branches:
            check_probabilities(branch.tokens, branch.probabilities)
        if not tokens and not branches:
            self._unspeculated_until = max(self._unspeculated_until, position)
            return
        if tokens and epoch >= self._epoch:
            self._offer_run(epoch, position, tokens, probabilities)
        if epoch == self._epoch:
            self._hold(branches)
        elif epoch == self._epoch - 1:
            late = self._branches.late(branches)
            if late is not None:
                self._offer_branch(late)

    def _offer_branch(self, branch: Branch) -> None:
        position = branch.position + 1
        self._offer_run(self._epoch, position, branch.tokens, branch.probabilities, of_branch=True)

    def _offer_run(
        self,
        epoch: int,
        position: int,
        tokens: tuple[int, ...],
        probabilities: tuple[float, ...],
        of_branch: bool = False,
    ) -> None:
        """Take tokens of this epoch, or of one that begins; or those of its late branch."""
        pending = self._pending if epoch == self._epoch else []
        checking = self._checking if epoch == self._checking_epoch else ()
        if self._checking and not checking:
            raise PreconditionError(
                f"epoch {epoch} begins while tokens of epoch {self._checking_epoch} are checked"
            )
        known = (*checking, *pending)
        head = self.verified_position + len(known)
        if position > head:
            raise PreconditionError(f"proposals at position {position} leave a gap after {head}")
        num_late = max(0, self.verified_position - position)
        for index, token in enumerate(tokens[num_late:]):
            offset = position + num_late + index - self.verified_position
            if offset < len(known) and known[offset] != token:
                raise InvalidInputError(
                    f"two proposals of epoch {epoch} contradict each other at position "
                    f"{self.verified_position + offset}"
                )
        fresh = tokens[head - position :]
        if len(pending) + len(fresh) > self._max_pending:
            raise LimitExceededError(
                f"more than {self._max_pending} proposed tokens wait: propose less far ahead"
            )
        if epoch > self._epoch:
            self._branches.drop_all()
            self._pending_probabilities = []
        self._epoch = epoch
        self._pending = pending
        if not of_branch:
            self._branches.begun()
        for index, token in enumerate(tokens[:num_late], position):
            if token != self._final[index]:
                self._reject(index)
                return
        pending.extend(fresh)
        self._pending_probabilities.extend(padded(tokens, probabilities)[head - position :])

    def _hold(self, branches: tuple[Branch, ...]) -> None:
        """Hold the branches that can still be taken.

        Raises:
            PreconditionError: a branch hangs on no proposal.
            LimitExceededError: more branches than may be held.
        """
        for branch in branches:
            if branch.position < self.verified_position:
                continue
            if self._branches.holds(branch) and not self._branches.takes(branch):
                continue
            known = (*self._checking, *self._pending)
            if not branch.tokens or branch.position >= self.verified_position + len(known):
                raise PreconditionError(
                    f"a branch at position {branch.position} hangs on none of the "
                    f"{len(known)} proposals from position {self.verified_position} on"
                )
            if not self._branches.takes(branch):
                raise LimitExceededError(
                    f"more than {self._branches.max_branches} branches wait: propose fewer"
                )
            self._branches.hold(branch)

    def begin_pass(self, max_tokens: int) -> tuple[int, ...]:
        """Return the proposals that the pass checks, at most ``max_tokens``."""
        # A pass over n proposals may finish n + 1 tokens.
        room = self._max_position - self.verified_position - 1
        num_checked = min(len(self._pending), max_tokens, room)
        self._checking = tuple(self._pending[:num_checked])
        self._checked_probabilities = tuple(self._pending_probabilities[:num_checked])
        self._checking_epoch = self._epoch
        del self._pending[:num_checked]
        del self._pending_probabilities[:num_checked]
        self._in_pass = True
        return self._checking

    def end_pass(
        self,
        predictions: list[int],
        pass_seconds: float,
        device_seconds: float = 0.0,
        num_cached: int = 0,
        passes: tuple[DeviceTime, ...] = (),
    ) -> Verdict:
        """Settle the pass and return its verdict.

        Args:
            predictions: the verify model's token after the last final token and after each
                checked one, ``[num_checked + 1]``. Fewer, at least one: the tokens that have no
                prediction behind them are checked in the next pass.
            pass_seconds: how long the pass took.
            device_seconds: this session's share of it.
            num_cached: tokens of the prompt that were copied, not computed.
            passes: when it ran, and before it those that computed chunks of the prompt.
        """
        num_checked = min(len(self._checking), len(predictions) - 1)
        self._pending[:0] = self._checking[num_checked:]
        self._pending_probabilities[:0] = self._checked_probabilities[num_checked:]
        num_accepted = 0
        while (
            num_accepted < num_checked and self._checking[num_accepted] == predictions[num_accepted]
        ):
            num_accepted += 1
        next_token = predictions[num_accepted]
        verdict = Verdict(
            epoch=self._checking_epoch,
            position=self.verified_position,
            num_checked=num_checked,
            num_accepted=num_accepted,
            next_token=next_token,
            pass_seconds=pass_seconds,
            device_seconds=device_seconds,
            num_cached=num_cached,
            passes=passes,
        )
        self._final.extend((*self._checking[:num_accepted], next_token))
        is_right = self._compare(num_checked, num_accepted, next_token)
        self._checking = ()
        self._in_pass = False
        if is_right:
            self._branches.drop_until(self.verified_position)
        else:
            self._reject(self.verified_position - 1)
        return verdict

    def _compare(self, num_checked: int, num_accepted: int, next_token: int) -> bool:
        """Note what the pass compared; return whether all of it is right.

        If it accepts all that it checked, the first proposal that waits is compared, too.
        """
        known = self._checked_probabilities[: min(num_checked, num_accepted + 1)]
        is_right = num_accepted == num_checked
        compared = [Compared(one, index < num_accepted) for index, one in enumerate(known)]
        if is_right and self._pending:
            is_right = self._pending.pop(0) == next_token
            compared.append(Compared(self._pending_probabilities.pop(0), is_right))
        self.compared = tuple(compared)
        return is_right

    @property
    def tokens(self) -> list[int]:
        """The final tokens; not to be changed by the caller."""
        return self._final

    def check_integrity(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        if self.verified_position > self._max_position:
            raise AssertionError(f"wrote beyond position {self._max_position}: {self!r}")
        if self._checking and not self._in_pass:
            raise AssertionError(f"checks tokens outside a pass: {self!r}")
        if len(self._pending) > self._max_pending:
            raise AssertionError(f"too many tokens wait: {self!r}")
        if len(self._pending_probabilities) != len(self._pending):
            raise AssertionError(f"the probabilities are not those of what waits: {self!r}")
        self._branches.check_integrity(self.verified_position)

    def _reject(self, position: int) -> None:
        """Begin the next epoch: the proposal at ``position`` was wrong."""
        self._pending.clear()
        self._pending_probabilities.clear()
        self._epoch += 1
        branch = self._branches.rejected(position, self._final[position])
        if branch is not None:
            self._offer_branch(branch)
